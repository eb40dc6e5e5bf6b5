"""The streaming student's caches, as explicit pytrees.

Keys are stored normalised but *not* rotated: their rotary position is applied when they are read, relative to the
current block. So a stream has no maximum length, the window can be re-based for free, and float32 never sees a large
position. Slots are a fixed array: the first ``sink`` frames keep their own slots, all others share a ring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import CausalConfig, TransformerConfig, require
from causvid_jax.sharding import constraints

CACHE_AXES = (None, "batch", None, None, "attention_heads", None)  # of [L, B, S, n, N, D]
TEXT_AXES = (None, "batch", None, "heads", None)  # of [L, B, text_length, N, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Self-attention keys and values of the frames a stream can still see."""

    k: jax.Array  # [L, B, S, n, N, D] RMS-normalised, unrotated; S slots of one latent frame, n tokens a frame
    v: jax.Array  # [L, B, S, n, N, D]
    frame: jax.Array  # [S] int32: which latent frame a slot holds, -1 when empty
    position: jax.Array  # [] int32: latent frames finished so far; the current block starts here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Cross-attention keys and values of one prompt (and image), constant while the prompt is. One layer's part of it
    has no leading L."""

    k: jax.Array  # [L, B, text_length, N, D]
    v: jax.Array  # [L, B, text_length, N, D]
    image_k: jax.Array | None = None  # [L, B, image_tokens, N, D]; None without an image branch
    image_v: jax.Array | None = None  # [L, B, image_tokens, N, D]


def init_cache(
    config: TransformerConfig, causal: CausalConfig, *, batch: int, height: int, width: int, frames: int | None = None
) -> KVCache:
    """An empty cache for latents of ``height`` x ``width``.

    With a window it has ``sink + window`` slots and serves any length; without one it needs ``frames``, the most
    latent frames the stream will have.
    """
    require(
        causal.window > 0 or frames is not None,
        "a cache without a window needs its length in latent frames; give frames=... or set causal.window",
    )
    _, patch_h, patch_w = config.patch_size
    slots = causal.sink + causal.window if causal.window else frames
    tokens = (height // patch_h) * (width // patch_w)
    shape = (config.num_layers, batch, slots, tokens, config.num_heads, config.head_dim)
    # Two separate buffers: a donated cache must not alias itself. On a mesh no device ever holds all heads.
    return KVCache(
        k=constraints.constrain(jnp.zeros(shape, config.dtype), CACHE_AXES, config.rules),
        v=constraints.constrain(jnp.zeros(shape, config.dtype), CACHE_AXES, config.rules),
        frame=jnp.full((slots,), -1, jnp.int32),
        position=jnp.zeros((), jnp.int32),
    )


def advance(cache: KVCache, frames: int) -> KVCache:
    """The current block of ``frames`` frames is finished; the next pass writes the slots after it."""
    return dataclasses.replace(cache, position=cache.position + frames)


def overwritten(cache: KVCache, frames: int, causal: CausalConfig) -> tuple[jax.Array, Any]:
    """What the block of ``frames`` frames that comes next replaces: for :func:`undo`."""
    slots = block_slots(cache.position, frames, causal)
    # Without a window a slot is written by one block only; until then it holds nothing.
    old = (cache.k[:, :, slots], cache.v[:, :, slots]) if causal.window else None
    return cache.frame[slots], old


def undo(cache: KVCache, replaced: tuple[jax.Array, Any], frames: int, causal: CausalConfig) -> KVCache:
    """The cache before its last block, of ``frames`` frames, which had replaced ``replaced`` (:func:`overwritten`)."""
    position = cache.position - frames
    slots = block_slots(position, frames, causal)
    frame, old = replaced
    cache = dataclasses.replace(cache, frame=cache.frame.at[slots].set(frame), position=position)
    if old is None:
        return cache
    k, v = (now.at[:, :, slots].set(then) for now, then in zip((cache.k, cache.v), old, strict=True))
    return dataclasses.replace(cache, k=k, v=v)


def block_slots(position: jax.Array, frames: int, causal: CausalConfig) -> jax.Array:
    """Slots ``[frames]`` of the block that starts at latent frame ``position``.

    A ring of exactly ``window`` slots never overwrites a frame still in sight: the frames a new block replaces are
    those that leave the window with it.
    """
    index = position + jnp.arange(frames, dtype=jnp.int32)
    if not causal.window:
        return index
    ring = causal.sink + (index - causal.sink) % causal.window
    return jnp.where(index < causal.sink, index, ring)


def read_positions(frame: jax.Array, position: jax.Array, block: int, causal: CausalConfig) -> jax.Array:
    """Rotary time position of every slot relative to the current block's first frame, int32 ``[S]``."""
    relative = frame - position
    if causal.positions == "absolute" or not (causal.window and causal.sink):
        return relative
    # The sink is moved to sit right before the window; before the window has moved at all this changes nothing.
    window_start = jnp.maximum(position + block - causal.window, causal.sink)
    return jnp.where(frame < causal.sink, relative + window_start - causal.sink, relative)


def visible_slots(frame: jax.Array, position: jax.Array, block: int, causal: CausalConfig) -> jax.Array:
    """Which slots the current block sees, bool ``[S]``: written, not in the future, in the window or the sink.

    While a stream goes on these are the first ``min(position + block, S)``: a ring of exactly ``window`` slots holds
    nothing else. Only where the position has been moved back does it hold later frames.
    """
    end = position + block
    seen = (frame >= 0) & (frame < end)
    if causal.window:
        seen &= (frame >= end - causal.window) | (frame < causal.sink)
    return seen
