"""Interfaces of samplers, so that an evaluation does not depend on how clips are made."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

Switch = tuple[int, Sequence[str]]
"""A pixel frame and the prompts from it on."""


class Teacher(Protocol):
    """Sample clips of the recipe's length: uint8 ``[B, T, H, W, 3]``; latents if not ``decode``."""

    def __call__(self, prompts: Sequence[str], seed: int, *, decode: bool = True) -> np.ndarray: ...


class Student(Protocol):
    """Sample streams of ``frames`` pixel frames; with ``switch = (frame, new prompts)`` the prompts change there."""

    def __call__(
        self, prompts: Sequence[str], seed: int, *, frames: int, switch: Switch | None = None, decode: bool = True
    ) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Samplers:
    """Samplers of trained networks.

    Attributes:
      reconstruct: uint8 clips ``[B, T, H, W, 3]`` encoded and decoded by the VAE.
      teacher: None leaves the teacher's row, seconds and ratios out of a report.
      student: streams.
      reconstruct_tiny: clips encoded by the VAE and decoded by the tiny codec, if that decodes the student's streams.
    """

    reconstruct: Callable[[np.ndarray], np.ndarray]
    teacher: Teacher | None
    student: Student
    reconstruct_tiny: Callable[[np.ndarray], np.ndarray] | None = None
