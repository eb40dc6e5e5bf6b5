"""Compare the roundings of published code with PyTorch's; parameters stored in a narrow type give the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import make_numerics as golden
import numpy as np
import pytest

from causvid_jax.checkpoints import store
from causvid_jax.config import CausalConfig, ConfigError, LoraConfig, TransformerConfig
from causvid_jax.models import precision, transformer

CONFIG = TransformerConfig(**golden.SIZES, dtype="bfloat16")


@pytest.fixture(scope="module")
def drawn():
    return golden.draw(golden.SEED)


def test_each_column_is_nearest_to_its_own_code(drawn):
    with np.load(golden.GOLDEN) as arrays:
        apart = {
            (code, column): golden.deviation(*drawn, column, arrays[code])
            for code in ("wan", "causvid")
            for column in ("default", code)
        }
    # A sum in another order crosses a rounding boundary now and then; a rounding left out moves everything.
    assert apart["wan", "wan"] < 0.7 * apart["wan", "default"]
    assert apart["causvid", "causvid"] < 0.7 * apart["causvid", "default"]
    assert max(apart["wan", "wan"], apart["causvid", "causvid"]) < 0.02


def test_rounding_is_that_of_a_cast():
    x = jax.random.normal(jax.random.key(0), (1000,)) * 10.0 ** jnp.arange(-5, 5).repeat(100)
    np.testing.assert_array_equal(precision.rounded(x, "bfloat16"), x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(precision.rounded(x, "float32"), x)
    with pytest.raises(
        ConfigError, match="transformer.precision is 'exact'; accepted: 'default', 'fast', 'wan', 'causvid'"
    ):
        TransformerConfig(precision="exact")


@pytest.mark.parametrize("column", ["default", "wan"])
def test_narrow_parameters_give_the_same_bits(drawn, column):
    config = dataclasses.replace(CONFIG, precision=column)
    flat, inputs = drawn
    wide = store.unflatten(flat)
    narrow = jax.tree.map(lambda x, leaf: jnp.asarray(x, leaf.dtype), wide, transformer.inference(config))
    assert narrow["blocks"]["ffn"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert narrow["time_projection"]["kernel"].dtype == jnp.float32
    assert narrow["head"]["proj"]["kernel"].dtype == (jnp.float32 if column == "wan" else jnp.bfloat16)
    velocity = jax.jit(transformer.bidirectional, static_argnames="config")
    given = inputs["x"], inputs["timestep"], inputs["text"]
    np.testing.assert_array_equal(velocity(narrow, *given, config=config), velocity(wide, *given, config=config))


def test_in_float32_absolute_positions_change_nothing(drawn):
    """Compute a stream's second block by both policies: only differences of positions matter."""
    flat, inputs = drawn
    params, causal = store.unflatten(flat), CausalConfig(frames_per_block=1, window=2)
    step = jax.jit(transformer.cached, static_argnames=("config", "causal"))
    out = {}
    for column in ("default", "causvid"):
        config = dataclasses.replace(CONFIG, dtype="float32", precision=column)
        cache = transformer.init_cache(config, causal, batch=2, height=4, width=6)
        prompt = transformer.encode_text(params, inputs["text"], config=config)
        for i in range(2):
            x, t = inputs["x"][:, i : i + 1], inputs["timestep"][:, :1]
            out[column], cache = step(params, x, t, prompt, cache, config=config, causal=causal)
            cache = transformer.advance(cache, 1)
    np.testing.assert_allclose(out["causvid"], out["default"], atol=2e-5)


@pytest.mark.parametrize("column", ["wan", "causvid"])
def test_the_result_with_an_adapter_is_rounded_once(column):
    """Merged weights give a rounded result; the adapter's product was added to it after the rounding."""
    config = dataclasses.replace(CONFIG, precision=column, lora=LoraConfig(3, 6.0))
    rng = np.random.default_rng(0)
    cast = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)  # noqa: E731
    kernel, bias, down, up, x = (cast(rng.normal(size=s)) for s in ((16, 24), 24, (16, 3), (3, 24), (5, 16)))
    adapter = {"down": jnp.float32(down), "up": jnp.float32(up)}
    p = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias), "lora": adapter}
    result = precision.linear(p, jnp.float32(x), config)
    np.testing.assert_array_equal(result, cast(result))
    exact = x @ kernel + bias + cast(2 * (x @ down)) @ up
    # Half a unit in the last of 8 bits; where the product of the adapter's A is between two numbers, more.
    assert np.mean(np.abs(result - exact) <= 2.0**-8 * np.abs(exact)) > 0.97
