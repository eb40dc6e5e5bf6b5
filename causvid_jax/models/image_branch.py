"""Image conditioning of the transformer (Wan2.1-I2V).

* **Condition channels.** The input also has the latents of a video (the image, then grey frames) and a mask of the
  known frames (:func:`image_condition`)::

      x = concatenate([noisy, image_condition(latents)], axis=-1)  # 16 + 4 + 16 channels in Wan2.1-I2V

* **Image tokens.** :func:`embed` maps ``image_embeds``, the output of CLIP's vision tower before its last layer
  (``models.clip_vision``: 257 tokens of width 1280), to the model width. Every layer attends to them in addition to the
  text (``transformer.block``).

Source: Wan2.1, ``wan/modules/model.py`` (``img_emb``) and ``wan/image2video.py`` (mask).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from causvid_jax.config import TransformerConfig, require
from causvid_jax.diffusion.guidance import per_branch
from causvid_jax.models.layers import Params, gelu_exact, layer_norm, mlp
from causvid_jax.sharding.params import linear_spec, norm_spec

EPS = 1e-5
"""Epsilon of the two norms of :func:`embed`; the transformer's other norms use ``config.eps``."""


def spec(config: TransformerConfig) -> dict[str, Any]:
    """Return the parameter specification of :func:`embed`."""
    width, dim = config.image_dim, config.dim
    return {
        "norm1": norm_spec(width, None),
        "fc1": linear_spec(width, width, (None, None)),
        "fc2": linear_spec(width, dim, (None, "embed")),
        "norm2": norm_spec(dim),
    }


def embed(p: Params, image_embeds: Float[jax.Array, "B I E"], config: TransformerConfig) -> Float[jax.Array, "B I M"]:
    """Return ``LN(fc2(gelu(fc1(LN(image_embeds)))))`` with the exact GELU: ``[B, I, image_dim]`` to ``[B, I, M]``."""
    hidden = mlp(p, layer_norm(image_embeds, EPS, p["norm1"]), gelu_exact, config.dtype)
    return layer_norm(hidden, EPS, p["norm2"])


def check(image_embeds: jax.Array | None, config: TransformerConfig) -> None:
    """Check that ``image_embeds`` has the shape that ``config`` requires (None without an image branch).

    Raises:
        ConfigError: the shape is another.
    """
    shape = None if image_embeds is None else image_embeds.shape
    if config.image_dim:
        fits = shape is not None and len(shape) == 3 and shape[1:] == (config.image_tokens, config.image_dim)
        accepted = f"[batch, {config.image_tokens}, {config.image_dim}]"
    else:
        fits, accepted = shape is None, "none (its config has image_dim = 0)"
    require(fits, f"image_embeds of shape {shape} do not fit this transformer; accepted: {accepted}")


class Picture(NamedTuple):
    """The picture that a video starts from, as networks with an image branch read it.

    Attributes:
        latents: condition channels of every latent frame (:func:`image_condition`), ``[B, F, h, w, 4 + C]``.
        embeds: CLIP's ``image_embeds``, ``[B, image_tokens, image_dim]``; None if the network reads none (Wan2.2-I2V).
    """

    latents: jax.Array
    embeds: jax.Array | None = None

    def channels(self, start: jax.Array | int, frames: int) -> jax.Array:
        """Return the condition channels of ``frames`` latent frames from ``start`` on, ``[B, frames, h, w, 4 + C]``.

        Frames after the last one have the channels of the last one: the video stays grey, and the mask zero.
        """
        index = jnp.minimum(start + jnp.arange(frames), self.latents.shape[1] - 1)
        return jnp.take(self.latents, index, axis=1)


def has_branch(config: TransformerConfig) -> bool:
    """Return whether a network reads a picture, by channels or by tokens."""
    return config.image_dim > 0 or config.image_channels > 0


def check_picture(picture: Picture | None, config: TransformerConfig, role: str) -> None:
    """Check that there is a picture if, and only if, the network ``role`` has an image branch.

    Raises:
        ConfigError: a picture is missing, is not read, or lacks embeds.
    """
    parts = (picture is not None, picture is not None and picture.embeds is not None)
    require(
        parts == (has_branch(config), config.image_dim > 0),
        f"the {role} has image_dim = {config.image_dim} and {config.image_channels} image channels; accepted: "
        + accepted(config),
    )


def beside(x: jax.Array, channels: jax.Array | None) -> jax.Array:
    """Return ``x [B, F, h, w, C]`` with the picture's ``channels`` appended; x itself if ``channels`` is None."""
    return x if channels is None else jnp.concatenate([x, channels.astype(x.dtype)], axis=-1)


def with_channels(x: jax.Array, picture: Picture | None, config: TransformerConfig, start: Any = 0) -> jax.Array:
    """Return ``x [B, F, h, w, C]`` with the picture's channels of its frames; x itself for a network without them.

    ``start`` is the latent frame at which x begins. x may have 2B examples, two for each picture
    (``diffusion.guidance``).
    """
    if picture is None or not config.image_channels:
        return x
    return beside(x, per_branch(picture.channels(start, x.shape[1]), x))


def conditioned(network: Callable[..., Any], picture: Picture | None, config: TransformerConfig) -> Callable[..., Any]:
    """Return ``network(params, x, timestep, prompt_embeds, clean=...)`` with ``picture`` as its condition.

    The returned function adds the picture's channels to ``x`` and to the clean copies, and passes the embeds on. A
    network without an image branch is returned unchanged.
    """
    if picture is None or not has_branch(config):
        return network

    def call(params: Any, x: jax.Array, timestep: jax.Array, prompt_embeds: jax.Array, **options: Any) -> jax.Array:
        embeds = () if picture.embeds is None or not config.image_dim else (per_branch(picture.embeds, x),)
        past = 0
        if options.get("clean") is not None:
            past = options["clean"].shape[1] - x.shape[1]
            options["clean"] = with_channels(options["clean"], picture, config)
        return network(params, with_channels(x, picture, config, past), timestep, prompt_embeds, *embeds, **options)

    return call


def accepted(config: TransformerConfig) -> str:
    """Return the inputs of a picture that a network needs, in words."""
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

    Raises:
        ConfigError: a known frame is outside the video.
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
