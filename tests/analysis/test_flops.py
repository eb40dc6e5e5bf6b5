"""FLOPs by formula and by trace: against each other, XLA's count, a count by hand and published figures."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from causvid_jax.analysis import bench, flops
from causvid_jax.config import CausalConfig, TransformerConfig
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import attention, transformer

WAN = load_recipe(str(pathlib.Path(__file__).parents[2] / "configs" / "wan_1_3b.py"))


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
    assert flops.attention_pairs(attention.bidirectional(4)) == 16
    assert flops.attention_pairs(attention.block_causal(6, CausalConfig(frames_per_block=2))) == 2 * (2 + 4 + 6)
    assert flops.attention_pairs(attention.block_causal(6, CausalConfig(frames_per_block=2, window=3))) == 2 * (
        2 + 3 + 3
    )


def test_loops_branches_and_products():
    a, b = jax.ShapeDtypeStruct((3, 4, 5), jnp.float32), jax.ShapeDtypeStruct((3, 5, 7), jnp.float32)
    product = lambda x, y: jnp.einsum("bij,bjk->bik", x, y)  # noqa: E731
    once = 2 * 3 * 4 * 5 * 7
    assert flops.count_traced(product, a, b) == once
    repeated = lambda x, y: jax.lax.scan(lambda c, _: (c + product(x, y).sum(), None), 0.0, length=6)[0]  # noqa: E731
    assert flops.count_traced(jax.jit(repeated), a, b) == 6 * once
    either = lambda x, y: jax.lax.cond(x.sum() > 0, product, lambda x, y: jnp.zeros((3, 4, 7)), x, y)  # noqa: E731
    assert flops.count_traced(either, a, b) == once


def test_the_transformer_counts_what_its_formula_says():
    net = TransformerConfig(
        dim=48, ffn_dim=64, num_heads=4, num_layers=3, in_channels=4, out_channels=4, text_dim=24, text_length=8
    )
    causal = CausalConfig(frames_per_block=2, window=6)
    x, timestep = jax.ShapeDtypeStruct((1, 2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.float32)
    rows = jax.ShapeDtypeStruct((1, 8, 24), jnp.float32)
    params = transformer.abstract(net)
    text = jax.eval_shape(lambda p, t: transformer.encode_text(p, t, config=net), params, rows)
    cache = jax.eval_shape(lambda: transformer.init_cache(net, causal, batch=1, height=8, width=8))
    one = flops.count_traced(
        lambda *a: transformer.cached(*a, config=net, causal=causal), params, x, timestep, text, cache
    )
    assert one == flops.forward(net, 2, 16, 2 * 6, text=False)


def test_rollouts_count_the_steps_of_the_first_blocks():
    """The first of seven blocks with eight steps adds a seventh of what eight steps in all blocks add."""

    def step(**diffusion):
        changed = dataclasses.replace(WAN, diffusion=dataclasses.replace(WAN.diffusion, **diffusion))
        return flops.training_step(changed, "distill").model

    eight = tuple(1000.0 - 125 * i for i in range(8))
    assert len(WAN.causal.block_sizes(WAN.video.latent_frames)) == 7
    added = step(first_block_timesteps=(eight,)) - step()
    assert added == pytest.approx((step(denoising_timesteps=eight) - step()) / 7, rel=1e-9) and added > 0


def test_context_passes_of_a_rollout_are_one_pass_of_every_block_but_the_last():
    """Blocks of three frames, seven in a clip: the sixth sees 18 frames. A clip of one block has no context pass."""
    tokens = flops.tokens_per_frame(WAN, WAN.student)
    expected = sum(flops.forward(WAN.student, 3, tokens, 3 * seen, text=False) for seen in (3, 6, 9, 12, 15, 18))
    assert flops.context_passes(WAN) == pytest.approx(expected, rel=1e-12)
    for change in ({"frames_per_block": 21}, {"context_pass": False}):
        assert flops.context_passes(dataclasses.replace(WAN, causal=CausalConfig(**change))) == 0


@pytest.mark.parametrize("name,published", [("wan", 40.65e12), ("taehv", 1.63e12)])
def test_codecs_at_full_size(name, published):
    # Counted by hand from the published layers, for the twelve frames of a block at 480 x 832. Our TAEHV grows in time
    # before it grows in space, which saves some.
    assert bench.make_codec(name, WAN).flops(3) == pytest.approx(published, rel=0.05)


def test_a_denoising_pass_of_the_published_student():
    # 40.41 TFLOP at the full window of 21 frames and 16.18 for the first block, counted by hand.
    tokens = flops.tokens_per_frame(WAN, WAN.student)
    full, first = (flops.forward(WAN.student, 3, tokens, 3 * seen, text=False) for seen in (21, 3))
    assert full == pytest.approx(40.41e12, rel=2e-3) and first == pytest.approx(16.18e12, rel=2e-3)


def test_a_codec_that_does_not_fit_is_refused():
    shallow = dataclasses.replace(WAN.vae, dim_mult=(1, 2, 4), temporal_downsample=(True, True))
    with pytest.raises(Exception, match="taehv decodes 16 channels, 3 doublings"):
        bench.make_codec("taehv", dataclasses.replace(WAN, vae=shallow))
