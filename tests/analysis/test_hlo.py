"""Collectives read from a real compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from causvid_jax.analysis import hlo


def test_collectives_of_a_sharded_loop():
    mesh = Mesh(np.asarray(jax.devices()).reshape(8), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def layers(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        x, _ = jax.lax.scan(layer, x, weights)
        return x.sum()

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    text = jax.jit(layers).lower(x, weights).compile().as_text()
    found = hlo.totals(text)
    assert found["all-gather"]["count"] + found["all-gather"]["count_once"] >= 1
    # One layer's weights gathered, wherever the compiler puts it: 32 x 32 floats (all three layers if outside).
    gathered = [c for c in hlo.collectives(text) if c.kind == "all-gather"]
    assert {c.bytes for c in gathered} <= {32 * 32 * 4, 3 * 32 * 32 * 4}
    assert found["all-reduce"]["count_once"] >= 1  # the sum


def test_sizes_and_loops_of_a_text():
    text = """
%body.1 (p: (f32[8,4])) -> (f32[8,4]) {
  %ag = bf16[128,64]{1,0} all-gather(%x), dimensions={0}
  %ar = (f32[16]{0}, f32[32]{0}) all-reduce-start(%y, %z), to_apply=%add
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %w = (f32[8,4]) while(%t), condition=%cond.1, body=%body.1
  %c = s8[10]{0} collective-permute(%a)
}
"""
    assert hlo.totals(text) == {
        "all-gather": {"count": 1, "bytes": 128 * 64 * 2, "count_once": 0, "bytes_once": 0},
        "all-reduce": {"count": 1, "bytes": 128, "count_once": 0, "bytes_once": 0},
        "collective-permute": {"count": 0, "bytes": 0, "count_once": 1, "bytes_once": 10},
    }
