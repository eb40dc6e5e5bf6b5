"""Distribution matching distillation losses (paper section 4.2, equations 2 and 4; DMD2, arXiv 2405.14867).

The student's distribution moves towards the teacher's along the difference of two scores. Let x be the student's
output, ``x_t = (1 - sigma) x + sigma noise``, f the fake score's x0 prediction at x_t and r the guided teacher's:

    gradient = (f - r) / mean |x - r|                    per sample, a constant
    L_G      = 0.5 mean (x - stopgrad(x - gradient))^2   so that dL_G/dx = gradient / numel

The fake score is trained by flow matching on the student's outputs:

    L_C = mean (v_fake(x_t, t) - (noise - x))^2

Both losses draw ``t = 1000 sigma(u)``, u uniform in [0, 1), one per sample, clamped to the configured range
(:class:`Levels` narrows it). Guidance: ``r = r_uncond + g (r_cond - r_uncond)`` (``diffusion/guidance.py``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat

from causvid_jax.config import DiffusionConfig, DistillStageConfig, ExpertsConfig, require
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.guidance import guided_velocity, scale_at

ScoreFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, timestep [B, F], prompt_embeds) -> velocity


class Levels(NamedTuple):
    """The range of the scores' timesteps: nominal times in ``[low, high)``, drawn per clip or per block.

    Attributes:
      low: scalar; for timesteps tied to the exit step the time of the next step; None: 0.
      high: scalar; None: 1.
      block_sizes: frames of each block; empty: one timestep for the clip.
    """

    low: jax.Array | float | None = None
    high: jax.Array | float | None = None
    block_sizes: tuple[int, ...] = ()


def score_timesteps(
    key: jax.Array,
    batch: int,
    frames: int,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
    levels: Levels = Levels(),  # noqa: B008
) -> jax.Array:
    """Draw the scores' timesteps ``[B, F]``: shifted uniform, clamped to the configured range, equal in all frames.

    ``levels`` narrows the nominal times, and draws one timestep per block.
    """
    u = jax.random.uniform(key, (batch, len(levels.block_sizes)) if levels.block_sizes else (batch,))
    if levels.low is not None or levels.high is not None:
        low, high = 0.0 if levels.low is None else levels.low, 1.0 if levels.high is None else levels.high
        u = low + (high - low) * u
    timestep = flow.timestep_from_sigma(flow.sigma_from_u(u, diffusion.shift))
    timestep = jnp.clip(timestep, distill.score_timestep_min, distill.score_timestep_max)
    if levels.block_sizes:
        return jnp.repeat(timestep, jnp.asarray(levels.block_sizes), axis=1, total_repeat_length=frames)
    return repeat(timestep, "b -> b f", f=frames)


def noise_output(
    x: jax.Array,
    key: jax.Array | None,
    timestep: jax.Array | None,
    noise: jax.Array | None,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
    levels: Levels = Levels(),  # noqa: B008
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return ``x_t = (1 - sigma) x + sigma noise``, the timesteps ``[B, F]``, sigma and the noise.

    Timesteps and noise that are None are drawn with ``key``.
    """
    require(
        key is not None or (timestep is not None and noise is not None),
        "a loss without a key needs both timestep and noise",
    )
    if key is not None:
        time_key, noise_key = jax.random.split(key)
        if timestep is None:
            timestep = score_timesteps(time_key, x.shape[0], x.shape[1], diffusion, distill, levels)
        noise = jax.random.normal(noise_key, x.shape) if noise is None else noise
    assert timestep is not None and noise is not None
    sigma = flow.sigma_from_timestep(timestep)
    return flow.add_noise(x, noise, sigma), timestep, sigma, noise


def dmd_gradient(x0: jax.Array, fake_x0: jax.Array, real_x0: jax.Array) -> jax.Array:
    """Return ``(f - r) / mean |x - r|``, the mean taken per sample, and zero where that is not finite (0 / 0)."""
    scale = jnp.mean(jnp.abs(x0 - real_x0), axis=tuple(range(1, x0.ndim)), keepdims=True)
    gradient = (fake_x0 - real_x0) / scale
    return jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def masked_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the mean over all elements, or over the frames where ``mask`` (bool ``[B, F]``) is True; 0 if none."""
    if mask is None:
        return jnp.mean(values)
    weight = jnp.broadcast_to(flow.expand(mask.astype(jnp.float32), values), values.shape)
    return jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1.0)


def mask_weight(mask: jax.Array | None) -> dict[str, jax.Array]:
    """Return the number of frames that a masked mean counts as ``{"weight"}``; without a mask an empty dict."""
    return {} if mask is None else {"weight": jnp.sum(mask.astype(jnp.float32))}


class Predictions(NamedTuple):
    """Predictions of the two scores for one noisy copy of the student's output, float32 ``[B, F, h, w, C]``."""

    fake_x0: jax.Array
    real_x0: jax.Array
    timestep: jax.Array  # [B, F]


def predictions(
    x: jax.Array,
    prompt_embeds: jax.Array,
    negative_prompt_embeds: jax.Array,
    key: jax.Array | None = None,
    *,
    teacher: ScoreFn,
    fake: ScoreFn,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
    timestep: jax.Array | None = None,
    noise: jax.Array | None = None,
    levels: Levels = Levels(),  # noqa: B008
    experts: ExpertsConfig = ExpertsConfig(),  # noqa: B008
) -> Predictions:
    """Return the x0 predictions of both scores, each guided by its scale, at ``x_t = (1 - sigma) x + sigma noise``.

    Arguments are those of :func:`generator_loss`; a gradient passes through ``x_t`` to ``x``.
    """
    x_t, timestep, sigma, _ = noise_output(x, key, timestep, noise, diffusion, distill, levels)

    low = experts.low_noise_distill_guidance_scale
    real_scale = scale_at(timestep, distill.guidance_scale, low, experts.boundary)
    scales = (fake, distill.fake_guidance_scale), (teacher, real_scale)
    velocities = [
        guided_velocity(score, x_t, timestep, prompt_embeds, negative_prompt_embeds, scale) for score, scale in scales
    ]
    fake_x0, real_x0 = (flow.x0_from_velocity(x_t, v.astype(jnp.float32), sigma) for v in velocities)
    return Predictions(fake_x0, real_x0, timestep)


def generator_loss(
    x0: jax.Array,
    prompt_embeds: jax.Array,
    negative_prompt_embeds: jax.Array,
    key: jax.Array | None = None,
    *,
    teacher: ScoreFn,
    fake: ScoreFn,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
    mask: jax.Array | None = None,
    timestep: jax.Array | None = None,
    noise: jax.Array | None = None,
    levels: Levels = Levels(),  # noqa: B008
    experts: ExpertsConfig = ExpertsConfig(),  # noqa: B008
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the student's loss. Its gradient reaches ``x0`` only, not the scores.

    Args:
      x0: output of the student, ``[B, F, h, w, C]``.
      prompt_embeds: ``[B, S, E]``, read by both scores.
      negative_prompt_embeds: of the unconditional branches, ``[S, E]`` or ``[B, S, E]``.
      key: draws the timesteps and the noise.
      teacher: the real score, ``(x, timestep, prompt_embeds) -> velocity``.
      fake: the fake score, likewise; it is guided by ``fake_guidance_scale``, 1 in the paper.
      diffusion: the noise grid.
      distill: guidance scales and timestep range.
      mask: bool ``[B, F]``, the frames that the loss counts; default: all.
      timestep: ``[B, F]``, instead of drawn ones.
      noise: shape of ``x0``, instead of drawn noise. With both, no key is needed.
      levels: where the timesteps are drawn.
      experts: of a teacher of two networks, with a guidance scale for each.

    Returns:
      The scalar loss and metrics: loss, mean absolute gradient, and mean timestep.

    Raises:
      ConfigError: neither a key nor both ``timestep`` and ``noise``.
    """
    x0 = x0.astype(jnp.float32)
    x = jax.lax.stop_gradient(x0)  # no gradient through the scores' inputs
    scores: dict[str, Any] = {"teacher": teacher, "fake": fake, "diffusion": diffusion, "distill": distill}
    draws: dict[str, Any] = {"timestep": timestep, "noise": noise, "levels": levels, "experts": experts}
    fake_x0, real_x0, timestep = predictions(x, prompt_embeds, negative_prompt_embeds, key, **scores, **draws)
    gradient = jax.lax.stop_gradient(dmd_gradient(x, fake_x0, real_x0))  # nor into their parameters

    # x0 - x is exactly zero. This is x - stopgrad(x - gradient) without its rounding (the published code uses float64).
    loss = 0.5 * masked_mean(jnp.square((x0 - x) + gradient), mask)
    metrics = {"loss": loss, "gradient": masked_mean(jnp.abs(gradient), mask), "timestep": jnp.mean(timestep)}
    return loss, metrics | mask_weight(mask)


def critic_loss(
    x0: jax.Array,
    prompt_embeds: jax.Array,
    key: jax.Array | None = None,
    *,
    fake: ScoreFn,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
    mask: jax.Array | None = None,
    timestep: jax.Array | None = None,
    noise: jax.Array | None = None,
    levels: Levels = Levels(),  # noqa: B008
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the fake score's flow-matching loss on the student's outputs: unweighted, on velocities.

    Arguments are those of :func:`generator_loss`; the trained parameters are inside ``fake``.
    """
    x = jax.lax.stop_gradient(x0.astype(jnp.float32))  # the student's output is data here
    x_t, timestep, _, noise = noise_output(x, key, timestep, noise, diffusion, distill, levels)
    velocity = fake(x_t, timestep, prompt_embeds)
    loss = masked_mean(jnp.square(velocity.astype(jnp.float32) - flow.velocity_from(x, noise)), mask)
    return loss, {"loss": loss} | mask_weight(mask)
