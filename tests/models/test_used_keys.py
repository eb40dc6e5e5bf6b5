"""A stream attends to the first slots of its cache, so cuDNN gets a length instead of a mask."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig
from causvid_jax.models import attention, kv_cache


def test_a_stream_sees_the_first_slots():
    for k, window, sink, first in itertools.product((1, 2, 3), (0, 3, 5, 6), (0, 2, 3), (False, True)):
        if sink and not window:
            continue
        causal = CausalConfig(frames_per_block=k, window=window, sink=sink, independent_first_frame=first)
        slots = sink + window if window else 40
        held, position = np.full(slots, -1), 0
        for block in range(10):
            size = 1 if first and block == 0 else k
            held[np.asarray(kv_cache.block_slots(position, size, causal))] = position + np.arange(size)
            seen = np.asarray(kv_cache.visible_slots(held, position, size, causal))
            expected = np.arange(slots) < min(position + size, slots)
            np.testing.assert_array_equal(seen, expected, err_msg=str((causal, block)))
            position += size


@pytest.mark.parametrize("used", [5, 12])
def test_a_length_is_that_mask(used, monkeypatch):
    given = {}

    def on_cpu(q, k, v, *, implementation, **more):
        given.update(more, implementation=implementation)
        return original(q, k, v, implementation="xla", **more)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    rng = np.random.default_rng(used)
    q, k, v = (rng.standard_normal((2, length, 2, 8)).astype(np.float32) for length in (6, 12, 12))
    mask = jnp.arange(12) < used
    expected = attention.dense(q, k, v, dtype="float32", mask=mask)
    for how in ({"mask": mask, "used": jnp.int32(used)}, {"mask": mask}):
        given.clear()
        np.testing.assert_allclose(
            attention.dense(q, k, v, dtype="float32", backend="cudnn", **how), expected, atol=1e-6
        )
        assert given["implementation"] == "cudnn" and ("mask" in given) == ("used" not in how)
