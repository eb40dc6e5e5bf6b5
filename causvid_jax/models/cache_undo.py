"""Remove the last block from a key/value cache, for the backward pass of a rollout (``distill.rollout``).

The cache has stacked arrays ``[L, B, S, n, N, D]`` without scales.
"""

import dataclasses
from typing import Any

import jax

from causvid_jax.config import CausalConfig
from causvid_jax.models.kv_cache import KVCache, block_slots


def overwritten(cache: KVCache, frames: int, causal: CausalConfig) -> tuple[jax.Array, Any]:
    """Return the entries that the next block of ``frames`` latent frames will overwrite, for :func:`undo`.

    These are the frame index of each slot, int32 ``[frames]``, and keys and values (None without a window).
    """
    slots = block_slots(cache.position, frames, causal)
    # Without a window each slot is written by one block only, so there are no older keys and values.
    old = (cache.k[:, :, slots], cache.v[:, :, slots]) if causal.window else None
    return cache.frame[slots], old


def undo(cache: KVCache, replaced: tuple[jax.Array, Any], frames: int, causal: CausalConfig) -> KVCache:
    """Return the cache as it was before its last block of ``frames`` latent frames.

    ``replaced`` is the result of :func:`overwritten` for that block.
    """
    position = cache.position - frames
    slots = block_slots(position, frames, causal)
    frame, old = replaced
    cache = dataclasses.replace(cache, frame=cache.frame.at[slots].set(frame), position=position)
    if old is None:
        return cache
    k, v = (new.at[:, :, slots].set(previous) for new, previous in zip((cache.k, cache.v), old, strict=True))
    return dataclasses.replace(cache, k=k, v=v)
