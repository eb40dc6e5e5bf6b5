"""Interfaces of samplers, so that an evaluation does not depend on how clips are made."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

Switch = tuple[int, Sequence[str]]
"""The first pixel frame of a block, and the prompts from it on, one per clip."""


class Teacher(Protocol):
    """Sample one clip of the recipe's length for each prompt.

    Returns:
        uint8 ``[B, T, H, W, 3]``; without ``decode`` latents ``[B, F, h, w, C]``.
    """

    def __call__(self, prompts: Sequence[str], seed: int, *, decode: bool = True) -> np.ndarray: ...


class Student(Protocol):
    """Sample one stream of ``frames`` pixel frames for each prompt.

    With ``switch = (frame, new prompts)`` the prompts change at that frame, the first of a block.

    Returns:
        uint8 ``[B, frames, H, W, 3]``; without ``decode`` latents ``[B, F, h, w, C]``.
    """

    def __call__(
        self, prompts: Sequence[str], seed: int, *, frames: int, switch: Switch | None = None, decode: bool = True
    ) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Samplers:
    """Samplers of trained networks.

    Attributes:
        reconstruct: uint8 clips ``[B, T, H, W, 3]`` encoded and decoded by the VAE.
        teacher: samples clips; None leaves the teacher's row, seconds and ratios out of a report.
        student: samples streams.
        reconstruct_tiny: clips encoded by the VAE and decoded by the tiny codec, if that decodes the student's streams.
    """

    reconstruct: Callable[[np.ndarray], np.ndarray]
    teacher: Teacher | None
    student: Student
    reconstruct_tiny: Callable[[np.ndarray], np.ndarray] | None = None
