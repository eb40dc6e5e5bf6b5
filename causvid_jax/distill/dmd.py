"""Losses of distribution matching distillation (CausVid, arXiv 2412.07772, sections 3.2 and 4.2, equations 2 and 4).

The method is DMD2's (arXiv 2405.14867). The student's distribution moves towards the teacher's along the difference of
two scores. Let x be the student's output and ``x_t = (1 - sigma) x + sigma noise``. At x_t, let f be the x0 prediction
of the fake score and r that of the guided teacher:

    gradient = (f - r) / mean |x - r|                    per sample, a constant
    L_G      = 0.5 mean (x - stopgrad(x - gradient))^2   so that dL_G/dx = gradient / numel

The fake score is trained by flow matching on the student's outputs:

    L_C = mean (v_fake(x_t, t) - (noise - x))^2

:mod:`causvid_jax.distill.scores` draws t and the noise, and guides the scores.
"""

from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import DiffusionConfig, DistillStageConfig, ExpertsConfig
from causvid_jax.diffusion import checks, flow
from causvid_jax.distill import scores
from causvid_jax.distill.scores import Levels, ScoreFn, mask_weight, masked_mean


def dmd_gradient(x0: jax.Array, fake_x0: jax.Array, real_x0: jax.Array) -> jax.Array:
    """Return ``(f - r) / mean |x - r|``, ``[B, F, h, w, C]`` as x = ``x0``, f = ``fake_x0`` and r = ``real_x0``.

    The mean is taken per sample. A sample with x = r (0 / 0) has the gradient 0. NaN and infinity in a prediction stay
    in the result, so that training refuses the update; the published code replaces NaN by 0.
    """
    scale = jnp.mean(jnp.abs(x0 - real_x0), axis=tuple(range(1, x0.ndim)), keepdims=True)
    return jnp.where(scale == 0, 0.0, (fake_x0 - real_x0) / scale)


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
    """Return the student's loss ``0.5 mean (x - stopgrad(x - gradient))^2``. Its gradient reaches ``x0`` only.

    Args:
        x0: output of the student, ``[B, F, h, w, C]``.
        prompt_embeds: ``[B, S, E]``, read by both scores.
        negative_prompt_embeds: of the unconditional branches, ``[S, E]`` or ``[B, S, E]``.
        key: draws the timesteps and the noise.
        teacher: the real score, ``(x, timestep [B, F], prompt_embeds) -> velocity``.
        fake: the fake score, likewise; it is guided by ``fake_guidance_scale``, 1 in the paper.
        diffusion: the noise grid.
        distill: guidance scales and timestep range.
        mask: bool ``[B, F]``, the frames that the loss counts; None: all.
        timestep: ``[B, F]`` in [0, 1000], instead of drawn timesteps.
        noise: shape of ``x0``, instead of drawn noise. With both, no key is needed.
        levels: narrows the range in which the timesteps are drawn.
        experts: of a teacher of two networks, with a guidance scale for each.

    Returns:
        The scalar loss; the metrics ``loss``, mean ``gradient`` (absolute) and ``timestep``, with a mask ``weight``.

    Raises:
        ConfigError: neither a key nor both ``timestep`` and ``noise``, or noise or velocities of another shape.
    """
    x0 = x0.astype(jnp.float32)
    x = jax.lax.stop_gradient(x0)  # no gradient through the scores' inputs
    networks: dict[str, Any] = {"teacher": teacher, "fake": fake, "diffusion": diffusion, "distill": distill}
    draws: dict[str, Any] = {"timestep": timestep, "noise": noise, "levels": levels, "experts": experts}
    fake_x0, real_x0, timestep = scores.predictions(x, prompt_embeds, negative_prompt_embeds, key, **networks, **draws)
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
    """Return the fake score's loss ``mean (v_fake(x_t, t) - (noise - x))^2`` on the student's outputs x = ``x0``.

    Arguments and errors are those of :func:`generator_loss`. The trained parameters are inside ``fake``. The metrics
    are ``loss`` and, with a mask, ``weight``.
    """
    x = jax.lax.stop_gradient(x0.astype(jnp.float32))  # the student's output is data here
    x_t, timestep, _, noise = scores.noise_output(x, key, timestep, noise, diffusion, distill, levels)
    velocity = fake(x_t, timestep, prompt_embeds)
    checks.same_shape(x_t=x_t, velocity=velocity)
    loss = masked_mean(jnp.square(velocity.astype(jnp.float32) - flow.velocity_from(x, noise)), mask)
    return loss, {"loss": loss} | mask_weight(mask)
