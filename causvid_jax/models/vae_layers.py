"""Layers of the Wan video VAE (Wan2.1, ``wan/modules/vae.py``) as pure functions over parameter dicts.

Arrays are [B, T, H, W, C] in the compute type. Temporal layers take ``past``, a dict of the last input frames of their
convolutions (``{}`` at the start of a video), and return the updated dict. ``present`` [T] is None or a mask of the
frames that exist. Other frames are set to zero before every temporal convolution, which is equal to the causal zero
padding (see ``vae.decode_chunk``).
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from causvid_jax.models import conv
from causvid_jax.models.layers import dot_precision, einsum

Tree = dict[str, Any]


def rms_norm(gamma: jax.Array, x: jax.Array) -> jax.Array:
    """Return x / |x| * sqrt(C) * gamma over the channels [..., C] in float32; zero maps to zero."""
    x32 = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
    scale = gamma * x.shape[-1] ** 0.5
    return (x32 * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * scale).astype(x.dtype)


def only_present(x: jax.Array, present: jax.Array | None) -> jax.Array:
    """Return x [B, T, H, W, C] with zeros in the frames that do not exist."""
    return x if present is None else jnp.where(present[:, None, None, None], x, 0)


def causal(
    params: Tree, x: jax.Array, past: jax.Array | None, present: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Apply :func:`conv.causal_conv` to the frames that exist; return (y, new past)."""
    return conv.causal_conv(params, only_present(x, present), past)


def head(params: Tree, x: jax.Array, past: jax.Array | None, present: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Apply RMS norm, SiLU and causal convolution (``norm.gamma``, ``conv``); return (y, new past)."""
    return causal(params["conv"], jax.nn.silu(rms_norm(params["norm"]["gamma"], x)), past, present)


def residual_block(params: Tree, x: jax.Array, past: Tree, present: jax.Array | None) -> tuple[jax.Array, Tree]:
    """Return ``x + f2(f1(x))``, f = norm, SiLU and causal convolution, and the new past.

    If the width changes, the 1 x 1 x 1 convolution ``shortcut`` of x replaces the first x.
    """
    skip = conv.pointwise(params["shortcut"], x) if "shortcut" in params else x
    new = {}
    for i in ("1", "2"):
        half = {"norm": params[f"norm{i}"], "conv": params[f"conv{i}"]}
        x, new[f"conv{i}"] = head(half, x, past.get(f"conv{i}"), present)
    return x + skip, new


def attention_block(params: Tree, x: jax.Array) -> jax.Array:
    """Return x [B, T, H, W, C] plus single-head attention between the positions of each frame."""
    height, width = x.shape[2:4]
    tokens = rearrange(rms_norm(params["norm"]["gamma"], x), "b t h w c -> b t (h w) c")
    q, k, v = jnp.split(conv.pointwise(params["to_qkv"], tokens), 3, axis=-1)
    scores = einsum("btqc,btkc->btqk", q, k) * x.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    out = jnp.einsum("btqk,btkc->btqc", weights, v, precision=dot_precision(x.dtype))
    return x + rearrange(conv.pointwise(params["proj"], out), "b t (h w) c -> b t h w c", h=height, w=width)


def middle(params: Tree, x: jax.Array, past: Tree, present: jax.Array | None) -> tuple[jax.Array, Tree]:
    """Apply residual block, attention and residual block; return (y, new past)."""
    x, first = residual_block(params["0"], x, past.get("0", {}), present)
    x = attention_block(params["1"], x)
    x, last = residual_block(params["2"], x, past.get("2", {}), present)
    return x, {"0": first, "2": last}


def patchify(video: jax.Array, size: int) -> jax.Array:
    """Return squares of ``size`` x ``size`` pixels as channels (c, column, row), the order of Wan2.2."""
    return rearrange(video, "b t (h q) (w r) c -> b t h w (c r q)", q=size, r=size) if size > 1 else video


def unpatchify(x: jax.Array, size: int) -> jax.Array:
    """Invert :func:`patchify`."""
    return rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=size, r=size) if size > 1 else x


def average_down(x: jax.Array, width: int, halves: tuple[bool, bool], *, starts: bool) -> jax.Array:
    """Return x at half the frame rate and half the size (``halves``) with ``width`` channels, by means (Wan2.2).

    The positions that are merged become channels (c, time, row, column). These are divided into ``width`` groups of
    equal size, and each output channel is the mean of a group. At the start of a video (``starts``) a zero frame
    precedes the first frame.
    """
    time, space = (2 if half else 1 for half in halves)
    if time == 2 and starts:
        x = jnp.concatenate([jnp.zeros_like(x[:, :1]), x], axis=1)
    x = rearrange(x, "b (t p) (h q) (w r) c -> b t h w (c p q r)", p=time, q=space, r=space)
    grouped = x.reshape(*x.shape[:-1], width, x.shape[-1] // width)
    return grouped.astype(jnp.float32).mean(axis=-1).astype(x.dtype)


def copy_up(x: jax.Array, width: int, in_time: bool, *, starts: bool) -> jax.Array:
    """Return x at twice the size, and with ``in_time`` at twice the frame rate, by copies of its channels (Wan2.2).

    Every channel is repeated; the result is read as channels (width, time, row, column). With ``starts`` (static) x
    begins with the single frame of the first latent; only the second of its two copies is kept.
    """
    time = 2 if in_time else 1
    x = jnp.repeat(x, width * time * 4 // x.shape[-1], axis=-1)
    x = rearrange(x, "b t h w (c p q r) -> b (t p) (h q) (w r) c", p=time, q=2, r=2)
    return x[:, 1:] if starts and in_time else x


def downsample(params: Tree, x: jax.Array, past: Tree, *, starts: bool) -> tuple[jax.Array, Tree]:
    """Halve height and width and, with a ``time_conv``, the frame rate; return (y, new past).

    The first frame of a video is kept. Every later output combines three frames:
    out[1 + i] = time_conv(x[2i], x[2i + 1], x[2i + 2]). ``past["time_conv"]`` is the last frame of the previous call,
    [B, 1, h, w, C]. Set ``starts`` (static) for the first call.
    """
    x = conv.conv2d(params["conv"], x, stride=2, padding=(0, 1))
    if "time_conv" not in params:
        return x, {}
    new = {"time_conv": x[:, -1:]}
    window = x if starts else jnp.concatenate([past["time_conv"].astype(x.dtype), x], axis=1)
    out = [x[:, :1]] if starts else []
    if window.shape[1] >= 3:
        out.append(conv.temporal_conv(params["time_conv"], window, stride=2))
    return jnp.concatenate(out, axis=1), new


def upsample(params: Tree, x: jax.Array, past: Tree, *, start: bool | jax.Array, frames: int) -> tuple[jax.Array, Tree]:
    """Double height and width and, with a ``time_conv``, the frame rate; return (y, new past).

    ``time_conv`` outputs two frames for each, in the channels [2, C]. The frame of the first latent of a video is
    copied, and the past of ``time_conv`` excludes it. ``frames`` is the number of slots per latent in x.

    * ``start`` True: x begins with the single frame of the first latent, which stays single.
    * ``start`` traced: if true, x begins with ``frames`` slots of the first latent, of which only the last exists. It
      moves to the last of the doubled slots.
    """
    new = {}
    if "time_conv" in params:
        first, body = (x[:, :1], x[:, 1:]) if start is True else (x[:, :0], x)
        past_frames = past.get("time_conv")
        if start is not True:
            body = only_present(body, ~start | (jnp.arange(x.shape[1]) >= frames))
        pairs, new["time_conv"] = conv.causal_conv(params["time_conv"], body, past_frames)
        pairs = rearrange(pairs, "b t h w (two c) -> b (t two) h w c", two=2)
        if start is not True:
            doubled = repeat(x, "b t h w c -> b (t two) h w c", two=2)
            pairs = jnp.where((start & (jnp.arange(2 * x.shape[1]) < 2 * frames))[:, None, None, None], doubled, pairs)
        x = jnp.concatenate([first, pairs], axis=1)
    return conv.upsampled_conv2d(params["conv"], x), new
