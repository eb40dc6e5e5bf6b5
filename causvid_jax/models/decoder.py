"""Decode latents to pixels while sampling, by the recipe's decoder: the Wan VAE or the tiny TAEHV.

Both read the same latents ``[B, K, h, w, C]``. K latent frames give 4K pixel frames, of which the caller drops the
first :data:`LEAD` of a video. ``params`` holds the weights under the decoder's name, ``{"vae"}`` or ``{"taehv"}``.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax

from causvid_jax.config import CLIPConfig, Recipe
from causvid_jax.models import clip_vision, taehv, vae
from causvid_jax.sharding.params import inference_tree

Params = dict[str, Any]
DecodeCache = vae.DecodeCache | taehv.DecodeCache

LEAD = 3
"""Frames of a video's first decoded block that do not exist: its first latent frame holds one frame, not four."""


def codec_shapes(recipe: Recipe, *, encodes: bool) -> dict[str, Any]:
    """Return shapes and types of the decoder's parameters; with ``encodes`` also those of the VAE, the only encoder."""
    shapes = vae_shapes(recipe) if recipe.decoder == "vae" or encodes else {}
    if recipe.decoder == "taehv":
        shapes["taehv"] = inference_tree(taehv.abstract(recipe.taehv), recipe.taehv.dtype)
    return shapes


def vae_shapes(recipe: Recipe) -> dict[str, Any]:
    """Return shapes and types of the VAE's parameters, ``{"vae"}``, for any decoder."""
    return {"vae": inference_tree(vae.abstract(recipe.vae), recipe.vae.dtype)}


def image_encoder_shapes(config: CLIPConfig) -> Any:
    """Return shapes and types of the image encoder's parameters."""
    return inference_tree(clip_vision.abstract(config), config.dtype)


def init_decode_cache(config: Recipe, *, batch: int, height: int, width: int) -> DecodeCache:
    """Return the decoder's cache before the first block of a video whose latents are ``height`` x ``width`` (h, w)."""
    size = {"batch": batch, "height": height, "width": width}
    if config.decoder == "taehv":
        return taehv.init_decode_cache(config.taehv, **size)
    return vae.init_decode_cache(config.vae, **size)


def decode_chunk(params: Params, latents: jax.Array, cache: Any, *, config: Recipe) -> tuple[jax.Array, DecodeCache]:
    """Return the pixel frames of the next latents ``[B, K, h, w, C]`` of a video, and the next cache.

    The frames are float32 ``[B, 4K, H, W, 3]`` in [-1, 1].

    Raises:
        ConfigError: the latents have another shape.
    """
    if config.decoder == "taehv":
        return taehv.decode_chunk(params["taehv"], latents, cache, config=config.taehv)
    return vae.decode_chunk(params["vae"], latents, cache, config=config.vae)


decode_next = functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))(decode_chunk)


def decode_clip(params: Params, latents: jax.Array, *, config: Recipe) -> Iterator[jax.Array]:
    """Yield the frames of a clip ``[B, F, h, w, C]`` in parts, float32 ``[B, n, H, W, 3]`` in [-1, 1].

    There are 1 + 4 (F - 1) frames. A part has the latent frames of a block of the stream if blocks divide the clip,
    else one. One program and the memory of one part then serve any length: 81 frames of 480 x 832 at once would be
    12 GB in the widest layer alone.
    """
    batch, frames, height, width, _ = latents.shape
    k = config.causal.frames_per_block
    k = k if frames % k == 0 else 1
    cache = init_decode_cache(config, batch=batch, height=height, width=width)
    for start in range(0, frames, k):
        part, cache = decode_next(params, latents[:, start : start + k], cache, config=config)
        yield part[:, LEAD:] if start == 0 else part
