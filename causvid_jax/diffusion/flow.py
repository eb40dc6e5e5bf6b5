"""Flow matching: the sigma grid, and what x0, velocity and noise have to do with each other.

    x_t = (1 - sigma) x0 + sigma noise,    velocity = noise - x0,    timestep = 1000 sigma

One grid for all networks. Teacher, fake score and student share ``sigma(u) = shift u / (1 + (shift - 1) u)`` with the
one ``shift`` of :class:`~causvid_jax.config.DiffusionConfig`, and sigma is always the analytic ``timestep / 1000``. The
published code looks sigma up as the nearest of 1000 grid points, and mixes the shifts 5 and 8 between its networks, so
that the same timestep means different noise levels to different networks; here it never does.

Arrays are ``[B, F, h, w, C]``; sigma and timestep are ``[B, F]``, one per latent frame (or a scalar).
"""

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import DiffusionConfig, require


def sigma_from_u(u, shift: float):
    """The shifted noise level ``shift u / (1 + (shift - 1) u)`` of a nominal time ``u`` in [0, 1] (any array)."""
    return shift * u / (1 + (shift - 1) * u)


def timestep_from_sigma(sigma):
    """What the network is told: ``1000 sigma``."""
    return 1000.0 * sigma


def sigma_from_timestep(timestep):
    """The noise level of a timestep: ``timestep / 1000``."""
    return timestep / 1000.0


def expand(sigma: jax.Array, like: jax.Array) -> jax.Array:
    """``sigma`` (scalar, ``[B]`` or ``[B, F]``) with trailing axes of size one, to broadcast over ``like``, float32."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return jnp.expand_dims(sigma, tuple(range(sigma.ndim, like.ndim)))


def add_noise(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """``x_t = (1 - sigma) x0 + sigma noise``; exactly ``x0`` at sigma 0."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_from(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The regression target of every network: ``noise - x0``."""
    return noise - x0


def x0_from_velocity(x_t: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """``x0 = x_t - sigma v``."""
    return x_t - expand(sigma, x_t) * velocity


def noise_from_velocity(x_t: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """``noise = x_t + (1 - sigma) v``."""
    return x_t + (1 - expand(sigma, x_t)) * velocity


def velocity_from_x0(x_t: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
    """``v = (x_t - x0) / sigma``; sigma must not be 0."""
    return (x_t - x0) / expand(sigma, x_t)


def student_timesteps(config: DiffusionConfig) -> tuple[float, ...]:
    """The student's shifted timesteps, descending, without a final 0: (1000, 960, 888.9, 727.3) at shift 8."""
    if not config.warp:
        return config.denoising_timesteps
    return tuple(1000.0 * float(sigma_from_u(step / 1000.0, config.shift)) for step in config.denoising_timesteps)


def nominal_steps(config: DiffusionConfig) -> tuple[float, ...]:
    """The student's timesteps before the shift, ``1000 u``."""
    if config.warp:
        return config.denoising_timesteps
    sigmas = (step / 1000.0 for step in config.denoising_timesteps)
    return tuple(1000.0 * sigma / (config.shift - (config.shift - 1) * sigma) for sigma in sigmas)


def table_sigma(timestep: float, shift: float) -> float:
    """The noise level that published samplers take for ``timestep``: the nearest of a grid of 1000, ``sigma(i / 1000)``
    with i from 1 to 1000. Equal to ``timestep / 1000`` on the grid, where all warped timesteps are; 757 is 756.757."""
    grid = sigma_from_u(np.arange(1, 1001) / 1000, shift)
    return float(grid[np.abs(1000 * grid - timestep).argmin()])


def teacher_sigmas(config: DiffusionConfig) -> np.ndarray:
    """The teacher's grid, float64 ``[num_inference_steps + 1]``: ``sigma(1 - i / num_inference_steps)``, from 1 "
    "to exactly 0."""
    require(
        config.num_inference_steps >= 1,
        f"diffusion.num_inference_steps is {config.num_inference_steps}; it must be at least 1",
    )
    steps = np.arange(config.num_inference_steps + 1)
    return sigma_from_u(1 - steps / config.num_inference_steps, config.shift)
