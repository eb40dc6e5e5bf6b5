"""The UMT5 encoder: parity with transformers, and embeddings that do not depend on padding."""

import functools
import math

import jax
import jax.numpy as jnp
import make_umt5 as golden
import numpy as np
import pytest

from causvid_jax.checkpoints import load
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import ConfigError, UMT5Config
from causvid_jax.models import umt5

CONFIG = UMT5Config(**golden.SIZES, dtype="float32")


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(golden.GOLDEN))


@pytest.fixture(scope="module")
def state():
    return golden.random_weights(network_of(CONFIG).shapes(CONFIG, "diffusers"), golden.SEED)


@pytest.fixture(scope="module")
def params(state):
    return load(state, config=CONFIG)[0]


@functools.partial(jax.jit, static_argnames="config")
def encode(params, ids, mask, config=CONFIG):
    return umt5.encode(params, ids, mask, config=config)


@pytest.mark.parametrize("name", ["long", "short"])
def test_equals_transformers(arrays, state, name):
    assert 0.5 < arrays[f"{name}_rows"].std() < 2
    assert golden.error_of(state, arrays, name) <= 5e-5


def test_buckets_equal_transformers(arrays):
    np.testing.assert_array_equal(umt5.relative_buckets(arrays["relative"], UMT5Config()), arrays["buckets"])


@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 50), (8, 20), (4, 9)])
def test_buckets_follow_the_logarithm(buckets, distance):
    config = UMT5Config(num_buckets=buckets, max_distance=distance)
    exact = buckets // 4

    def expected(relative):
        n, side = abs(relative), buckets // 2 if relative > 0 else 0
        if n < exact:
            return side + n
        log = math.log(n / exact) / math.log(distance / exact) * exact
        return side + min(exact + math.floor(log + 1e-9), 2 * exact - 1)

    relative = np.arange(-3 * distance, 3 * distance + 1)
    np.testing.assert_array_equal(umt5.relative_buckets(relative, config), [expected(r) for r in relative.tolist()])


def test_compiled_code_holds_no_second_copy_of_the_weights():
    config = UMT5Config(vocab_size=8, dim=64, ffn_dim=256, num_heads=2, head_dim=32, num_layers=24)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), umt5.abstract(config))
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    memory = encode.lower(half, ids, ids, config=config).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * memory.argument_size_in_bytes


def test_init_has_the_abstract_shapes_and_layers_that_differ():
    fresh = umt5.init(jax.random.key(0), CONFIG)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), umt5.abstract(CONFIG))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == shapes
    q = fresh["blocks"]["attn"]["q"]["kernel"]
    assert jnp.abs(q[0] - q[1]).max() > 0.1
    assert q.std() == pytest.approx((CONFIG.dim * CONFIG.head_dim) ** -0.5, rel=0.1)


def test_padding_changes_nothing(arrays, params):
    """Tokens of the padding change no bit, its length changes rounding alone, and its rows are zero."""
    ids, mask = arrays["short_ids"], arrays["short_mask"]
    rows = encode(params, ids, mask)
    assert not rows[~mask].any()
    noise = np.where(mask, ids, np.random.default_rng(0).integers(0, CONFIG.vocab_size, ids.shape))
    np.testing.assert_array_equal(encode(params, noise, mask), rows)
    longer = encode(params, np.pad(ids, ((0, 0), (0, 40))), np.pad(mask.astype(np.int32), ((0, 0), (0, 40))))
    assert not longer[:, ids.shape[1] :].any()
    np.testing.assert_allclose(longer[:, : ids.shape[1]], rows, atol=1e-5)


def test_order_and_layer_biases_matter(arrays, params):
    ids, mask = arrays["short_ids"], arrays["short_mask"]
    rows = encode(params, ids, mask)
    flipped = encode(params, ids[:, ::-1], mask[:, ::-1])[:, ::-1]
    assert jnp.abs(flipped - rows).max() > 0.1
    # Every layer has its own table.
    for layer in range(CONFIG.num_layers):
        bias = params["blocks"]["relative_bias"]
        other = {**params, "blocks": {**params["blocks"], "relative_bias": bias.at[layer].set(bias[layer, ::-1])}}
        assert jnp.abs(encode(other, ids, mask) - rows).max() > 0.01


def test_bfloat16_weights_and_matmuls_stay_near_float32(arrays, params):
    ids, mask = arrays["short_ids"], arrays["short_mask"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rows = encode(half, ids, mask, config=UMT5Config(**golden.SIZES))
    assert rows.dtype == jnp.float32
    error = np.asarray(rows - encode(params, ids, mask))[mask]
    assert 0 < np.sqrt(np.mean(error**2)) < 0.05


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_buckets": 30}, "umt5.num_buckets is 30; accepted: at least 4 and at most 65536, multiples of 4"),
        ({"max_distance": 8}, "umt5.max_distance is 8; it must exceed num_buckets / 4 = 8"),
        ({"dtype": "float16"}, "umt5.dtype is 'float16'; accepted: 'float32', 'bfloat16'"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        UMT5Config(**fields)
