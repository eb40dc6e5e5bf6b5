"""The teacher's sampler: solve the guided ODE of a whole clip in many steps, from text or from text and a picture.

With an image branch (Wan2.1-I2V) the network reads the picture in two forms: ``image_latents`` are additional input
channels, and it attends to ``image_embeds`` as to text (:mod:`causvid_jax.sampling.image_to_video`). Both are the same
in the conditional and the unconditional branch and in every step::

    x = concatenate([x_t, image_latents])   [B, F, h, w, 16 + 4 + 16]
    v = v(x, t, negative, embeds) + g (v(x, t, prompt, embeds) - v(x, t, negative, embeds))

Wan2.2-A14B has two networks, chosen by t, each with its own g (:mod:`causvid_jax.models.experts`). Its image-to-video
model reads only ``image_latents``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import Recipe, require
from causvid_jax.diffusion import guidance, solvers
from causvid_jax.models import experts, image_branch
from causvid_jax.sampling import schedule, stream
from causvid_jax.sampling.state import check_text


def clip_noise(seeds: jax.Array, config: Recipe) -> jax.Array:
    """Return noise ``[B, F, h, w, C]`` for uint32 ``seeds [B]``, drawn as for a first block of F latent frames."""
    return stream.block_noise(seeds, jnp.int32(0), jnp.int32(0), config.latent_shape)


def guided_velocity(
    params: Any,
    prompt_embeds: jax.Array,
    negative_prompt_embeds: jax.Array,
    image_embeds: jax.Array | None = None,
    image_latents: jax.Array | None = None,
    *,
    config: Recipe,
) -> solvers.VelocityFn:
    """Return the guided velocity as a function ``(x, timestep [B, F])`` of the noisy latents.

    Args:
        params: of the teacher, or of its two experts by name (``models.experts``).
        prompt_embeds, negative_prompt_embeds: ``[B, S, E]``; the second may be ``[S, E]``.
        image_embeds, image_latents: ``[B, tokens, width]`` and ``[B, F, h, w, 4 + C]``, with an image branch only.
        config: the recipe, which gives the guidance scale g (of each expert).

    Raises:
        ConfigError: a picture for a teacher without an image branch, or none for one with it.
    """
    net = config.teacher
    picture = None if image_latents is None else image_branch.Picture(image_latents, image_embeds)
    image_branch.check_picture(picture, net, "teacher")
    velocity = functools.partial(
        image_branch.conditioned(experts.bidirectional, picture, net), params, config=net, experts=config.experts
    )
    return guide_teacher(velocity, prompt_embeds, negative_prompt_embeds, config)


def guide_teacher(
    velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    prompt_embeds: jax.Array,
    negative_prompt_embeds: jax.Array,
    config: Recipe,
) -> solvers.VelocityFn:
    """Return the teacher's ``velocity(x, timestep, prompt_embeds)`` guided as ``diffusion`` and ``experts`` say."""
    diffusion, low, boundary = config.diffusion, config.experts.low_noise_guidance_scale, config.experts.boundary
    scales = diffusion.guidance_scale, low, boundary, diffusion.guidance_interval

    def guided(x: jax.Array, timestep: jax.Array) -> jax.Array:
        scale, eta = guidance.scale_at(timestep, *scales), diffusion.guidance_eta
        return guidance.guided_velocity(velocity, x, timestep, prompt_embeds, negative_prompt_embeds, scale, eta)

    return guided


@schedule.jit_sampler
def sample_clip(
    params: Any,
    prompt_embeds: jax.Array,
    negative_prompt_embeds: jax.Array,
    image_embeds: jax.Array | None = None,
    image_latents: jax.Array | None = None,
    *,
    config: Recipe,
    seeds: jax.Array | None = None,
    noise: jax.Array | None = None,
    timesteps: Sequence[float] | None = None,
) -> jax.Array:
    """Sample clips by solving the guided ODE ``dx / dsigma = v(x, 1000 sigma)`` from noise to sigma 0, in one program.

    v is :func:`guided_velocity`; the solver is ``diffusion.solver`` (:mod:`causvid_jax.diffusion.solvers`), with
    ``diffusion.num_inference_steps`` steps on the shifted grid.

    Args:
        params: of the teacher, or of its two experts by name (``models.experts``).
        prompt_embeds: ``[B, S, E]``.
        negative_prompt_embeds: ``[B, S, E]`` or ``[S, E]``.
        image_embeds: CLIP's ``[B, tokens, width]``, for a teacher that reads them.
        image_latents: mask and latents of the picture, ``[B, F, h, w, 4 + C]``, for a teacher with an image branch.
        seeds: uint32 ``[B]``, one per clip.
        noise: ``[B, F, h, w, C]`` instead of ``seeds``.
        timesteps: descending in [0, 1000], one per step, instead of the recipe's grid; the solver ends at 0. They are
            part of the program. UniPC needs them below 1000.

    Returns:
        Clean latents ``[B, F, h, w, C]``.

    Raises:
        ConfigError: embeddings of another shape, both or neither of ``seeds`` and ``noise``, not one per prompt,
            timesteps that are above 1000 or that the solver refuses, a picture for a teacher without an image branch,
            or none for one with it.
    """
    check_text(prompt_embeds, config)
    require((seeds is None) != (noise is None), "a teacher's clip takes either seeds or noise")
    if seeds is not None:
        whole = isinstance(seeds, jax.Array) and seeds.ndim == 1 and jnp.issubdtype(seeds.dtype, jnp.integer)
        require(whole, "seeds must be an array of whole numbers [B], such as jnp.uint32([0, 1])")
        noise = clip_noise(seeds, config)
    assert noise is not None
    require(
        len(noise) == len(prompt_embeds),
        f"{len(noise)} seeds or clips of noise are given for {len(prompt_embeds)} prompts; they must be equally many",
    )
    require(
        timesteps is None or max(timesteps, default=0) <= 1000,
        f"timesteps are {timesteps}; they must be at most 1000",
    )
    velocity = guided_velocity(
        params, prompt_embeds, negative_prompt_embeds, image_embeds, image_latents, config=config
    )
    # The published Wan sampler passes whole timesteps to the network.
    integer = config.teacher.precision == "wan"
    if timesteps is None:
        return solvers.solve(config.diffusion, velocity, noise, integer_timesteps=integer)
    sigmas = np.asarray([*timesteps, 0.0], np.float64) / 1000.0
    if config.diffusion.solver == "euler":
        return solvers.euler(velocity, noise, sigmas)
    return solvers.unipc(velocity, noise, sigmas, integer_timesteps=integer)
