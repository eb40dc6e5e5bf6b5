"""The tiny video autoencoder TAEHV for Wan2.1 latents (``taew2_1``), at any width.

A small convolutional replacement of the Wan VAE (``causvid_jax.models.vae``) with the same latents and functions, so a
stream can be decoded by either. It has 11 million parameters instead of 127 million and loses some detail. Three layers
connect frames:

* a memory block combines a frame with the previous one (zero before the first):
  ``y[t] = relu(x[t] + f(x[t], x[t - 1]))``, where f is three convolutions;
* ``pool`` maps s frames to one and ``grow`` maps one frame to s, each by one matrix over the channels of all s frames.

Video is [B, T, H, W, 3] in [-1, 1]; the published network uses [0, 1]. Latents [B, F, H/8, W/8, C] are normalized, as
in the diffusion transformer.

The decoder outputs four frames per latent. The first latent of a Wan video has one frame, so the first three output
frames of a video are dropped, as with ``vae.decode_chunk``. In the encoder latent i depends on the video up to frame
4i + 3, and an incomplete last group is padded with copies of its last frame.

Source: https://github.com/madebyollin/taehv (``causvid_jax.checkpoints.taehv`` reads its files). Parameters are
float32; ``config.dtype`` is the compute type.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Float

from causvid_jax.config import TAEHVConfig
from causvid_jax.models import conv
from causvid_jax.sharding.params import ParamSpec, abstract_tree, init_tree

Tree = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """State between two chunks of a decoded stream.

    Attributes:
        past: by level and block, the last input frame of every memory block, [B, 1, h, w, C]; zero before a video.
    """

    past: Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodeCache:
    """State between two chunks of an encoded stream; ``past`` is as in :class:`DecodeCache`."""

    past: Tree


def time_factor(config: TAEHVConfig) -> int:
    """Return the pixel frames per latent frame: 4 in ``taew2_1``."""
    return 2 ** sum(config.temporal_upsample)


def space_factor(config: TAEHVConfig) -> int:
    """Return the pixels per latent position along height and width: 8 in ``taew2_1``."""
    return 2 ** len(config.temporal_upsample)


# ---- parameters -----------------------------------------------------------------------------------------------------


def spec(config: TAEHVConfig) -> Tree:
    """Return shape and initializer of every parameter: kernels [kh, kw, in, out], ``bias`` [out]; levels in order."""
    width, dims = config.encoder_dim, config.decoder_dims
    return {
        "encoder": {
            "conv_in": _conv_spec(3, 3, width),
            "levels": {
                str(i): {
                    "pool": _conv_spec(1, _slots(in_time) * width, width, bias=False, gain=2.0),
                    "conv": _conv_spec(3, width, width, bias=False),
                    "blocks": _blocks_spec(width, config.blocks),
                }
                for i, in_time in enumerate(config.temporal_downsample)
            },
            "conv_out": _conv_spec(3, width, config.z_dim, gain=2.0),
        },
        "decoder": {
            "conv_in": _conv_spec(3, config.z_dim, dims[0]),
            "levels": {
                str(i): {
                    "blocks": _blocks_spec(dims[i], config.blocks),
                    "grow": _conv_spec(1, dims[i], _slots(in_time) * dims[i], bias=False, gain=2.0),
                    "conv": _conv_spec(3, dims[i], dims[i + 1], bias=False),
                }
                for i, in_time in enumerate(config.temporal_upsample)
            },
            "conv_out": _conv_spec(3, dims[-1], 3, gain=0.5),
        },
    }


def init(key: jax.Array, config: TAEHVConfig) -> Tree:
    """Return new parameters: kernels of variance gain / fan_in, zero biases.

    The gain is 2 after a ReLU, 0.1 at the end of a residual block, otherwise 1, which preserves the scale. It is 0.5
    for the decoder's last kernel, so that the initial output is nearly black. If the initial output is strong noise,
    the first updates remove it by driving ReLUs to zero, and a narrow decoder then never recovers from black output.
    """
    return init_tree(key, spec(config))


def abstract(config: TAEHVConfig) -> Tree:
    """Return the ``jax.ShapeDtypeStruct`` of every parameter."""
    return abstract_tree(spec(config))


def _slots(in_time: bool) -> int:
    return 2 if in_time else 1


def _conv_spec(size: int, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> Tree:
    normal = nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal")
    kernel = ParamSpec((size, size, inputs, outputs), (None, None, None, None), normal)
    return {"kernel": kernel} | ({"bias": ParamSpec((outputs,), (None,), nn.initializers.zeros)} if bias else {})


def _blocks_spec(width: int, count: int) -> Tree:
    def block() -> Tree:
        return {
            "conv1": _conv_spec(3, 2 * width, width, gain=2.0),
            "conv2": _conv_spec(3, width, width, gain=2.0),
            "conv3": _conv_spec(3, width, width, gain=0.1),
        }

    return {str(i): block() for i in range(count)}


# ---- encoding -------------------------------------------------------------------------------------------------------


def encode(
    params: Tree, video: Float[jax.Array, "B T H W channels"], *, config: TAEHVConfig
) -> Float[jax.Array, "B F h w C"]:
    """Encode a whole video: [B, T, H, W, 3] in [-1, 1] to [B, ceil(T / 4), h, w, C], float32.

    A video of 1 + 4n frames has 1 + n latents, as with the Wan VAE. Copies of the last frame complete the last group,
    as in the published code.

    Raises:
        ConfigError: the video has another shape, or H or W is no multiple of 8 (:func:`space_factor`).
    """
    padding = -video.shape[1] % time_factor(config)
    video = jnp.concatenate([video, repeat(video[:, -1:], "b 1 h w c -> b t h w c", t=padding)], axis=1)
    _check_video(video, config)
    return _encoder(params, video, {}, config=config)[0]


def init_encode_cache(config: TAEHVConfig, *, batch: int, height: int, width: int) -> EncodeCache:
    """Return the cache before the first chunk of a video of ``height`` x ``width`` pixels."""
    video = jax.ShapeDtypeStruct((batch, time_factor(config), height, width, 3), jnp.float32)
    _check_video(video, config)
    return EncodeCache(past=_zero_past(_encoder, video, config))


def encode_chunk(
    params: Tree, frames: Float[jax.Array, "B T H W channels"], cache: EncodeCache, *, config: TAEHVConfig
) -> tuple[Float[jax.Array, "B n h w C"], EncodeCache]:
    """Encode the next 4n frames of a video; the chunks together equal :func:`encode` of the whole video.

    Unlike in ``vae.encode_chunk`` the first chunk also has 4n frames, because the first latent depends on four.

    Args:
        params: parameters.
        frames: [B, 4n, H, W, 3] in [-1, 1].
        cache: from :func:`init_encode_cache` or the previous call.
        config: sizes.

    Returns:
        latents [B, n, h, w, C] float32 and the next cache.

    Raises:
        ConfigError: the frames have another shape, another size than a multiple of 8, or are not 4n.
    """
    _check_video(frames, config)
    latents, past = _encoder(params, frames, cache.past, config=config)
    return latents, EncodeCache(past=past)


def _encoder(params: Tree, video: jax.Array, past: Tree, *, config: TAEHVConfig) -> tuple[jax.Array, Tree]:
    net, new = params["encoder"], {}
    x = (video.astype(jnp.float32) + 1) / 2
    x = jax.nn.relu(conv.conv2d(net["conv_in"], x.astype(config.dtype)))
    for i, in_time in enumerate(config.temporal_downsample):
        level = net["levels"][str(i)]
        x = conv.pointwise(level["pool"], rearrange(x, "b (t s) h w c -> b t h w (s c)", s=_slots(in_time)))
        x = conv.conv2d(level["conv"], x, stride=2)
        x, new[str(i)] = _memory_blocks(level["blocks"], x, past.get(str(i), {}))
    return conv.conv2d(net["conv_out"], x).astype(jnp.float32), new


# ---- decoding -------------------------------------------------------------------------------------------------------


def decode(
    params: Tree, latents: Float[jax.Array, "B F h w C"], *, config: TAEHVConfig, clamp: bool = True
) -> Float[jax.Array, "B T H W 3"]:
    """Decode the latents of a whole clip: [B, F, h, w, C] to [B, 1 + 4 (F - 1), H, W, 3] float32, clamped to [-1, 1].

    Train with ``clamp=False``: a clamped pixel has no gradient.

    Raises:
        ConfigError: the latents have another shape.
    """
    conv.check_latents(latents.shape, config.z_dim)
    video = _decoder(params, latents, {}, config=config)[0][:, time_factor(config) - 1 :]
    return jnp.clip(video, -1, 1) if clamp else video


def init_decode_cache(config: TAEHVConfig, *, batch: int, height: int, width: int) -> DecodeCache:
    """Return the cache before the first chunk of a video whose latents are ``height`` x ``width``."""
    latents = jax.ShapeDtypeStruct((batch, 1, height, width, config.z_dim), jnp.float32)
    return DecodeCache(past=_zero_past(_decoder, latents, config))


def decode_chunk(
    params: Tree, latents: Float[jax.Array, "B K h w C"], cache: DecodeCache, *, config: TAEHVConfig
) -> tuple[Float[jax.Array, "B T H W 3"], DecodeCache]:
    """Decode the next latents of a video; the output shape of the first chunk is that of all others.

    As with ``vae.decode_chunk`` the caller drops the first three frames of the first chunk. All remaining frames
    together equal :func:`decode` of the whole video.

    Args:
        params: parameters.
        latents: normalized, [B, K, h, w, C].
        cache: from :func:`init_decode_cache` or the previous call.
        config: sizes.

    Returns:
        frames [B, 4K, H, W, 3] float32 in [-1, 1], and the next cache.

    Raises:
        ConfigError: the latents have another shape.
    """
    conv.check_latents(latents.shape, config.z_dim)
    frames, past = _decoder(params, latents, cache.past, config=config)
    return jnp.clip(frames, -1, 1), DecodeCache(past=past)


def _decoder(params: Tree, latents: jax.Array, past: Tree, *, config: TAEHVConfig) -> tuple[jax.Array, Tree]:
    net, new = params["decoder"], {}
    x = 3 * jnp.tanh(latents.astype(jnp.float32) / 3)  # limits the latents to the training range (-3, 3)
    x = jax.nn.relu(conv.conv2d(net["conv_in"], x.astype(config.dtype)))
    for i, in_time in enumerate(config.temporal_upsample):
        level = net["levels"][str(i)]
        x, new[str(i)] = _memory_blocks(level["blocks"], x, past.get(str(i), {}))
        # The published order is upsample, then `grow`. `grow` is pointwise, so it commutes with nearest upsampling and
        # is cheaper before it (a quarter of the positions).
        x = conv.pointwise(level["grow"], x)
        x = rearrange(x, "b t h w (s c) -> b (t s) h w c", s=_slots(in_time))
        x = conv.upsampled_conv2d(level["conv"], x)
    x = conv.conv2d(net["conv_out"], jax.nn.relu(x)).astype(jnp.float32)
    return 2 * x - 1, new


# ---- both -----------------------------------------------------------------------------------------------------------


def _memory_blocks(params: Tree, x: jax.Array, past: Tree) -> tuple[jax.Array, Tree]:
    """Apply all memory blocks of a level to x [B, T, h, w, C]; ``past`` {} means zeros."""
    new = {}
    for i in map(str, range(len(params))):
        previous = past[i].astype(x.dtype) if i in past else jnp.zeros_like(x[:, :1])
        new[i] = x[:, -1:]
        y = jnp.concatenate([x, jnp.concatenate([previous, x[:, :-1]], axis=1)], axis=-1)
        y = jax.nn.relu(conv.conv2d(params[i]["conv1"], y))
        y = jax.nn.relu(conv.conv2d(params[i]["conv2"], y))
        x = jax.nn.relu(conv.conv2d(params[i]["conv3"], y) + x)
    return x, new


def _zero_past(network: Callable[..., Any], inputs: jax.ShapeDtypeStruct, config: TAEHVConfig) -> Tree:
    _, past = jax.eval_shape(lambda p, x: network(p, x, {}, config=config), abstract(config), inputs)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), past)


def _check_video(video: jax.Array | jax.ShapeDtypeStruct, config: TAEHVConfig) -> None:
    conv.check_video(video, time=time_factor(config), space=space_factor(config), starts=False)
