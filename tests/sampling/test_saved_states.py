"""Saved states of streams: the next block has the same bits with every kind of state, and other recipes are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import LoraConfig
from causvid_jax.models import adapters, transformer
from causvid_jax.models.image_branch import Picture
from causvid_jax.sampling import rolling, state_io, stream
from tests import tiny
from tests.refusals import refused
from tests.sampling.conftest import FIRST, PLAIN, WINDOW, next_blocks, prompt
from tests.tiny import changed


def saved_and_loaded(path, state, fresh, config):
    state_io.save_stream(path, state, config=config)
    return state_io.load_stream(path, fresh, config=config)


def test_a_saved_stream_continues_bit_for_bit(params, tmp_path):
    path, start = tmp_path / "stream.safetensors", lambda config: stream.init_stream(params, prompt(9), config=config)
    whole, _ = next_blocks(params, stream.init_stream(params, prompt(0), config=WINDOW), WINDOW, 8)
    first, state = next_blocks(params, stream.init_stream(params, prompt(0), config=WINDOW), WINDOW, 5)
    state = saved_and_loaded(path, state, start(WINDOW), WINDOW)
    rest, _ = next_blocks(params, state, WINDOW, 3)
    np.testing.assert_array_equal(np.stack(first + rest), np.stack(whole))
    refused("causal.window 5, now 0, causal.sink 2", state_io.load_stream, path, start(PLAIN), config=PLAIN)
    other = changed(WINDOW, student={"kv_cache": "int8"})
    refused(r"cache\.k is float32.* not int8", state_io.load_stream, path, start(other), config=other)
    adapted = dataclasses.replace(start(WINDOW), adapters=stream.Adapters(jnp.ones(2), prompt(9)))
    state_io.save_stream(path, adapted, config=WINDOW)
    refused(r"also holds adapters\.prompt_embeds, ", state_io.load_stream, path, start(WINDOW), config=WINDOW)
    refused("does not exist", state_io.load_stream, tmp_path / "nothing", start(WINDOW), config=WINDOW)


def adapted_case():
    """LoRAs, an int8 cache and int8 kernels, two prompts."""
    config = changed(WINDOW, student={"kv_cache": "int8", "linear": "int8"})
    net = dataclasses.replace(PLAIN.student, lora=LoraConfig(3))
    params = transformer.round_params(tiny.random_params(transformer.abstract(net), 1, 0.15), config.student)
    params = {"student": transformer.unstack(jax.tree.map(jnp.asarray, params), config.student)}
    assert adapters.has_adapters(params["student"])

    def start(seed, strength):
        state = stream.init_stream(params, prompt(seed, 2), config=config, seed=seed)
        return stream.set_adapters(params, state, jnp.full(3, strength), prompt(seed, 2), config=config)

    return params, config, start


def picture_case():
    """A picture and its CLIP tokens, bfloat16, no context pass, an independent first frame."""
    branch = {**tiny.BRANCH, "dtype": "bfloat16"}
    config = changed(FIRST, student=branch, causal={"context_pass": False}, train_causal={"prompt_switch_prob": 0.0})
    params = tiny.random_params(transformer.abstract(config.student), 1, 0.15)
    params = {"student": transformer.unstack(jax.tree.map(jnp.asarray, params), config.student)}

    def start(seed, strength):
        keys, shape = jax.random.split(jax.random.key(seed)), (1, *config.latent_shape[:3], 8)
        picture = Picture(jax.random.normal(keys[0], shape), strength * jax.random.normal(keys[1], (1, 5, 80)))
        return stream.init_stream(params, prompt(seed), config=config, seed=seed, picture=picture)

    return params, config, start


@pytest.mark.parametrize("case,count", [(adapted_case, 4), (picture_case, 0), (picture_case, 2)])
def test_everything_that_a_block_reads_is_saved(case, count, tmp_path):
    params, config, start = case()
    expected, _ = next_blocks(params, start(1, 0.7), config, count + 1)
    _, state = next_blocks(params, start(1, 0.7), config, count)
    state = saved_and_loaded(tmp_path / "stream.safetensors", state, start(2, -0.3), config)
    np.testing.assert_array_equal(next_blocks(params, state, config, 1)[0][0], expected[-1])


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"positions": "absolute"}, "causal.positions 'relative', now 'absolute'"),
        ({"window": 6, "sink": 1}, "causal.window 5, now 6, causal.sink 2, now 1"),
    ],
)
def test_a_state_of_the_same_shapes_that_is_read_otherwise_is_refused(params, changes, words, tmp_path):
    """Its keys are rotated or not, and its slots hold other frames: such states continued as noise."""
    other, state = changed(WINDOW, causal=changes), stream.init_stream(params, prompt(0), config=WINDOW)
    fresh = stream.init_stream(params, prompt(0), config=other)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, state)
    state_io.save_stream(tmp_path / "stream.safetensors", state, config=WINDOW)
    refused(words, state_io.load_stream, tmp_path / "stream.safetensors", fresh, config=other)


def test_noisy_blocks_are_not_left_behind_unnoticed(params, tmp_path):
    config = dataclasses.replace(PLAIN, rolling_blocks=2)
    state = rolling.init_rolling(params, prompt(0), config=config)
    refused("a RollingState cannot be saved; accepted", state_io.save_stream, tmp_path / "x", state, config=config)
