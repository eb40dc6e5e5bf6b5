"""Flow matching: the noise schedule and the conversions between x0, velocity and noise.

    x_t = (1 - sigma) x0 + sigma noise,    velocity = noise - x0,    timestep = 1000 sigma

All networks share one schedule: ``sigma(u) = shift u / (1 + (shift - 1) u)`` with the ``shift`` of
:class:`~causvid_jax.config.DiffusionConfig`, and ``sigma = timestep / 1000`` exactly. The published code instead takes
the nearest of 1000 grid points and mixes the shifts 5 and 8 between its networks, so one timestep can mean two noise
levels.

Sources: flow matching, arXiv 2210.02747; timestep shift, arXiv 2403.03206 (section 5.3.2); CausVid, arXiv 2412.07772
(section 3.1).

Arrays are ``[B, F, h, w, C]``; sigma and timestep are ``[B, F]``, one per latent frame (or a scalar).
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from causvid_jax.config import DiffusionConfig
from causvid_jax.diffusion.checks import same_shape

Sigma: TypeAlias = jax.Array | np.ndarray | float


def sigma_from_u(u: Any, shift: float) -> Any:
    """Return the noise level in [0, 1], ``shift u / (1 + (shift - 1) u)``, of nominal times ``u`` in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


def timestep_from_sigma(sigma: Any) -> Any:
    """Return the timestep that conditions the network, ``1000 sigma``, in [0, 1000]."""
    return 1000.0 * sigma


def sigma_from_timestep(timestep: Any) -> Any:
    """Return the noise level ``timestep / 1000`` of timesteps in [0, 1000]."""
    return timestep / 1000.0


def expand(sigma: Sigma, like: jax.Array) -> jax.Array:
    """Return ``sigma`` (scalar, ``[B]`` or ``[B, F]``) in float32, with axes of size one up to the rank of ``like``."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return jnp.expand_dims(sigma, tuple(range(sigma.ndim, like.ndim)))


def per_frame(values: jax.Array, block_sizes: Sequence[int]) -> jax.Array:
    """Repeat values of blocks ``[B, n]`` for every latent frame of each block, ``[B, F]``."""
    return jnp.repeat(values, np.asarray(block_sizes), axis=1, total_repeat_length=sum(block_sizes))


def add_noise(
    x0: Float[jax.Array, "*shape"], noise: Float[jax.Array, "*shape"], sigma: Sigma
) -> Float[jax.Array, "*shape"]:
    """Return ``x_t = (1 - sigma) x0 + sigma noise``. At sigma 0 this is exactly ``x0``."""
    same_shape(x0=x0, noise=noise)
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_from(x0: Float[jax.Array, "*shape"], noise: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Return the velocity ``noise - x0``, the regression target of every network."""
    return noise - x0


def x0_from_velocity(
    x_t: Float[jax.Array, "*shape"], velocity: Float[jax.Array, "*shape"], sigma: Sigma
) -> Float[jax.Array, "*shape"]:
    """Return the clean latents ``x0 = x_t - sigma velocity``."""
    same_shape(x_t=x_t, velocity=velocity)
    return x_t - expand(sigma, x_t) * velocity


def student_timesteps(config: DiffusionConfig) -> tuple[float, ...]:
    """Return the student's timesteps after the shift, descending in (0, 1000], without a final 0.

    At shift 8, (1000, 750, 500, 250) becomes (1000, 960, 888.9, 727.3). With ``warp`` off timesteps are not shifted.
    """
    return _shifted(config.denoising_timesteps, config)


def first_block_timesteps(config: DiffusionConfig) -> tuple[tuple[float, ...], ...]:
    """Return the timesteps after the shift of ``first_block_timesteps``, one list for each of the first blocks."""
    return tuple(_shifted(steps, config) for steps in config.first_block_timesteps)


def student_shift(config: DiffusionConfig) -> float:
    """Return the shift of the student's timesteps: ``student_shift``, or ``shift`` where that is 0."""
    return config.student_shift or config.shift


def _shifted(steps: tuple[float, ...], config: DiffusionConfig) -> tuple[float, ...]:
    if not config.warp:
        return steps
    # At some shifts below 0.5, sigma(1) is 1 + 2^-52.
    return tuple(min(1000.0 * float(sigma_from_u(step / 1000.0, student_shift(config))), 1000.0) for step in steps)


def u_from_sigma(sigma: Any, shift: float) -> Any:
    """Return the nominal time ``sigma / (shift - (shift - 1) sigma)``, the inverse of :func:`sigma_from_u`."""
    return sigma / (shift - (shift - 1) * sigma)


def nominal_steps(config: DiffusionConfig) -> tuple[float, ...]:
    """Return the student's timesteps before the shift, ``1000 u`` in (0, 1000]."""
    if config.warp:
        return config.denoising_timesteps
    return tuple(1000.0 * u_from_sigma(step / 1000.0, config.shift) for step in config.denoising_timesteps)


def table_sigma(timestep: float, shift: float) -> float:
    """Return the noise level that published samplers use: the nearest of ``sigma(i / 1000)``, i from 1000 down to 1.

    If two are equally near, the larger is returned. Shifted integer nominal timesteps are on this grid, with the level
    ``timestep / 1000``. Others are rounded: at shift 8, timestep 757 gives 0.756757.

    Source: the published CausVid and Self-Forcing code (``FlowMatchScheduler``).
    """
    grid = sigma_from_u(np.arange(1000, 0, -1) / 1000, shift)
    return float(grid[np.abs(1000 * grid - timestep).argmin()])


def teacher_sigmas(config: DiffusionConfig) -> np.ndarray:
    """Return the teacher's noise levels ``sigma(1 - i / n)``, n = num_inference_steps; float64 ``[n + 1]``, 1 to 0."""
    steps = np.arange(config.num_inference_steps + 1)
    return sigma_from_u(1 - steps / config.num_inference_steps, config.shift)
