"""Encode a picture for the image branch of Wan2.1-I2V (``causvid_jax.sampling.teacher``).

``image_latents`` are two things: the latents of a video that has the picture as its first frame and grey frames after
it, and the mask of the known frame (``models.image_branch.image_condition``). ``image_embeds`` are CLIP's
(``models.clip_vision``). The published settings of image to video are the negative prompt
``configs.wan_14b.NEGATIVE_PROMPT_IMAGE``, a shift of 3 at 480p and of 5 at 720p, UniPC with 40 steps, and guidance 5.

Source: Wan2.1, ``wan/image2video.py``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import CLIPConfig, Recipe, require
from causvid_jax.models import clip_vision, image_branch, vae


@functools.partial(jax.jit, static_argnames=("config",))
def image_latents(params: Any, pictures: jax.Array, *, config: Recipe) -> jax.Array:
    """Return mask and normalised latents ``[B, F, h, w, 4 + C]`` of videos that start with ``pictures``.

    F is at least 2: frames of a stream after the last one have its channels, which must be grey. The padded video is
    encoded four frames at a time, with the memory of one chunk.

    Args:
        params: of the VAE.
        pictures: float ``[B, H, W, 3]`` in [-1, 1], of the recipe's size.

    Raises:
        ConfigError: pictures of another size.
    """
    video, coder = config.video, config.vae
    require(
        pictures.ndim == 4 and pictures.shape[1:] == (video.height, video.width, 3),
        f"pictures of shape {pictures.shape} do not fit; accepted: [batch, {video.height}, {video.width}, 3]",
    )
    batch = pictures.shape[0]
    cache = vae.init_encode_cache(coder, batch=batch, height=video.height, width=video.width)
    first, cache = vae.encode_chunk(params, pictures[:, None], cache, config=coder, first=True)
    grey = jnp.zeros((batch, vae.time_factor(coder), *pictures.shape[1:]), pictures.dtype)

    def chunk(cache: vae.EncodeCache, _: None) -> tuple[vae.EncodeCache, jax.Array]:
        latents, cache = vae.encode_chunk(params, grey, cache, config=coder, first=False)
        return cache, latents[:, 0]

    _, rest = jax.lax.scan(chunk, cache, length=max(video.latent_frames, 2) - 1)
    latents = jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)  # [B, F, h, w, C]
    return image_branch.image_condition(latents)


def picture_of(
    params: Any, whole: jax.Array, fitted: jax.Array, *, config: Recipe, clip: CLIPConfig | None
) -> image_branch.Picture:
    """Return the inputs of an image branch: condition channels of pictures and, with ``clip``, CLIP embeddings.

    Args:
        params: ``{"vae"}``, and ``"image_encoder"`` with ``clip``.
        whole: ``[B, H, W, 3]`` in [-1, 1] of any size, which CLIP reads.
        fitted: the same pictures in the recipe's size, which the VAE reads.
        clip: sizes of CLIP; None for networks that do not read it.

    Raises:
        ConfigError: ``fitted`` has another size than the recipe.
    """
    embeds = None if clip is None else image_embeds(params["image_encoder"], whole, config=clip)
    return image_branch.Picture(image_latents(params["vae"], fitted, config=config), embeds)


@functools.partial(jax.jit, static_argnames=("config",))
def image_embeds(params: Any, pictures: jax.Array, *, config: CLIPConfig) -> jax.Array:
    """Return CLIP's embeddings ``[B, tokens, width]`` of ``pictures [B, H, W, 3]`` in [-1, 1], of any size.

    They are the penultimate features of ViT-H/14 in the published models: 257 tokens of width 1280.
    """
    return clip_vision.encode(params, clip_vision.preprocess(pictures, config=config), config=config)
