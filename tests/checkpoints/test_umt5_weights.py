"""Published names and layouts of the UMT5 encoder, both ways."""

import math
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.checkpoints import umt5 as umt5_weights
from causvid_jax.config import ConfigError, UMT5Config
from causvid_jax.models import umt5

CONFIG = UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3)
TIED = "encoder.embed_tokens.weight"


def random_tree(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), umt5.abstract(config))


@pytest.fixture(scope="module")
def params():
    return random_tree(CONFIG)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("naming", umt5_weights.NAMINGS)
def test_round_trip_is_bit_exact_and_keeps_the_type(naming, dtype):
    params = random_tree(CONFIG, dtype)
    state = umt5_weights.to_published(params, CONFIG, naming)
    assert {name: value.shape for name, value in state.items()} == umt5_weights.published_shapes(CONFIG, naming)
    assert all(value.flags.c_contiguous for value in state.values())
    back = umt5_weights.from_published(state, CONFIG, naming)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(dtype)}


def test_published_names_and_shapes():
    """Names and shapes as they stand in the published files, at full size."""
    original, transformers = (umt5_weights.published_shapes(UMT5Config(), n) for n in umt5_weights.NAMINGS)
    for first, second, shape in (
        ("token_embedding.weight", "shared.weight", (256384, 4096)),
        ("norm.weight", "encoder.final_layer_norm.weight", (4096,)),
        ("blocks.0.norm1.weight", "encoder.block.0.layer.0.layer_norm.weight", (4096,)),
        ("blocks.23.attn.q.weight", "encoder.block.23.layer.0.SelfAttention.q.weight", (4096, 4096)),
        ("blocks.3.attn.o.weight", "encoder.block.3.layer.0.SelfAttention.o.weight", (4096, 4096)),
        (
            "blocks.7.pos_embedding.embedding.weight",
            "encoder.block.7.layer.0.SelfAttention.relative_attention_bias.weight",
            (32, 64),
        ),
        ("blocks.1.norm2.weight", "encoder.block.1.layer.1.layer_norm.weight", (4096,)),
        ("blocks.1.ffn.gate.0.weight", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight", (10240, 4096)),
        ("blocks.1.ffn.fc1.weight", "encoder.block.1.layer.1.DenseReluDense.wi_1.weight", (10240, 4096)),
        ("blocks.1.ffn.fc2.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight", (4096, 10240)),
    ):
        assert original[first] == transformers[second] == shape
    for shapes in (original, transformers):
        assert len(shapes) == 242
        assert sum(math.prod(shape) for shape in shapes.values()) == 5_680_910_336


def test_kernels_are_transposed_and_layers_stacked(params):
    state = umt5_weights.to_published(params, CONFIG)
    np.testing.assert_array_equal(state["blocks.2.ffn.gate.0.weight"], params["blocks"]["ffn"]["gate"]["kernel"][2].T)
    np.testing.assert_array_equal(
        state["blocks.1.pos_embedding.embedding.weight"], params["blocks"]["relative_bias"][1]
    )


def test_the_tied_embedding_may_have_either_name_or_both(params):
    state = umt5_weights.to_published(params, CONFIG, "transformers")
    both = state | {TIED: state["shared.weight"].copy()}
    other = {name: value for name, value in both.items() if name != "shared.weight"}
    for accepted in (both, other):
        back = umt5_weights.from_published(accepted, CONFIG, "transformers")
        jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ConfigError, match="two different token embeddings, shared.weight and encoder.embed_tokens"):
        umt5_weights.from_published(both | {TIED: np.zeros_like(both[TIED])}, CONFIG, "transformers")


def test_refusals_name_the_tensors(params):
    state = umt5_weights.to_published(params, CONFIG)
    bad = {name: value for name, value in state.items() if name != "blocks.1.ffn.fc2.weight"}
    bad |= {"extra": np.zeros(1), "norm.weight": np.zeros(5)}
    with pytest.raises(ConfigError) as caught:
        umt5_weights.from_published(bad, CONFIG)
    assert str(caught.value) == (
        "original UMT5 weights do not fit the configuration (missing: blocks.1.ffn.fc2.weight; unexpected: extra; "
        "misshapen: norm.weight (5,) instead of (6,))"
    )
    with pytest.raises(ConfigError, match="transformers UMT5 weights do not fit .*missing: encoder.block.0.layer.0"):
        umt5_weights.from_published(state, CONFIG, "transformers")
    mixed = state | {"blocks.2.norm1.weight": state["blocks.2.norm1.weight"].astype(np.float16)}
    with pytest.raises(ConfigError, match="norm1/scale is float32 in layer 0 and float16 in layer 2"):
        umt5_weights.from_published(mixed, CONFIG)
    with pytest.raises(ConfigError, match="naming is 'diffusers'; accepted: original, transformers"):
        umt5_weights.from_published(state, CONFIG, "diffusers")
    with pytest.raises(ConfigError, match="consume needs a state that tensors can be taken out of, not a mappingproxy"):
        umt5_weights.from_published(types.MappingProxyType(state), CONFIG, consume=True)


@pytest.mark.parametrize("naming", umt5_weights.NAMINGS)
def test_consuming_a_state_never_holds_two_trees(naming):
    config = UMT5Config(vocab_size=64, dim=64, ffn_dim=64, num_heads=4, head_dim=16, num_layers=24)
    params = random_tree(config)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    tracemalloc.start()
    try:
        state = umt5_weights.to_published(params, config, naming)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        built = umt5_weights.from_published(state, config, naming, consume=True)
        rise = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert not state
    jax.tree.map(np.testing.assert_array_equal, built, params)
    # One stacked array more than the tree itself, where a plain copy would need all of it.
    assert rise < 1.25 * max(sizes) < 0.5 * sum(sizes)
