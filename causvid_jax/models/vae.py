"""The causal video VAE of Wan2.1 (arXiv 2503.20314, section 4.1) and of Wan2.2-TI2V-5B, at any width.

The first frame of a video is one latent frame, and so is each later group of four, at an eighth of the height and
width. Encoder and decoder are causal in time. A stream can therefore be coded in chunks with a bounded cache, and the
result is equal to that of the whole clip.

Video [B, T, H, W, 3] in [-1, 1]; latents [B, F, H/8, W/8, C], T = 1 + 4 (F - 1), normalized per channel with
``config.latent_mean`` and ``config.latent_std``. The VAE of Wan2.2 is the same network on squares of 2 x 2 pixels, with
a parameter-free shortcut around every level (``config.is_residual``). Parameters are float32; ``config.dtype`` is the
compute type. The parameter tree mirrors the published one (``causvid_jax.checkpoints.wan_vae`` converts).

Source: ``wan/modules/vae.py`` of Wan2.1 and ``wan/modules/vae2_2.py`` of Wan2.2.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from causvid_jax.config import VAEConfig
from causvid_jax.models import conv
from causvid_jax.models import vae_layers as layers

Tree = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """State between two chunks of a decoded stream.

    Attributes:
        past: by layer, the last two input frames of every temporal convolution, [B, 2, h, w, C].
        start: bool scalar, whether the next chunk is the first of the video.
    """

    past: Tree
    start: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodeCache:
    """State between two chunks of an encoded stream.

    Attributes:
        past: by layer, the last two input frames of every temporal convolution, [B, 2, h, w, C] (one frame for temporal
            downsampling).
    """

    past: Tree


def time_factor(config: VAEConfig) -> int:
    """Return the pixel frames per latent frame after the first: 4 in Wan."""
    return 2 ** sum(config.temporal_downsample)


def encoder_layers(config: VAEConfig) -> tuple[tuple[str, int, int], ...]:
    """Return (kind, channels in, channels out) of ``encoder/downsamples``: residual, resample2d or resample3d."""
    plan, width = [], config.base_dim
    for level, mult in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            plan.append(("residual", width, config.base_dim * mult))
            width = config.base_dim * mult
        if level < len(config.temporal_downsample):
            plan.append((_resample(config.temporal_downsample[level]), width, width))
    return tuple(plan)


def decoder_layers(config: VAEConfig) -> tuple[tuple[str, int, int], ...]:
    """Return (kind, channels in, channels out) of ``decoder/upsamples``; resampling halves the channels in Wan2.1."""
    base = _decoder_base(config)
    plan, width = [], base * config.dim_mult[-1]
    for level, mult in enumerate(reversed(config.dim_mult)):
        for _ in range(config.num_res_blocks + 1):
            plan.append(("residual", width, base * mult))
            width = base * mult
        if level < len(config.temporal_downsample):
            kept = width if config.is_residual else width // 2
            plan.append((_resample(config.temporal_downsample[-1 - level]), width, kept))
            width = kept
    return tuple(plan)


def _decoder_base(config: VAEConfig) -> int:
    return config.decoder_base_dim or config.base_dim


def _level(index: int, layers_per_level: int, config: VAEConfig) -> tuple[int, bool, bool]:
    """Return the level of a numbered layer, and whether the layer is the first and the last one of it."""
    level, place = divmod(index, layers_per_level)
    ends = place == layers_per_level - 1 or (level == len(config.temporal_downsample) and place == layers_per_level - 2)
    return level, place == 0, ends


def abstract(config: VAEConfig) -> Tree:
    """Return the parameter tree as ``jax.ShapeDtypeStruct``.

    Kernels are [(kt,) kh, kw, in, out], ``bias`` and ``gamma`` [C].
    """
    z, first, last = config.z_dim, config.base_dim, config.base_dim * config.dim_mult[-1]
    pixels, wide = 3 * config.patch_size**2, _decoder_base(config) * config.dim_mult[-1]
    encoder_out, decoder_out = encoder_layers(config)[-1][2], decoder_layers(config)[-1][2]
    return {
        "encoder": {
            "conv1": _conv_spec(3, 3, 3, pixels, first),
            "downsamples": _stack_spec(encoder_layers(config), time_width=1),
            "middle": _middle_spec(last),
            "head": {"norm": _gamma(encoder_out), "conv": _conv_spec(3, 3, 3, encoder_out, 2 * z)},
        },
        "conv1": _conv_spec(1, 1, 1, 2 * z, 2 * z),
        "conv2": _conv_spec(1, 1, 1, z, z),
        "decoder": {
            "conv1": _conv_spec(3, 3, 3, z, wide),
            "middle": _middle_spec(wide),
            "upsamples": _stack_spec(decoder_layers(config), time_width=2),
            "head": {"norm": _gamma(decoder_out), "conv": _conv_spec(3, 3, 3, decoder_out, pixels)},
        },
    }


def init(key: jax.Array, config: VAEConfig) -> Tree:
    """Return random parameters: kernels N(0, 1/fan_in), biases 0, gammas 1.

    This preserves the variance of the signal. With the usual uniform +-1/sqrt(fan_in) for kernels *and* biases every
    convolution shrinks the signal to a third and adds a constant. The initial output of a deep narrow VAE then hardly
    depends on its input.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(abstract(config))
    leaves = []
    for (path, leaf), leaf_key in zip(flat, jax.random.split(key, len(flat)), strict=True):
        if path[-1].key == "kernel":
            scale = float(np.prod(leaf.shape[:-1])) ** -0.5
            leaves.append(scale * jax.random.normal(leaf_key, leaf.shape, leaf.dtype))
        else:
            leaves.append(jnp.full(leaf.shape, 1.0 if path[-1].key == "gamma" else 0.0, leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, leaves)


def encode_moments(
    params: Tree, video: Float[jax.Array, "B T H W 3"], *, config: VAEConfig
) -> tuple[Float[jax.Array, "B F h w C"], Float[jax.Array, "B F h w C"]]:
    """Return mean and log-variance of q(z | video), unnormalized: [B, 1 + 4n, H, W, 3] to [B, 1 + n, h, w, C] each.

    Raises:
        ConfigError: the frames are not 1 + 4n, or H or W is no multiple of ``config.space_factor``.
    """
    _check_video(video, config, starts=True)
    return _encoder(params, video, {}, config=config, starts=True)[0]


def encode(params: Tree, video: Float[jax.Array, "B T H W 3"], *, config: VAEConfig) -> Float[jax.Array, "B F h w C"]:
    """Return normalized latents (the mean): [B, 1 + 4n, H, W, 3] in [-1, 1] to [B, 1 + n, h, w, C], float32.

    Errors are those of :func:`encode_moments`.
    """
    return normalize(encode_moments(params, video, config=config)[0], config)


def decode(
    params: Tree, latents: Float[jax.Array, "B F h w C"], *, config: VAEConfig, clamp: bool = True
) -> Float[jax.Array, "B T H W 3"]:
    """Decode normalized latents: [B, F, h, w, C] to [B, 1 + 4 (F - 1), H, W, 3] float32, clamped to [-1, 1].

    Train with ``clamp=False``: a clamped pixel has no gradient.

    Raises:
        ConfigError: the latents have another shape.
    """
    conv.check_latents(latents.shape, config.z_dim)
    video, _ = _decoder(params, latents, {}, config=config, start=True)
    return jnp.clip(video, -1, 1) if clamp else video


def init_encode_cache(config: VAEConfig, *, batch: int, height: int, width: int) -> EncodeCache:
    """Return the cache before the first chunk of a video of ``height`` x ``width`` pixels."""
    video = jax.ShapeDtypeStruct((batch, 1 + time_factor(config), height, width, 3), jnp.float32)
    _check_video(video, config, starts=True)
    return EncodeCache(past=_zeros_like_past(_encoder, video, config, starts=True))


def encode_chunk(
    params: Tree, frames: Float[jax.Array, "B T H W 3"], cache: EncodeCache, *, config: VAEConfig, first: bool
) -> tuple[Float[jax.Array, "B n h w C"], EncodeCache]:
    """Encode the next frames of a video; the chunks together equal :func:`encode` of the whole video.

    Args:
        params: VAE parameters.
        frames: [B, 1 + 4n, H, W, 3] for the first chunk, [B, 4n, H, W, 3] for a later one.
        cache: from :func:`init_encode_cache` or the previous call.
        config: VAE sizes.
        first: static; whether this is the first chunk.

    Returns:
        latents [B, 1 + n or n, h, w, C] float32 and the next cache.

    Raises:
        ConfigError: the number of frames, or H or W, does not fit.
    """
    _check_video(frames, config, starts=first)
    (mean, _), past = _encoder(params, frames, {} if first else cache.past, config=config, starts=first)
    return normalize(mean, config), EncodeCache(past=past)


def init_decode_cache(config: VAEConfig, *, batch: int, height: int, width: int) -> DecodeCache:
    """Return the cache before the first chunk of a video whose latents are ``height`` x ``width``."""
    latents = jax.ShapeDtypeStruct((batch, 2, height, width, config.z_dim), jnp.float32)
    past = _zeros_like_past(_decoder, latents, config, start=True)
    return DecodeCache(past=past, start=jnp.array(True))


def decode_chunk(
    params: Tree, latents: Float[jax.Array, "B K h w C"], cache: DecodeCache, *, config: VAEConfig
) -> tuple[Float[jax.Array, "B T H W 3"], DecodeCache]:
    """Decode the next latents of a video; the output shape of the first chunk is that of all others.

    The first latent of a video has one frame, any other has four. Here every latent has four slots, but only the last
    slot of the first latent exists. The other three are set to zero before every temporal convolution, which equals the
    zero padding before a video. The caller drops the first three frames of the first chunk. All remaining frames
    together equal :func:`decode` of the whole video.

    Args:
        params: VAE parameters.
        latents: normalized, [B, K, h, w, C].
        cache: from :func:`init_decode_cache` or the previous call.
        config: VAE sizes.

    Returns:
        frames [B, 4K, H, W, 3] float32 in [-1, 1], and the next cache.

    Raises:
        ConfigError: the latents have another shape.
    """
    conv.check_latents(latents.shape, config.z_dim)
    frames, past = _decoder(params, latents, cache.past, config=config, start=cache.start)
    return jnp.clip(frames, -1, 1), DecodeCache(past=past, start=jnp.zeros_like(cache.start))


def normalize(mean: jax.Array, config: VAEConfig) -> jax.Array:
    """Return (mean - latent_mean) / latent_std over the channels [..., C]."""
    return (mean - jnp.asarray(config.latent_mean or 0.0)) / jnp.asarray(config.latent_std or 1.0)


def denormalize(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """Return latents * latent_std + latent_mean over the channels [..., C], the inverse of :func:`normalize`."""
    return latents * jnp.asarray(config.latent_std or 1.0) + jnp.asarray(config.latent_mean or 0.0)


def _encoder(params: Tree, video: jax.Array, past: Tree, *, config: VAEConfig, starts: bool) -> tuple[Any, Tree]:
    """Return ((mean, logvar) float32, new past)."""
    net = params["encoder"]
    new: Tree = {"downsamples": {}}
    x = layers.patchify(video.astype(config.dtype), config.patch_size)
    x, new["conv1"] = layers.causal(net["conv1"], x, past.get("conv1"), None)
    whole = x
    for i, (kind, _, width) in enumerate(encoder_layers(config)):
        level, begins, ends = _level(i, config.num_res_blocks + 1, config)
        whole = x if begins else whole
        layer, layer_past = net["downsamples"][str(i)], past.get("downsamples", {}).get(str(i), {})
        if kind == "residual":
            x, layer_past = layers.residual_block(layer, x, layer_past, None)
        else:
            x, layer_past = layers.downsample(layer, x, layer_past, starts=starts)
        if config.is_residual and ends:
            halves = (*config.temporal_downsample, False)[level], level < len(config.temporal_downsample)
            x += layers.average_down(whole, width, halves, starts=starts)
        new["downsamples"][str(i)] = layer_past
    x, new["middle"] = layers.middle(net["middle"], x, past.get("middle", {}), None)
    x, new["head"] = layers.head(net["head"], x, past.get("head"), None)
    mean, logvar = jnp.split(conv.pointwise(params["conv1"], x).astype(jnp.float32), 2, axis=-1)
    return (mean, logvar), new


def _decoder(
    params: Tree, latents: jax.Array, past: Tree, *, config: VAEConfig, start: bool | jax.Array
) -> tuple[Any, Tree]:
    """Return (video float32, new past); ``start`` is static True or traced, as in ``vae_layers.upsample``."""
    net = params["decoder"]
    new: Tree = {"upsamples": {}}
    slots, present = 1, None  # slots: frames per latent at this level
    x = conv.pointwise(params["conv2"], denormalize(latents, config).astype(config.dtype))
    x, new["conv1"] = layers.causal(net["conv1"], x, past.get("conv1"), None)
    x, new["middle"] = layers.middle(net["middle"], x, past.get("middle", {}), None)
    whole = x
    for i, (kind, _, width) in enumerate(decoder_layers(config)):
        level, begins, ends = _level(i, config.num_res_blocks + 2, config)
        whole = x if begins else whole
        layer, layer_past = net["upsamples"][str(i)], past.get("upsamples", {}).get(str(i), {})
        if kind == "residual":
            x, layer_past = layers.residual_block(layer, x, layer_past, present)
        else:
            x, layer_past = layers.upsample(layer, x, layer_past, start=start, frames=slots)
        if config.is_residual and ends and level < len(config.temporal_downsample):
            x += layers.copy_up(whole, width, config.temporal_downsample[-1 - level], starts=start is True)
        if kind == "resample3d":
            slots *= 2
            present = None if start is True else ~start | (jnp.arange(x.shape[1]) >= slots - 1)
        new["upsamples"][str(i)] = layer_past
    x, new["head"] = layers.head(net["head"], x, past.get("head"), present)
    return layers.unpatchify(x.astype(jnp.float32), config.patch_size), new


def _zeros_like_past(
    network: Callable[..., Any], inputs: jax.ShapeDtypeStruct, config: VAEConfig, **start: bool
) -> Tree:
    shapes = _past_shapes(network, inputs, config, **start)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@functools.lru_cache
def _past_shapes(network: Callable[..., Any], inputs: jax.ShapeDtypeStruct, config: VAEConfig, **start: bool) -> Tree:
    """Return the shapes of the past after ``inputs``; the trace is kept, because every stream needs it again."""
    return jax.eval_shape(lambda p, x: network(p, x, {}, config=config, **start), abstract(config), inputs)[1]


def _check_video(video: jax.Array | jax.ShapeDtypeStruct, config: VAEConfig, *, starts: bool) -> None:
    conv.check_video(video, time=time_factor(config), space=config.space_factor, starts=starts)


def _resample(in_time: bool) -> str:
    return "resample3d" if in_time else "resample2d"


def _conv_spec(*shape: int) -> Tree:
    return {
        "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
        "bias": jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
    }


def _gamma(width: int) -> Tree:
    return {"gamma": jax.ShapeDtypeStruct((width,), jnp.float32)}


def _residual_spec(inputs: int, outputs: int) -> Tree:
    spec = {
        "norm1": _gamma(inputs),
        "conv1": _conv_spec(3, 3, 3, inputs, outputs),
        "norm2": _gamma(outputs),
        "conv2": _conv_spec(3, 3, 3, outputs, outputs),
    }
    return spec | ({"shortcut": _conv_spec(1, 1, 1, inputs, outputs)} if inputs != outputs else {})


def _middle_spec(width: int) -> Tree:
    attention = {
        "norm": _gamma(width),
        "to_qkv": _conv_spec(1, 1, width, 3 * width),
        "proj": _conv_spec(1, 1, width, width),
    }
    return {"0": _residual_spec(width, width), "1": attention, "2": _residual_spec(width, width)}


def _stack_spec(plan: tuple[tuple[str, int, int], ...], *, time_width: int) -> Tree:
    stack = {}
    for i, (kind, inputs, outputs) in enumerate(plan):
        if kind == "residual":
            stack[str(i)] = _residual_spec(inputs, outputs)
        else:
            time = {"time_conv": _conv_spec(3, 1, 1, inputs, time_width * inputs)} if kind == "resample3d" else {}
            stack[str(i)] = {"conv": _conv_spec(3, 3, inputs, outputs)} | time
    return stack
