"""Image conditioning of the transformer (Wan2.1-I2V).

* **Condition channels.** The input also has the latents of a video (the image, then grey frames) and a mask of the
  known frames (:func:`image_condition`)::

      x = concatenate([noisy, image_condition(latents)], axis=-1)  # 16 + 4 + 16 channels in Wan2.1-I2V

* **Image tokens.** :func:`embed` maps ``image_embeds``, the output of CLIP's vision tower before its last layer
  (``models.clip_vision``: 257 tokens of width 1280), to the model width. Every layer attends to them in addition to the
  text (``transformer.block``).

Source: Wan2.1, ``wan/modules/model.py`` (``img_emb``) and ``wan/image2video.py`` (mask).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from causvid_jax.config import TransformerConfig, require
from causvid_jax.models.layers import Params, gelu_exact, layer_norm, mlp
from causvid_jax.sharding.params import ParamSpec, linear_spec

EPS = 1e-5
"""Epsilon of the two norms of :func:`embed`; the transformer's other norms use ``config.eps``."""


def spec(config: TransformerConfig) -> dict[str, Any]:
    """Return the parameter specification of :func:`embed`."""
    width, dim = config.image_dim, config.dim

    def norm(size: int, axis: str | None) -> dict[str, ParamSpec]:
        return {
            "scale": ParamSpec((size,), (axis,), nn.initializers.ones),
            "bias": ParamSpec((size,), (axis,), nn.initializers.zeros),
        }

    return {
        "norm1": norm(width, None),
        "fc1": linear_spec(width, width, (None, None)),
        "fc2": linear_spec(width, dim, (None, "embed")),
        "norm2": norm(dim, "embed"),
    }


def embed(p: Params, image_embeds: Float[jax.Array, "B I E"], config: TransformerConfig) -> Float[jax.Array, "B I M"]:
    """Return ``LN(fc2(gelu(fc1(LN(image_embeds)))))`` with the exact GELU: ``[B, I, image_dim]`` to ``[B, I, M]``."""
    hidden = mlp(p, layer_norm(image_embeds, EPS, p["norm1"]), gelu_exact, config.dtype)
    return layer_norm(hidden, EPS, p["norm2"])


def check(image_embeds: jax.Array | None, config: TransformerConfig) -> None:
    """Raise ConfigError unless ``image_embeds`` has the shape that ``config`` requires (None without image branch)."""
    shape = None if image_embeds is None else image_embeds.shape
    if config.image_dim:
        fits = shape is not None and len(shape) == 3 and shape[1:] == (config.image_tokens, config.image_dim)
        accepted = f"[batch, {config.image_tokens}, {config.image_dim}]"
    else:
        fits, accepted = shape is None, "none (its config has image_dim = 0)"
    require(fits, f"image_embeds of shape {shape} do not fit this transformer; accepted: {accepted}")


def accepted(config: TransformerConfig) -> str:
    """Return what a network needs of a picture, in words."""
    if config.image_dim:
        return "image_embeds and image_latents"
    return "image_latents alone" if config.image_channels else "no image; image to video needs an image branch"


def image_condition(
    latents: Float[jax.Array, "B F h w C"], *, known_frames: Sequence[int] = (0,)
) -> Float[jax.Array, "B F h w D"]:
    """Return the condition channels ``[B, F, h, w, 4 + C]`` of a partly known video: mask, then latents.

    The mask is one for known pixel frames. A latent frame has one mask channel for each of its four pixel frames. The
    first latent frame holds only pixel frame 0, repeated in all four channels. For a known first image the mask is
    therefore one in the first latent frame and zero elsewhere.

    Args:
        latents: normalized latents of a video of the known frames, with zeros (grey) elsewhere.
        known_frames: static indices of the known pixel frames, each in 0 ... 4 (F - 1).
    """
    batch, frames, height, width, _ = latents.shape
    last = 4 * (frames - 1)
    require(
        all(0 <= frame <= last for frame in known_frames),
        f"known_frames are {tuple(known_frames)}; a video of {frames} latent frames has pixel frames 0 to {last}",
    )
    mask = np.zeros((frames, 4), np.float32)
    for frame in known_frames:
        if frame == 0:
            mask[0] = 1
        else:
            mask[1 + (frame - 1) // 4, (frame - 1) % 4] = 1
    mask_channels = jnp.broadcast_to(mask[None, :, None, None].astype(latents.dtype), (batch, frames, height, width, 4))
    return jnp.concatenate([mask_channels, latents], axis=-1)
