"""Distribution matching distillation (paper section 4.2, equations 2 and 4, Algorithm 1; DMD2, arXiv 2405.14867).

The student's distribution is pulled to the teacher's along the difference of two scores. With x the student's output,
``x_t = (1 - sigma) x + sigma noise``, f the fake score's x0 prediction at x_t and r the guided teacher's:

    gradient = (f - r) / mean |x - r|                    per sample, a constant
    L_G      = 0.5 mean (x - stopgrad(x - gradient))^2   so that dL_G/dx = gradient / numel

The fake score follows the student by plain flow matching on its outputs:

    L_C = mean (v_fake(x_t, t) - (noise - x))^2

Both draw ``t = 1000 sigma(u)``, u uniform in [0, 1), one per sample, clamped; sigma is the grid of every network
(``causvid_jax.diffusion.flow``). Guidance is ``r = r_uncond + g (r_cond - r_uncond)`` (``diffusion/guidance.py``).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import repeat

from causvid_jax.config import DiffusionConfig, DistillStageConfig
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.guidance import guided_velocity

ScoreFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, timestep [B, F], text) -> velocity


def score_timesteps(
    key: jax.Array, batch: int, frames: int, diffusion: DiffusionConfig, distill: DistillStageConfig
) -> jax.Array:
    """Timesteps ``[B, F]`` for the scores: shifted uniform, clamped to the configured range, equal over the frames."""
    u = jax.random.uniform(key, (batch,))
    timestep = flow.timestep_from_sigma(flow.sigma_from_u(u, diffusion.shift))
    timestep = jnp.clip(timestep, distill.score_timestep_min, distill.score_timestep_max)
    return repeat(timestep, "b -> b f", f=frames)


def dmd_gradient(x0: jax.Array, fake_x0: jax.Array, real_x0: jax.Array) -> jax.Array:
    """``(f - r) / mean |x - r|`` with the mean over each sample; where that is not finite (0 / 0), zero."""
    scale = jnp.mean(jnp.abs(x0 - real_x0), axis=tuple(range(1, x0.ndim)), keepdims=True)
    gradient = (fake_x0 - real_x0) / scale
    return jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def masked_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the mean over all elements, or over the frames where ``mask`` (bool ``[B, F]``) is True; 0 if none is."""
    if mask is None:
        return jnp.mean(values)
    weight = jnp.broadcast_to(flow.expand(mask.astype(jnp.float32), values), values.shape)
    return jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1.0)


def generator_loss(
    x0: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    key: jax.Array,
    *,
    teacher: ScoreFn,
    fake: ScoreFn,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The student's loss; the only thing it can be differentiated by is ``x0``.

    Args:
      x0: the student's output, ``[B, F, h, w, C]``.
      text: ``[B, S, E]``; both scores are conditional on it.
      null_text: the teacher's empty prompt, ``[S, E]`` or ``[B, S, E]``.
      key: draws the timesteps and the noise.
      teacher: the real score, ``(x, timestep, text) -> velocity``.
      fake: the fake score, likewise; never guided.
      diffusion: the grid.
      distill: ``guidance`` and the timestep range.
      mask: bool ``[B, F]``, True for the frames that count; all of them by default.

    Returns:
      The scalar loss and metrics: loss, mean absolute gradient, and mean timestep.
    """
    time_key, noise_key = jax.random.split(key)
    x0 = x0.astype(jnp.float32)
    x = jax.lax.stop_gradient(x0)  # the scores are evaluated at the student's output, never differentiated through
    timestep = score_timesteps(time_key, x.shape[0], x.shape[1], diffusion, distill)
    sigma = flow.sigma_from_timestep(timestep)
    x_t = flow.add_noise(x, jax.random.normal(noise_key, x.shape), sigma)

    fake_velocity = fake(x_t, timestep, text)
    real_velocity = guided_velocity(teacher, x_t, timestep, text, null_text, distill.guidance_scale)
    fake_x0 = flow.x0_from_velocity(x_t, fake_velocity.astype(jnp.float32), sigma)
    real_x0 = flow.x0_from_velocity(x_t, real_velocity.astype(jnp.float32), sigma)
    gradient = jax.lax.stop_gradient(dmd_gradient(x, fake_x0, real_x0))  # ... nor are the scores' parameters

    # x0 - x is exactly zero: x - stopgrad(x - gradient) without its rounding (the published code takes float64).
    loss = 0.5 * masked_mean(jnp.square((x0 - x) + gradient), mask)
    metrics = {"loss": loss, "gradient": masked_mean(jnp.abs(gradient), mask), "timestep": jnp.mean(timestep)}
    return loss, metrics


def critic_loss(
    x0: jax.Array,
    text: jax.Array,
    key: jax.Array,
    *,
    fake: ScoreFn,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The fake score's flow-matching loss on the student's outputs, unweighted, on velocities directly.

    Arguments as in :func:`generator_loss`; ``fake`` closes over the parameters that are trained.
    """
    time_key, noise_key = jax.random.split(key)
    x = jax.lax.stop_gradient(x0.astype(jnp.float32))  # the student is data here
    timestep = score_timesteps(time_key, x.shape[0], x.shape[1], diffusion, distill)
    noise = jax.random.normal(noise_key, x.shape)
    velocity = fake(flow.add_noise(x, noise, flow.sigma_from_timestep(timestep)), timestep, text)
    loss = masked_mean(jnp.square(velocity.astype(jnp.float32) - flow.velocity_from(x, noise)), mask)
    return loss, {"loss": loss}
