"""Timesteps in [0, 1000] and noise levels ``sigma = timestep / 1000`` of the network passes of a block."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import CausalConfig, DiffusionConfig, Recipe, require
from causvid_jax.diffusion import checks, flow

ROUNDING = 1e-6
"""Difference of strengths that are equal, since a message shows six digits of the lowest one."""


def jit_sampler(sample: Callable[..., Any], **options: Any) -> Any:
    """Return ``jax.jit(sample)`` with the static arguments ``config`` and ``timesteps``, which may be any sequence.

    ``timesteps`` are a keyword; JAX itself refuses a list or an array, which have no hash. ``options`` are those of
    ``jax.jit``.
    """
    jitted: Any = jax.jit(sample, static_argnames=("config", "timesteps"), **options)

    def with_tuple(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(sample)
        def run(*arrays: Any, timesteps: Any = None, **given: Any) -> Any:
            return call(*arrays, timesteps=None if timesteps is None else tuple(map(float, timesteps)), **given)

        return run

    sampler: Any = with_tuple(jitted)
    sampler.lower, sampler._cache_size = with_tuple(jitted.lower), jitted._cache_size
    return sampler


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

    Raises:
        ConfigError: ``timesteps`` are empty, do not descend or are outside (0, 1000].
    """
    steps = tuple(flow.student_timesteps(config.diffusion)) if timesteps is None else timesteps
    checks.descending(steps)
    return steps, [_sigma(t, config) for t in steps] + [0.0]


def tables(
    block: jax.Array | int | None, config: Recipe, timesteps: tuple[float, ...] | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Return the timestep and the noise level of every pass on a block, float32 ``[passes + 1]``, and their number.

    The context pass is the last one, at noise level 0. ``block`` (traced) is the number of the block since the start of
    the stream (:func:`block_number`). The first blocks have the passes of ``diffusion.first_block_timesteps``. Tables
    and number are then traced, so one program serves all blocks. With ``block=None`` all blocks have the passes of
    ``denoising_timesteps``. ``timesteps`` replace those of the recipe in all blocks.
    """
    write = [config.causal.context_noise] if config.causal.context_pass else []

    def table(steps: tuple[float, ...] | None, length: int) -> tuple[jax.Array, jax.Array]:
        chosen, sigmas = schedule(config, steps)
        padded = np.zeros((2, length + 1), np.float32)
        padded[0, : len(chosen) + len(write)] = [*chosen, *write]
        padded[1, : len(sigmas)] = sigmas
        return jnp.asarray(padded[0]), jnp.asarray(padded[1])

    count = len(schedule(config, timesteps)[0]) + len(write)
    first = flow.first_block_timesteps(config.diffusion)
    if block is None or timesteps is not None or not first:
        return *table(timesteps, count), count
    counts = [*(len(steps) + len(write) for steps in first), count]
    rows = [table(steps, max(counts)) for steps in (*first, None)]
    row = jnp.minimum(block, len(first))
    times, levels = (jnp.stack(column)[row] for column in zip(*rows, strict=True))
    return times, levels, jnp.asarray(counts)[row]


def check_noise(
    noise: jax.Array | None, block: tuple[int, ...], config: Recipe, timesteps: tuple[float, ...] | None = None
) -> None:
    """Check that given noise (None: drawn noise) has an entry of shape ``block`` for every step that reads one.

    These are the denoising steps of the longest list, and the context pass if that adds noise.

    Raises:
        ConfigError: too few entries, or entries of another shape.
    """
    if noise is None:
        return
    lists = [schedule(config, timesteps)[0], *(flow.first_block_timesteps(config.diffusion) if not timesteps else ())]
    needed = max(map(len, lists)) + (config.causal.add_context_noise == "always")
    require(
        len(noise) >= needed and noise.shape[1:] == block,
        f"the noise of a block has shape {noise.shape}; it must be {(needed, *block)}, one entry per step",
    )


def check_single_blocks(config: Recipe) -> None:
    """Refuse a recipe that denoises several blocks jointly (``sampling.rolling``)."""
    blocks = config.rolling_blocks
    require(
        not blocks,
        f"recipe {config.name!r} denoises {blocks} blocks jointly (rolling_blocks), which only causvid sample and "
        "sampling.rolling do; for one block at a time use rolling_blocks 0",
    )


def block_number(position: jax.Array | int, causal: CausalConfig) -> jax.Array | int:
    """Return the number of the block that starts at latent frame ``position``, counted from 0."""
    size = causal.frames_per_block
    return (position + (size - 1) * causal.independent_first_frame) // size


DEFAULT_STRENGTH = 0.5
"""Of video to video: half of the way from noise to the input."""


def strength_step(config: DiffusionConfig, strength: float) -> int:
    """Return the first step of video to video: the first whose nominal timestep is at most ``1000 strength``.

    Strength 1 keeps nothing of the input. Nominal means before the shift: for any shift, four evenly spaced steps
    correspond to 1, 0.75, 0.5 and 0.25. The paper (section 5.3) takes only the last step, the lowest strength.

    Raises:
        ConfigError: a strength above 1, or below the nominal timestep of the last step over 1000.
    """
    nominal = flow.nominal_steps(config)
    lowest = nominal[-1] / 1000.0
    require(
        lowest - ROUNDING <= strength <= 1.0,
        f"strength is {strength:g}; accepted: {lowest:g} (close to it) to 1 (free)",
    )
    return next(i for i, step in enumerate(nominal) if step <= 1000.0 * (strength + ROUNDING))
