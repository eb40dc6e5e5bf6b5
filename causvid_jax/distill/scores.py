"""Shared parts of the distillation losses: noisy copies of the student's output and the scores' predictions for them.

    x_t = (1 - sigma) x + sigma noise,   t = 1000 sigma(u)

u is uniform in [0, 1), one per sample, and t is clamped to the configured range (:class:`Levels` narrows it). Guidance:
``r = r_uncond + g (r_cond - r_uncond)`` (``diffusion/guidance.py``).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat

from causvid_jax.config import DiffusionConfig, DistillStageConfig, ExpertsConfig, require
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.guidance import guided_velocity, scale_at

ScoreFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, timestep [B, F], prompt_embeds) -> velocity


class Levels(NamedTuple):
    """The range of nominal times u, ``[low, high)`` in [0, 1], in which the scores' timesteps are drawn.

    Attributes:
        low: scalar; None: 0. If timesteps depend on the exit step, ``low`` is the time of the step after the exit.
        high: scalar; None: 1.
        block_sizes: latent frames of each block, for a timestep per block; empty: one timestep for the clip.
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
    """Draw the scores' timesteps ``clip(1000 sigma(u), score_timestep_min, score_timestep_max)``, ``[B, F]``.

    u is uniform in the range of ``levels``. There is one u per clip, or with ``levels.block_sizes`` one per block.
    Source: CausVid's and Self-Forcing's DMD code, which draw whole nominal timesteps and clamp to [20, 980].
    """
    u = jax.random.uniform(key, (batch, len(levels.block_sizes)) if levels.block_sizes else (batch,))
    if levels.low is not None or levels.high is not None:
        low, high = 0.0 if levels.low is None else levels.low, 1.0 if levels.high is None else levels.high
        u = low + (high - low) * u
    timestep = flow.timestep_from_sigma(flow.sigma_from_u(u, diffusion.shift))
    timestep = jnp.clip(timestep, distill.score_timestep_min, distill.score_timestep_max)
    if levels.block_sizes:
        return flow.per_frame(timestep, levels.block_sizes)
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
    """Return ``x_t = (1 - sigma) x + sigma noise``, the timesteps ``[B, F]``, sigma ``[B, F]`` and the noise.

    ``x`` and the noise are ``[B, F, h, w, C]``. Timesteps and noise that are None are drawn with ``key``.

    Raises:
        ConfigError: ``key`` is None, and so is ``timestep`` or ``noise``.
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


def masked_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the mean of ``values [B, F, ...]``, or of the frames where ``mask [B, F]`` is True (0 without any)."""
    if mask is None:
        return jnp.mean(values)
    weight = jnp.broadcast_to(flow.expand(mask.astype(jnp.float32), values), values.shape)
    return jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1.0)


def mask_weight(mask: jax.Array | None) -> dict[str, jax.Array]:
    """Return ``{"weight": n}`` with the number n of frames in a masked mean; without a mask an empty dict."""
    return {} if mask is None else {"weight": jnp.sum(mask.astype(jnp.float32))}


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the x0 predictions of the fake and the real score at ``x_t = (1 - sigma) x + sigma noise``, and t.

    Each score is guided by its scale. The predictions are float32 ``[B, F, h, w, C]``, the timesteps t ``[B, F]``.
    Arguments and errors are those of :func:`causvid_jax.distill.dmd.generator_loss`. A gradient passes through ``x_t``
    to ``x``.
    """
    x_t, timestep, sigma, _ = noise_output(x, key, timestep, noise, diffusion, distill, levels)

    low = experts.low_noise_distill_guidance_scale
    real_scale = scale_at(timestep, distill.guidance_scale, low, experts.boundary, distill.guidance_interval)
    scores = (fake, distill.fake_guidance_scale, 1.0), (teacher, real_scale, distill.guidance_eta)
    velocities = [
        guided_velocity(score, x_t, timestep, prompt_embeds, negative_prompt_embeds, scale, eta)
        for score, scale, eta in scores
    ]
    fake_x0, real_x0 = (flow.x0_from_velocity(x_t, v.astype(jnp.float32), sigma) for v in velocities)
    return fake_x0, real_x0, timestep
