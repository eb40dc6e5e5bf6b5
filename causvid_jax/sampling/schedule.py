"""Timesteps in [0, 1000] and noise levels ``sigma = timestep / 1000`` of the network passes of a block."""

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import DiffusionConfig, Recipe, require
from causvid_jax.diffusion import flow


def passes_per_block(config: Recipe) -> int:
    """Return the number of network passes of a block: denoising steps and, with ``causal.context_pass``, one more."""
    return len(config.diffusion.denoising_timesteps) + config.causal.context_pass


def _sigma(timestep: float, config: Recipe) -> float:
    """Return the noise level of a timestep: t / 1000, or that of the published sampler's table."""
    exact = config.student.precision == "causvid" and timestep > 0
    return flow.table_sigma(timestep, flow.student_shift(config.diffusion)) if exact else timestep / 1000.0


def schedule(config: Recipe, timesteps: tuple[float, ...] | None) -> tuple[tuple[float, ...], list[float]]:
    """Return the Q denoising timesteps and their Q + 1 noise levels, the last of which is 0.

    ``timesteps`` replace those of the recipe. With ``student.precision="causvid"`` a level is that of the published
    sampler's table.
    """
    steps = tuple(flow.student_timesteps(config.diffusion)) if timesteps is None else timesteps
    return steps, [_sigma(t, config) for t in steps] + [0.0]


def tables(
    begins: jax.Array | None, config: Recipe, timesteps: tuple[float, ...] | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Return the timestep and the noise level of every pass on a block, float32 ``[passes + 1]``, and their number.

    The context pass is the last one, at noise level 0. A block without a past (``begins``, traced) has the passes of
    ``diffusion.first_block_timesteps``. Tables and number are then traced, so one program serves both kinds. With
    ``begins=None`` all blocks have the same passes. ``timesteps`` replace those of the recipe in all blocks.
    """
    write = [config.causal.context_noise] if config.causal.context_pass else []

    def table(steps: tuple[float, ...] | None, length: int) -> tuple[jax.Array, jax.Array]:
        chosen, sigmas = schedule(config, steps)
        padded = np.zeros((2, length + 1), np.float32)
        padded[0, : len(chosen) + len(write)] = [*chosen, *write]
        padded[1, : len(sigmas)] = sigmas
        return jnp.asarray(padded[0]), jnp.asarray(padded[1])

    count = len(schedule(config, timesteps)[0]) + len(write)
    if begins is None or timesteps is not None or not config.diffusion.first_block_timesteps:
        return *table(timesteps, count), count
    opening = flow.first_block_timesteps(config.diffusion)
    longest = max(count, len(opening) + len(write))
    first, later = table(opening, longest), table(None, longest)
    times, levels = (jnp.where(begins, a, b) for a, b in zip(first, later, strict=True))
    return times, levels, jnp.where(begins, len(opening) + len(write), count)


def strength_step(config: DiffusionConfig, strength: float) -> int:
    """Return the first step of video to video: the first whose nominal timestep is at most ``1000 strength``.

    Strength 1 keeps nothing of the input. Nominal means before the shift: for any shift, four evenly spaced steps
    correspond to 1, 0.75, 0.5 and 0.25. The paper (section 5.3) takes the last step alone, the lowest strength.

    Raises:
        ConfigError: a strength above 1, or below the nominal timestep of the last step over 1000.
    """
    nominal = flow.nominal_steps(config)
    lowest = nominal[-1] / 1000.0
    require(
        lowest <= strength <= 1.0,
        f"strength is {strength:g}; accepted: {lowest:g} (close to it) to 1 (free)",
    )
    return next(i for i, step in enumerate(nominal) if step <= 1000.0 * strength + 1e-6)
