"""Blocks are written to a cache and removed again; a block then attends to what it attended to before."""

import dataclasses

import jax
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, TransformerConfig
from causvid_jax.models import cache_undo
from causvid_jax.models import kv_cache as caches

NET = TransformerConfig(dim=12, num_heads=2, num_layers=2)
CAUSAL = {
    "plain": CausalConfig(frames_per_block=2),
    "window": CausalConfig(frames_per_block=2, window=3),
    "sink": CausalConfig(frames_per_block=2, window=5, sink=1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_undo_takes_blocks_back(name):
    causal, rng = CAUSAL[name], np.random.default_rng(0)
    cache = caches.init_cache(NET, causal, batch=1, height=4, width=4, frames=12)
    before, replaced = [], []
    for _ in range(6):
        before.append(cache)
        replaced.append(cache_undo.overwritten(cache, 2, causal))
        slots = caches.block_slots(cache.position, 2, causal)
        new = rng.standard_normal((2, *cache.k[:, :, slots].shape)).astype(np.float32)
        cache = dataclasses.replace(
            cache,
            k=cache.k.at[:, :, slots].set(new[0]),
            v=cache.v.at[:, :, slots].set(new[1]),
            frame=cache.frame.at[slots].set(cache.position + np.arange(2)),
        )
        cache = caches.advance(cache, 2)
    for then, old in zip(reversed(before), reversed(replaced), strict=True):
        cache = cache_undo.undo(cache, old, 2, causal)
        np.testing.assert_array_equal(cache.position, then.position)
        np.testing.assert_array_equal(cache.frame, then.frame)
        held = np.asarray(then.frame) >= 0
        for now, was in ((cache.k, then.k), (cache.v, then.v)):
            np.testing.assert_array_equal(now[:, :, held], was[:, :, held])
    assert jax.tree.structure(cache) == jax.tree.structure(before[0])
