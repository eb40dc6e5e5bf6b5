"""Refuse arrays and timesteps with which the formulas of this room would give a wrong result silently."""

from collections.abc import Sequence

import jax

from causvid_jax.config import require


def same_shape(**arrays: jax.Array) -> None:
    """Refuse arrays of different shapes by a ConfigError; broadcasting would give a wrong number silently."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    require(
        len(set(shapes.values())) == 1,
        f"{' and '.join(f'{name} has shape {shape}' for name, shape in shapes.items())}; they must be equal",
    )


def descending(steps: Sequence[float]) -> None:
    """Refuse timesteps that are empty, do not descend or are outside (0, 1000] by a ConfigError."""
    require(
        bool(steps) and list(steps) == sorted(set(steps), reverse=True) and 0 < min(steps) <= max(steps) <= 1000,
        f"timesteps are {steps}; they must be at least one, distinct, descending, and in (0, 1000]",
    )
