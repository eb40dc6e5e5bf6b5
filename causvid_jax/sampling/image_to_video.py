"""A video from a picture with the bidirectional model of Wan2.1-I2V: what it is given, and its sampler.

Beside the prompt the network is given the picture twice. Its *condition*, in the channels beside the noisy latents, is
the latents of a video that shows the picture once and is grey after it, and a mask of the one frame that counts
(``models.image_branch.image_condition``). Its *image rows*, attended beside the text, are CLIP's
(``models.clip_vision``). Both are the same in the guided and in the unguided branch, and in every step::

    x = concatenate([x_t, condition])   [B, F, h, w, 16 + 4 + 16]
    v = v(x, t, null prompt, rows) + g (v(x, t, prompt, rows) - v(x, t, null prompt, rows))

The published null prompt of image to video is ``configs.wan_14b.NEGATIVE_PROMPT_IMAGE``, its grid has a shift of 3 at
480p and of 5 at 720p, its solver is UniPC with 40 steps, its guidance 5.

Source: Wan2.1, ``wan/image2video.py``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import CLIPConfig, Recipe, require
from causvid_jax.diffusion import guidance, solvers
from causvid_jax.models import clip_vision, image_branch, transformer, vae
from causvid_jax.sampling import teacher


@functools.partial(jax.jit, static_argnames=("config",))
def condition(params: Any, pictures: jax.Array, *, config: Recipe) -> jax.Array:
    """The condition of videos that start with ``pictures``.

    The padded video is encoded four frames at a time, so that the memory is that of a chunk.

    Args:
        params: of the VAE.
        pictures: ``[B, H, W, 3]`` in [-1, 1], of the recipe's size.
        config: the recipe.

    Returns:
        ``[B, F, h, w, 4 + C]``: mask, then normalised latents.
    """
    video, coder = config.video, config.vae
    _check_pictures(pictures, (video.height, video.width))
    batch = pictures.shape[0]
    cache = vae.init_encode_cache(coder, batch=batch, height=video.height, width=video.width)
    first, cache = vae.encode_chunk(params, pictures[:, None], cache, config=coder, first=True)
    grey = jnp.zeros((batch, vae.time_factor(coder), *pictures.shape[1:]), pictures.dtype)

    def chunk(cache, _):
        latents, cache = vae.encode_chunk(params, grey, cache, config=coder, first=False)
        return cache, latents[:, 0]

    _, rest = jax.lax.scan(chunk, cache, length=video.latent_frames - 1)
    latents = jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)  # [B, F, h, w, C]
    return image_branch.image_condition(latents)


@functools.partial(jax.jit, static_argnames=("config",))
def image_rows(params: Any, pictures: jax.Array, *, config: CLIPConfig) -> jax.Array:
    """CLIP's rows ``[B, tokens, width]`` of ``pictures`` ``[B, H, W, 3]`` in [-1, 1], of any size."""
    return clip_vision.encode(params, clip_vision.preprocess(pictures, config=config), config=config)


def guided_velocity(
    params: Any, rows: jax.Array, null_rows: jax.Array, image: jax.Array, given: jax.Array, *, config: Recipe
) -> solvers.VelocityFn:
    """The teacher's guided velocity as a function ``(x, timestep [B, F])`` of the noisy latents alone.

    Args:
        params: of the teacher.
        rows, null_rows: text of the prompts ``[B, S, E]`` and of the null prompt, ``[S, E]`` or ``[B, S, E]``.
        image: image rows ``[B, tokens, width]``.
        given: ``[B, F, h, w, 4 + C]`` of :func:`condition`.
        config: the recipe, whose teacher has an image branch.
    """
    require(
        config.teacher.image_dim > 0, "the teacher has image_dim = 0; image to video needs one with an image branch"
    )

    def velocity(x, timestep, text):
        picture = guidance.per_branch(image, x)
        x = jnp.concatenate([x, guidance.per_branch(given, x).astype(x.dtype)], axis=-1)
        return transformer.bidirectional(params, x, timestep, text, picture, config=config.teacher)

    def guided(x, timestep):
        return guidance.guided_velocity(velocity, x, timestep, rows, null_rows, config.diffusion.guidance_scale)

    return guided


@functools.partial(jax.jit, static_argnames=("config",))
def teacher_latents(
    params: Any,
    rows: jax.Array,
    null_rows: jax.Array,
    image: jax.Array,
    given: jax.Array,
    seeds: jax.Array,
    *,
    config: Recipe,
) -> jax.Array:
    """The whole guided ODE in one program, as ``sampling.batch.teacher_latents`` without a picture.

    Args:
        params, rows, null_rows, image, given: as in :func:`guided_velocity`.
        seeds: uint32 ``[B]``, one per clip; the noise is that of text to video.
        config: the recipe.

    Returns:
        latents ``[B, F, h, w, C]``.
    """
    guided = guided_velocity(params, rows, null_rows, image, given, config=config)
    return teacher.solve_clip(guided, seeds, config=config)


def _check_pictures(pictures: jax.Array, size: tuple[int, int]) -> None:
    require(
        pictures.ndim == 4 and pictures.shape[1:] == (*size, 3),
        f"pictures of shape {pictures.shape} do not fit the recipe; accepted: [batch, {size[0]}, {size[1]}, 3]",
    )
