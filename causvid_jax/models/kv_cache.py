"""Key/value caches of the streaming student, as explicit pytrees.

Keys are stored normalized and rotated by their position in the stream, so a pass rotates only the keys of its block.
Angles wrap around exactly (``rope.stream_rotation``), so a stream has no maximum length. If the sink moves with the
window (``positions="relative"``), keys are stored unrotated and rotated when they are read. The slots are a fixed
array: the first ``sink`` frames keep their slots, and all later frames share a ring buffer.

With ``TransformerConfig.kv_cache="int8"`` keys and values are stored in 8 bits. Every latent frame, head and channel
has a scale, computed over the tokens of the frame (``models.quantization``). A pass multiplies the past by its scales,
one layer at a time, into a copy in the compute type. The pass reads the current block without 8-bit rounding.

A cache has the form of the parameters that it is used with: one array ``[L, ...]`` of all layers, or a tuple of L
arrays (``models.unstacked``). A pass updates each array of the tuple in place.

The splash kernel of a TPU reads heads one after the other, in blocks of tokens. For it the arrays of a tuple are
head-major, ``[B, N, T, D]`` with T = S n rounded up to whole blocks (:func:`is_head_major`), so that no pass transposes
or pads the keys and values of the past.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from causvid_jax.config import CausalConfig, TransformerConfig, require
from causvid_jax.models import attention
from causvid_jax.sharding import constraints

CACHE_AXES = (None, "batch", None, None, "attention_heads", None)  # of [L, B, S, n, N, D]; of one layer without L
HEAD_MAJOR_AXES = ("batch", "attention_heads", None, None)  # of [B, N, T, D]
TEXT_AXES = (None, "batch", None, "heads", None)  # of [L, B, text_length, N, D]; of one layer without L
Layers = Any  # an array [L, ...] or a tuple of L arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Self-attention keys and values of the frames that later blocks can attend to.

    Attributes:
        k: ``[L, B, S, n, N, D]``, RMS-normalized and rotated (:func:`stores_rotated`); S slots of one latent frame with
            n tokens. Or L arrays ``[B, N, T, D]`` (:func:`is_head_major`).
        v: as k.
        frame: index of the latent frame in each slot, -1 if the slot is empty; int32 ``[S]``.
        position: number of finished latent frames, at which the current block starts; int32 scalar.
        k_scale, v_scale: of int8 keys and values, float32 ``[L, B, S, 1, N, D]``; None: they have no scales.
    """

    k: Layers
    v: Layers
    frame: jax.Array
    position: jax.Array
    k_scale: Layers | None = None
    v_scale: Layers | None = None

    @property
    def arrays(self) -> tuple[Layers, ...]:
        """Keys and values, then their scales if they have any."""
        return (self.k, self.v) if self.k_scale is None else (self.k, self.v, self.k_scale, self.v_scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Cross-attention keys and values of one prompt (and image). The cache of a single layer has no leading axis L.

    Attributes:
        k, v: ``[L, B, text_length, N, D]``.
        image_k, image_v: ``[L, B, image_tokens, N, D]``; None without an image branch.
    """

    k: Layers
    v: Layers
    image_k: Layers | None = None
    image_v: Layers | None = None


def init_cache(
    config: TransformerConfig,
    causal: CausalConfig,
    *,
    batch: int,
    height: int,
    width: int,
    frames: int | None = None,
    unstacked: bool = False,
) -> KVCache:
    """Return an empty cache for latents of ``height`` x ``width`` (h, w).

    With a window it has ``sink + window`` slots and serves a stream of any length. Without one it has ``frames`` slots,
    the maximum number of latent frames of the stream. ``unstacked`` gives every layer an array of its own.

    Raises:
        ConfigError: there is neither a window nor a positive ``frames``.
    """
    require(
        causal.window > 0 or (frames or 0) > 0,
        f"frames is {frames}; a cache without a window needs its length in latent frames, at least 1: give frames=... "
        "or set causal.window",
    )
    _, patch_h, patch_w = config.patch_size
    slots = causal.sink + causal.window if causal.window else frames or 0
    tokens = (height // patch_h) * (width // patch_w)
    shape: tuple[int, ...] = (batch, slots, tokens, config.num_heads, config.head_dim)

    def zeros(dtype: str, *shape: int) -> jax.Array:
        # On a mesh the constraint splits the heads at once.
        return constraints.constrain(jnp.zeros(shape, dtype), axes_of(len(shape)), config.rules)

    def empty(dtype: str, *shape: int) -> Layers:
        layers = config.num_layers
        return tuple(zeros(dtype, *shape) for _ in range(layers)) if unstacked else zeros(dtype, layers, *shape)

    if unstacked and is_head_major(config, causal):
        from causvid_jax.models import splash  # here, because it imports Pallas

        shape = (batch, config.num_heads, splash.padded(slots * tokens), config.head_dim)
    int8 = config.kv_cache == "int8"
    stored, scales = "int8" if int8 else config.dtype, (batch, slots, 1, config.num_heads, config.head_dim)
    # Allocate buffers of their own: a donated cache must not alias itself.
    return KVCache(
        k=empty(stored, *shape),
        v=empty(stored, *shape),
        k_scale=empty("float32", *scales) if int8 else None,
        v_scale=empty("float32", *scales) if int8 else None,
        frame=jnp.full((slots,), -1, jnp.int32),
        position=jnp.zeros((), jnp.int32),
    )


def advance(cache: KVCache, frames: int) -> KVCache:
    """Return the cache with its position ``frames`` latent frames later: the current block is finished."""
    return dataclasses.replace(cache, position=cache.position + frames)


def stores_rotated(causal: CausalConfig) -> bool:
    """Return whether keys are stored rotated. They are not if the position of the sink moves with the window."""
    return causal.positions == "absolute" or not (causal.window and causal.sink)


def axes_of(dimensions: int) -> constraints.Axes:
    """Return the names of the axes of a cache's array with that many dimensions."""
    return HEAD_MAJOR_AXES if dimensions == len(HEAD_MAJOR_AXES) else CACHE_AXES[-dimensions:]


def is_head_major(config: TransformerConfig, causal: CausalConfig) -> bool:
    """Return whether the L arrays of an unstacked cache are ``[B, N, T, D]``, for the splash kernel.

    They are not if a pass makes another array of the past anyway: it rotates keys, or multiplies by scales of int8.
    """
    splash = attention.resolve(config.attention, config.dtype) == "splash"
    return splash and config.kv_cache != "int8" and stores_rotated(causal)


def head_major(x: jax.Array) -> jax.Array:
    """Return ``x [B, S, n, N, D]`` as ``[B, N, S n, D]``."""
    return rearrange(x, "b s n N D -> b N (s n) D")


def frame_major(cache: KVCache, tokens: int) -> KVCache:
    """Return the cache with arrays ``[B, S, n, N, D]``, whatever the kernel; ``tokens`` is n.

    The inverse is :func:`like`.
    """

    def of(x: jax.Array) -> jax.Array:
        return rearrange(x[:, :, : len(cache.frame) * tokens], "b N (s n) D -> b s n N D", n=tokens)

    return _converted(cache, of) if _has_head_major(cache) else cache


def like(cache: KVCache, other: KVCache) -> KVCache:
    """Return a cache of :func:`frame_major` in the form of ``other``, whose arrays may be shapes."""
    if not _has_head_major(other):
        return cache
    length = other.k[0].shape[2]

    def of(x: jax.Array) -> jax.Array:
        x = head_major(x)
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

    return _converted(cache, of)


def _has_head_major(cache: KVCache) -> bool:
    return isinstance(cache.k, tuple) and cache.k[0].ndim == len(HEAD_MAJOR_AXES)


def _converted(cache: KVCache, of: Callable[[jax.Array], jax.Array]) -> KVCache:
    return dataclasses.replace(cache, k=tuple(map(of, cache.k)), v=tuple(map(of, cache.v)))


def write_slots(old: jax.Array, new: jax.Array, slots: jax.Array, *, axis: int) -> jax.Array:
    """Return ``old`` with the K frames of ``new`` in ``slots [K]`` along ``axis``, on which a slot has equal parts.

    Each frame is one update, because the ring may wrap around between two frames. XLA makes these updates in place,
    unlike some scatters.
    """
    size = new.shape[axis] // len(slots)
    for i in range(len(slots)):
        frame = jax.lax.slice_in_dim(new, i * size, (i + 1) * size, axis=axis)
        old = jax.lax.dynamic_update_slice_in_dim(old, frame, slots[i] * size, axis=axis)
    return old


def block_slots(position: jax.Array, frames: int, causal: CausalConfig) -> jax.Array:
    """Return the slots, int32 ``[frames]``, of the block that starts at latent frame ``position``.

    Frame i is in slot i while i < sink, later in slot ``sink + (i - sink) mod window``; without a window in slot i.

    A ring of exactly ``window`` slots overwrites only frames that leave the window with the new block.
    """
    index = position + jnp.arange(frames, dtype=jnp.int32)
    if not causal.window:
        return index
    ring = causal.sink + (index - causal.sink) % causal.window
    return jnp.where(index < causal.sink, index, ring)


def read_positions(frame: jax.Array, position: jax.Array, block: int, causal: CausalConfig) -> jax.Array:
    """Return the rotary time position of every slot relative to the first frame of the current block, int32 ``[S]``.

    ``frame`` and ``position`` are those of the cache, ``block`` is the number of frames of the block.
    """
    relative = frame - position
    if stores_rotated(causal):
        return relative
    # Place the sink directly before the window. While the window still starts at the sink, this changes nothing.
    window_start = jnp.maximum(position + block - causal.window, causal.sink)
    return jnp.where(frame < causal.sink, relative + window_start - causal.sink, relative)


def visible_slots(frame: jax.Array, position: jax.Array, block: int, causal: CausalConfig) -> jax.Array:
    """Return whether the current block attends to each slot, bool ``[S]``: not empty, not later, in the window or sink.

    Arguments are those of :func:`read_positions`. In a stream that only advances, these are the first
    ``min(position + block, S)`` slots. The cache holds later frames only if its position has been moved back.
    """
    end = position + block
    visible = (frame >= 0) & (frame < end)
    if causal.window:
        visible &= (frame >= end - causal.window) | (frame < causal.sink)
    return visible
