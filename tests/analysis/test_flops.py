"""Analytic FLOPs against what XLA counts in a program without loops, and against a count by hand."""

import jax
import jax.numpy as jnp
import pytest

from causvid_jax.analysis import flops
from causvid_jax.config import CausalConfig, TransformerConfig
from causvid_jax.models import attention, transformer


def test_forward_is_what_xla_counts_beside_elementwise_work():
    net = TransformerConfig(
        dim=192, ffn_dim=768, num_heads=4, num_layers=1, in_channels=4, out_channels=4, text_dim=64, text_length=32
    )
    x = jax.ShapeDtypeStruct((1, 6, 16, 16, 4), jnp.float32)
    timestep = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 32, 64), jnp.float32)
    program = jax.jit(lambda p, x, t, c: transformer.bidirectional(p, x, t, c, config=net))
    cost = program.lower(transformer.abstract(net), x, timestep, text).compile().cost_analysis()
    counted = flops.forward(net, 6, 64, 36)
    assert counted == pytest.approx(cost["flops"], rel=0.06)
    assert counted < cost["flops"]  # norms, softmax and activations are left out


def test_a_layer_by_hand():
    net = TransformerConfig(
        dim=12, ffn_dim=24, num_heads=2, num_layers=2, in_channels=1, out_channels=1, text_dim=5, text_length=3,
        freq_dim=4,
    )  # fmt: skip
    tokens, m = 2 * 5, 12
    layer = tokens * 2 * (6 * m * m + 2 * m * 24) + 4 * tokens * 3 * m + 4 * (2 * 5) * (2 * 5) * m + 2 * 3 * 2 * m * m
    ends = tokens * 2 * m * 4 * 2 + 2 * (2 * 4 * m + 2 * m * m + 12 * m * m) + 3 * (2 * 5 * m + 2 * m * m)
    assert flops.forward(net, 2, 5, 4) == 2 * layer + ends


def test_pairs_of_a_plan():
    assert flops.seen(attention.bidirectional(4)) == 16
    assert flops.seen(attention.block_causal(6, CausalConfig(frames_per_block=2))) == 2 * (2 + 4 + 6)
    assert flops.seen(attention.block_causal(6, CausalConfig(frames_per_block=2, window=3))) == 2 * (2 + 3 + 3)
