"""Key/value caches of the streaming student, as explicit pytrees.

Keys are stored normalized and rotated by their position in the stream, so that a pass rotates the keys of its block
alone. Angles wrap around exactly (``rope.stream_angles``), hence a stream has no maximum length. Where the sink moves
with the window (``positions="relative"``), keys are stored unrotated and rotated when they are read. The slots are a
fixed array: the first ``sink`` frames keep their slots, all later frames share a ring buffer.

With ``TransformerConfig.kv_cache="int8"`` keys and values are stored in 8 bits. Every latent frame, head and channel
has a scale of its own, taken over the tokens of the frame (``models.int8_cache``). A pass reads its own block as it is
and the past times its scales; of one layer at a time there is then a copy in the compute type.

A cache has the form of the parameters it is used with: one array ``[L, ...]`` of all layers, or a tuple of L arrays
(``models.unstacked``), each of which a pass updates in place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import CausalConfig, TransformerConfig, require
from causvid_jax.sharding import constraints

CACHE_AXES = (None, "batch", None, None, "attention_heads", None)  # of [L, B, S, n, N, D]; of one layer without L
TEXT_AXES = (None, "batch", None, "heads", None)  # of [L, B, text_length, N, D]; of one layer without L
Layers = Any  # an array [L, ...] or a tuple of L arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Self-attention keys and values of the frames that later blocks can attend to."""

    k: Layers  # [L, B, S, n, N, D] RMS-normalized and rotated (stores_rotated); S slots of one latent frame, n tokens
    v: Layers  # [L, B, S, n, N, D]
    frame: jax.Array  # [S] int32: index of the latent frame in each slot, -1 if empty
    position: jax.Array  # [] int32: number of finished latent frames, which is where the current block starts
    k_scale: Layers | None = None  # [L, B, S, 1, N, D] float32, of int8 keys; None: keys and values have no scales
    v_scale: Layers | None = None  # [L, B, S, 1, N, D] float32

    @property
    def arrays(self) -> tuple[Layers, ...]:
        """Keys and values, then their scales if they have any."""
        return (self.k, self.v) if self.k_scale is None else (self.k, self.v, self.k_scale, self.v_scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Cross-attention keys and values of one prompt (and image). The value for a single layer has no leading axis L."""

    k: Layers  # [L, B, text_length, N, D]
    v: Layers  # [L, B, text_length, N, D]
    image_k: Layers | None = None  # [L, B, image_tokens, N, D]; None without an image branch
    image_v: Layers | None = None  # [L, B, image_tokens, N, D]


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
    """Return an empty cache for latents of ``height`` x ``width``.

    With a window it has ``sink + window`` slots and holds for a stream of any length. Without one it needs ``frames``,
    the maximum number of latent frames of the stream; ConfigError if that is missing. ``unstacked`` gives every layer
    an array of its own.
    """
    require(
        causal.window > 0 or frames is not None,
        "a cache without a window needs its length in latent frames; give frames=... or set causal.window",
    )
    _, patch_h, patch_w = config.patch_size
    slots = causal.sink + causal.window if causal.window else frames or 0
    tokens = (height // patch_h) * (width // patch_w)
    shape = (batch, slots, tokens, config.num_heads, config.head_dim)

    def zeros(dtype: str, *shape: int) -> jax.Array:
        # On a mesh the constraint splits the heads at once.
        return constraints.constrain(jnp.zeros(shape, dtype), CACHE_AXES[-len(shape) :], config.rules)

    def empty(dtype: str, *shape: int) -> Layers:
        layers = config.num_layers
        return tuple(zeros(dtype, *shape) for _ in range(layers)) if unstacked else zeros(dtype, layers, *shape)

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
    """Finish the current block of ``frames`` frames, so that the next pass writes the slots after it."""
    return dataclasses.replace(cache, position=cache.position + frames)


def stores_rotated(causal: CausalConfig) -> bool:
    """Return whether keys are stored rotated: they are, unless the position of the sink changes with the window."""
    return causal.positions == "absolute" or not (causal.window and causal.sink)


def write_slots(old: jax.Array, new: jax.Array, slots: jax.Array, *, axis: int) -> jax.Array:
    """Write the frames of ``new`` to ``slots [K]`` of ``old`` along ``axis``.

    One update per frame, since a ring wraps around between frames; XLA does them in place, which it does not do with
    every scatter.
    """
    for i in range(new.shape[axis]):
        frame = jax.lax.slice_in_dim(new, i, i + 1, axis=axis)
        old = jax.lax.dynamic_update_slice_in_dim(old, frame, slots[i], axis=axis)
    return old


def block_slots(position: jax.Array, frames: int, causal: CausalConfig) -> jax.Array:
    """Return the slots ``[frames]`` of the block that starts at latent frame ``position``.

    A ring of exactly ``window`` slots overwrites only frames that leave the window with the new block.
    """
    index = position + jnp.arange(frames, dtype=jnp.int32)
    if not causal.window:
        return index
    ring = causal.sink + (index - causal.sink) % causal.window
    return jnp.where(index < causal.sink, index, ring)


def read_positions(frame: jax.Array, position: jax.Array, block: int, causal: CausalConfig) -> jax.Array:
    """Return the rotary time position of every slot relative to the first frame of the current block, int32 ``[S]``."""
    relative = frame - position
    if stores_rotated(causal):
        return relative
    # Place the sink directly before the window. While the window still starts at the sink, this changes nothing.
    window_start = jnp.maximum(position + block - causal.window, causal.sink)
    return jnp.where(frame < causal.sink, relative + window_start - causal.sink, relative)


def visible_slots(frame: jax.Array, position: jax.Array, block: int, causal: CausalConfig) -> jax.Array:
    """Return which slots the current block attends to, bool ``[S]``: not empty, not later, in the window or the sink.

    In a stream that only advances these are the first ``min(position + block, S)`` slots. The cache holds later frames
    only if its position has been moved back.
    """
    end = position + block
    visible = (frame >= 0) & (frame < end)
    if causal.window:
        visible &= (frame >= end - causal.window) | (frame < causal.sink)
    return visible
