"""Keys and values in 8 bits: the error against numpy, the bytes, and all operations of a stream on its cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import causvid_jax as cv
from causvid_jax.config import CausalConfig, ConfigError
from causvid_jax.config.recipes import load_recipe
from causvid_jax.distill import rollout
from causvid_jax.models import quantization, transformer
from causvid_jax.sampling import exported, player, state_io, stream, weights
from causvid_jax.training import stages
from tests import tiny

CAUSAL = CausalConfig(frames_per_block=1, window=3, sink=1)
FULL = dataclasses.replace(tiny.RECIPE, causal=CAUSAL)
INT8 = dataclasses.replace(FULL, student=dataclasses.replace(FULL.student, kv_cache="int8"))
TOLERANCE = 0.02
"""Return the root mean square difference of the latents of a stream, over their standard deviation."""


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return cv.load(FULL, checkpoint=tiny.tiny_workdir(tmp_path_factory.mktemp("run"), examples=1))


def with_int8(pipe, causal=CAUSAL):
    return dataclasses.replace(pipe, config=dataclasses.replace(INT8, causal=causal))


def test_rounding_is_that_of_numpy():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 2, 6)).astype(np.float32) * np.geomspace(1e-3, 1e3, 6)
    x[:, :, :, 1, 2] = 0.0
    q, scale = jax.jit(quantization.quantize, static_argnums=1)(jnp.asarray(x, jnp.float32), quantization.TOKENS)
    expected = np.abs(x).max(2, keepdims=True) / 127
    assert q.dtype == jnp.int8 and scale.shape == (2, 3, 1, 2, 6)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    assert np.all(np.abs(q * scale - x) <= expected * 0.5001)
    assert np.abs(np.asarray(q)).max(2).min() == 0 and np.abs(np.asarray(q)).max() == 127
    keys, values = quantization.readable((q, q, scale, scale), "bfloat16")
    assert keys.dtype == jnp.bfloat16 and np.array_equal(keys, values)


def test_bytes_of_the_published_size_are_halved():
    recipe = load_recipe("wan_1_3b")
    sizes = {}
    for kind in ("dtype", "int8"):
        net = dataclasses.replace(recipe.student, kv_cache=kind)
        make = functools.partial(
            transformer.init_cache, net, recipe.causal, batch=1, height=60, width=104, frames=21, unstacked=True
        )
        arrays = jax.eval_shape(make).arrays
        sizes[kind] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    values = 30 * 2 * 21 * 1560 * 1536
    assert sizes == {"dtype": 2 * values, "int8": values + 4 * values // 1560}  # 6.04 and 3.03 GB


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_stream_is_that_of_the_full_cache_within_the_tolerance(pipe, positions):
    """Window, sink, a switch with recomputation, and a clip that is followed; stacked and unstacked layers alike."""
    causal = dataclasses.replace(CAUSAL, positions=positions)
    red, blue = (pipe.encode_prompt([text]) for text in ("a red 3 moving left", "a blue 7 moving up"))
    shown = {}
    for name, recipe, params in (
        ("full", FULL, pipe.params),
        ("int8", INT8, pipe.params),
        ("stacked", INT8, pipe.params | {"student": tiny_student()}),
    ):
        recipe = dataclasses.replace(recipe, causal=causal)
        if name != "stacked":
            params = params | {"student": transformer.unstack(jax.tree.map(jnp.asarray, tiny_student()), FULL.student)}
        state = stream.init_stream(params, red, config=recipe, seed=1)
        latents = []
        for block in range(7):
            if block == 5:
                state = stream.change_prompt(params, state, blue, config=recipe)
            x, state = stream.next_block(params, state, config=recipe)
            latents.append(np.asarray(x))
        shown[name] = np.stack(latents)
    scale = shown["full"].std()
    np.testing.assert_array_equal(shown["int8"][0], shown["full"][0])  # a first block sees nothing but itself
    error = np.sqrt(np.square(shown["int8"] - shown["full"]).mean()) / scale
    assert 0 < error < TOLERANCE
    assert np.sqrt(np.square(shown["int8"] - shown["stacked"]).mean()) / scale < TOLERANCE / 4


@functools.cache
def tiny_student():
    return tiny.random_transformer(FULL.student, 3, 0.15)


def test_forks_saved_streams_clips_and_programs_have_the_same_bits(pipe, tmp_path):
    pipe = with_int8(pipe)
    state = pipe.stream("a red 3 moving left", seed=2)
    assert {leaf.dtype for leaf in (*state.cache.k, *state.cache.v)} == {jnp.dtype("int8")}
    clip = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    for _, state in pipe.extend(state, clip):  # noqa: B007, B020
        pass
    fork = stream.copy_stream(state)
    state_io.save_stream(tmp_path / "state.safetensors", state, config=pipe.config)
    (expected, _), *_ = pipe.frames(state, blocks=1)
    (forked, _), *_ = pipe.frames(fork, blocks=1)
    fresh = pipe.stream("a blue 7 moving up", seed=4)
    state = state_io.load_stream(tmp_path / "state.safetensors", fresh, config=pipe.config)
    (loaded, _), *_ = pipe.frames(state, blocks=1)
    np.testing.assert_array_equal(forked, expected)
    np.testing.assert_array_equal(loaded, expected)
    other = dataclasses.replace(pipe, config=FULL).stream("a blue 7 moving up")
    with pytest.raises(ConfigError, match=r"does not fit this recipe: cache\.k\.0 is int8\[.*, not float32\["):
        state_io.load_stream(tmp_path / "state.safetensors", other, config=FULL)


@pytest.mark.slow
def test_a_program_has_the_same_bits(pipe, tmp_path):
    header, made = exported.build(INT8, "cpu")
    exported.save(tmp_path / "x.program", header, made)
    loaded = exported.load(tmp_path / "x.program", INT8, batch=1, latents=4)
    params = weights.for_stream(pipe.params, INT8)
    text = np.asarray(pipe.encode_prompt(["a red 3 moving left"]))
    given = {"config": INT8, "frames": 13, "seed": 5, "switches": {2: text[:, ::-1]}}
    traced = list(player.play(params, text, **given))
    for a, b in zip(player.play(params, text, loaded=loaded, **given), traced, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="student.kv_cache = 'int8', and the recipe has 'dtype'"):
        exported.load(tmp_path / "x.program", FULL, batch=1, latents=4)


def test_training_refuses_it(tmp_path):
    with pytest.raises(ConfigError, match="student.kv_cache is 'int8', which is for sampling"):
        stages.train("distill", INT8, tmp_path)
    with pytest.raises(ConfigError, match="the student's kv_cache is 'int8' in a self rollout; accepted: 'dtype'"):
        rollout.Rollout(INT8.student, CAUSAL, (1000.0,))
