"""Convolutions of the video VAE: channels-last, with an explicit cache of past frames.

A causal convolution reads the current frame and the two previous ones. ``past`` holds those two; it is zero at the
start of a video. Two methods compute the same sum, and the faster one depends on the platform. ``"volume"`` is one 3-D
convolution. ``"taps"`` is one 2-D convolution of three frames concatenated in the channels: on CPU, XLA's 3-D
convolution is several times slower than its 2-D one.

Source: ``CausalConv3d`` of Wan2.1, ``wan/modules/vae.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Float

from causvid_jax.config import require
from causvid_jax.models.layers import dot_precision
from causvid_jax.sharding import constraints

Params = dict[str, jax.Array]


def conv2d(
    params: Params, x: Float[jax.Array, "B T H W C"], *, stride: int = 1, padding: tuple[int, int] = (1, 1)
) -> Float[jax.Array, "B T H2 W2 D"]:
    """Convolve every frame in 2-D.

    Args:
        params: ``kernel`` [kh, kw, C, D] and, unless the layer has none, ``bias`` [D].
        x: video or features, [B, T, H, W, C].
        stride: spatial stride.
        padding: zeros before and after each spatial axis.

    Returns:
        [B, T, H', W', D] in the dtype of ``x``.
    """
    return _biased(params, _frames_conv2d(x, params["kernel"].astype(x.dtype), stride, padding))


# UPSAMPLED_TAPS[r, i, j] is 1 if tap j of a kernel of size 3 reads the input pixel at offset i - 1 for the output pixel
# 2 y + r: the taps of pixel 2 y read pixels y - 1, y, y, and those of pixel 2 y + 1 read y, y, y + 1.
UPSAMPLED_TAPS = np.array([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]], np.float32)


def upsampled_conv2d(params: Params, x: Float[jax.Array, "B T H W C"]) -> Float[jax.Array, "B T H2 W2 D"]:
    """Double height and width by nearest neighbours and convolve with 3 x 3, in one convolution of the small frames.

    Each of the four output pixels of an input pixel reads 2 x 2 input pixels, with sums of the kernel's taps. So one
    convolution with 4 D output channels computes all of them, and the doubled frames are never written. The sums round
    differently: 1e-7 relative in float32.

    Args:
        params: ``kernel`` [3, 3, C, D] and, unless the layer has none, ``bias`` [D].
        x: [B, T, H, W, C].

    Returns:
        [B, T, 2 H, 2 W, D] in the dtype of ``x``.
    """
    kernel = params["kernel"].astype(jnp.float32)
    taps = jnp.asarray(UPSAMPLED_TAPS)
    kernel = jnp.einsum("yih,xjw,hwcd->ijcyxd", taps, taps, kernel, precision="highest")
    kernel = rearrange(kernel, "i j c y x d -> i j c (y x d)").astype(x.dtype)
    y = rearrange(_frames_conv2d(x, kernel, 1, (1, 1)), "b t h w (y x d) -> b t (h y) (w x) d", y=2, x=2)
    return _biased(params, y)


def pointwise(params: Params, x: Float[jax.Array, "*n C"]) -> Float[jax.Array, "*n D"]:
    """Return a 1 x 1 x 1 convolution of x [..., C]: [..., D] in the dtype of x.

    ``params`` has ``kernel`` [1, 1, 1, C, D] or [1, 1, C, D] and, unless the layer has none, ``bias`` [D].
    """
    kernel = params["kernel"].reshape(params["kernel"].shape[-2:])
    return _biased(params, jnp.matmul(x, kernel.astype(x.dtype), precision=dot_precision(x.dtype)))


def causal_conv(
    params: Params,
    x: Float[jax.Array, "B T H W C"],
    past: Float[jax.Array, "B 2 H W C"] | None = None,
    *,
    method: str | None = None,
) -> tuple[Float[jax.Array, "B T H W D"], Float[jax.Array, "B 2 H W C"]]:
    """Convolve causally in time with a 3 x k x k kernel: y[t] = sum_j kernel[j] * x[t - 2 + j] + bias.

    Args:
        params: ``kernel`` [3, k, k, C, D], k odd, and ``bias`` [D].
        x: [B, T, H, W, C].
        past: the two frames before x, [B, 2, H, W, C]; None means zeros.
        method: ``"taps"`` or ``"volume"``; None selects the faster one.

    Returns:
        y [B, T, H, W, D], and ``past`` for the next call (the last two input frames), both in the dtype of x.

    Raises:
        ConfigError: another ``method``.
    """
    image = past is None and x.shape[1] == 1
    if past is None:
        past = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:]))
    if image:  # The taps on the past read only zeros, so the last tap is enough.
        kernel = params["kernel"][-1].astype(x.dtype)
        y = _biased(params, _frames_conv2d(x, kernel, 1, (kernel.shape[0] // 2,) * 2))
        return y, jnp.concatenate([past[:, -1:], x], axis=1)
    window = jnp.concatenate([past.astype(x.dtype), x], axis=1)  # [B, T + 2, H, W, C]
    return temporal_conv(params, window, method=method), window[:, -2:]


def temporal_conv(params: Params, x: jax.Array, *, stride: int = 1, method: str | None = None) -> jax.Array:
    """Convolve without padding in time: [B, T, H, W, C] to [B, (T - 3) // stride + 1, H, W, D].

    ``params`` and ``method`` are those of :func:`causal_conv`; ``stride`` is in time.
    """
    method = method or ("taps" if constraints.platform() == "cpu" else "volume")
    require(method in ("taps", "volume"), f"convolution method is {method!r}; accepted: 'taps', 'volume'")
    kernel = params["kernel"].astype(x.dtype)
    pad = kernel.shape[1] // 2
    if method == "volume":
        y = lax.conv_general_dilated(
            x,
            kernel,
            (stride, 1, 1),
            ((0, 0), (pad, pad), (pad, pad)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=dot_precision(x.dtype),
        )
    else:
        span = x.shape[1] - 2
        taps = jnp.concatenate([x[:, tap : tap + span : stride] for tap in range(3)], axis=-1)
        y = _frames_conv2d(taps, rearrange(kernel, "t h w c d -> h w (t c) d"), 1, (pad, pad))
    return y + params["bias"].astype(x.dtype)


def _biased(params: Params, y: jax.Array) -> jax.Array:
    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def _frames_conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Convolve frame by frame: [B, T, H, W, C] to [B, T, H', W', D]."""
    frames = rearrange(x, "b t h w c -> (b t) h w c")
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        frames,
        kernel,
        (stride, stride),
        (padding, padding),
        dimension_numbers=dimensions,
        precision=dot_precision(x.dtype),
    )
    return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])


def check_video(video: jax.Array | jax.ShapeDtypeStruct, *, time: int, space: int, starts: bool) -> None:
    """Refuse a video that an encoder of ``time`` frames and ``space`` x ``space`` pixels per latent cannot read.

    ``starts``: the first latent frame holds one pixel frame, as at the start of a video.

    Raises:
        ConfigError: the shape is not [B, T, H, W, 3], T, H or W do not fit, or the pixels are not floats.
    """
    shape = tuple(video.shape)
    require(
        len(shape) == 5 and shape[-1] == 3,
        f"a video of shape {shape} cannot be encoded; accepted: [batch, frames, height, width, 3]",
    )
    require(
        jnp.issubdtype(video.dtype, jnp.floating),
        f"a video of type {video.dtype} cannot be encoded; accepted: floats in [-1, 1] (media.to_float)",
    )
    frames, height, width = shape[1:4]
    accepted = f"1 + {time}n" if starts else f"{time}n, n > 0"
    fits = frames % time == (1 % time if starts else 0)
    require(frames > 0 and fits, f"{frames} frames cannot be encoded here; accepted: {accepted}")
    require(
        height % space == 0 and width % space == 0,
        f"a video of {height} x {width} pixels cannot be encoded; height and width must be multiples of {space}",
    )


def check_latents(shape: tuple[int, ...], channels: int) -> None:
    """Refuse latents that are not [B, F, h, w, ``channels``] with at least one frame, by a ConfigError."""
    require(
        len(shape) == 5 and shape[1] > 0 and shape[-1] == channels,
        f"latents of shape {shape} cannot be decoded; accepted: [batch, frames, h, w, {channels}]",
    )
