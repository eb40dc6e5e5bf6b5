"""What image to video (Wan2.1-I2V) adds to the transformer.

* **Condition channels.** Beside the noisy latents the network reads the latents of a video that shows the image and is
  grey after it, and a mask that says which frames are given (:func:`image_condition`)::

      x = concatenate([noisy, image_condition(latents)], axis=-1)  # 16 + 4 + 16 channels in Wan2.1-I2V

* **Image tokens.** Rows of CLIP's vision tower (ViT-H/14: the class token and 256 patches, before the last layer, width
  1280) are embedded here and attended in every layer beside the text (``transformer.block``).

The vision tower is ``models.clip_vision``.

Source: Wan2.1, ``wan/modules/model.py`` (``img_emb``) and ``wan/image2video.py`` (mask).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import TransformerConfig, require
from causvid_jax.models.layers import Params, gelu_exact, layer_norm, mlp
from causvid_jax.sharding.params import ParamSpec, linear_spec

EPS = 1e-5
"""Of the two norms here. The transformer's own is ``config.eps``."""


def spec(config: TransformerConfig) -> dict[str, Any]:
    """Parameters of :func:`embed`."""
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


def embed(p: Params, image: jax.Array, config: TransformerConfig) -> jax.Array:
    """``LN(fc2(gelu(fc1(LN(image)))))`` with the exact GELU: image rows ``[B, I, image_dim]`` to ``[B, I, M]``."""
    hidden = mlp(p, layer_norm(image, EPS, p["norm1"]), gelu_exact, config.dtype)
    return layer_norm(hidden, EPS, p["norm2"])


def check(image: jax.Array | None, config: TransformerConfig) -> None:
    """Refuse image rows that a transformer of ``config`` does not read, and their absence where it needs them."""
    shape = None if image is None else image.shape
    if config.image_dim:
        fits = shape is not None and len(shape) == 3 and shape[1:] == (config.image_tokens, config.image_dim)
        accepted = f"[batch, {config.image_tokens}, {config.image_dim}]"
    else:
        fits, accepted = shape is None, "none (its config has image_dim = 0)"
    require(fits, f"image rows of shape {shape} do not fit this transformer; accepted: {accepted}")


def image_condition(latents: jax.Array, *, given: Sequence[int] = (0,)) -> jax.Array:
    """The condition channels ``[B, F, h, w, 4 + C]`` of a video of which some frames are given: mask, then latents.

    The mask is one where a pixel frame is given. A latent frame has a channel for each of its four pixel frames; the
    first latent frame holds pixel frame 0 alone, which counts four times. So for a given first image the mask is one
    in all channels of the first latent frame and zero everywhere else.

    Args:
        latents: ``[B, F, h, w, C]``, normalised, of a video that shows the given frames and zeros (grey) elsewhere.
        given: static; pixel frames that are given, each in 0 ... 4 (F - 1).
    """
    batch, frames, height, width, _ = latents.shape
    last = 4 * (frames - 1)
    require(
        all(0 <= frame <= last for frame in given),
        f"given frames are {tuple(given)}; a video of {frames} latent frames has pixel frames 0 to {last}",
    )
    mask = np.zeros((frames, 4), np.float32)
    for frame in given:
        if frame == 0:
            mask[0] = 1
        else:
            mask[1 + (frame - 1) // 4, (frame - 1) % 4] = 1
    spread = jnp.broadcast_to(mask[None, :, None, None].astype(latents.dtype), (batch, frames, height, width, 4))
    return jnp.concatenate([spread, latents], axis=-1)
