"""The cache of the splash kernel: heads first, whole blocks of tokens. A stream shows what the plain cache shows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ParallelConfig
from causvid_jax.models import attention, kv_cache, rope, transformer
from causvid_jax.sampling import state_io, stream
from causvid_jax.sharding import constraints, placement
from causvid_jax.sharding.mesh import make_mesh
from tests.sampling.conftest import FIRST, PLAIN, WINDOW, next_blocks, prompt
from tests.tiny import changed, random_params

PLAIN, FIRST = (changed(recipe, student={"attention": "xla"}) for recipe in (PLAIN, FIRST))
SINK = changed(WINDOW, student={"attention": "xla"}, causal={"positions": "absolute"})
TOKENS = (PLAIN.latent_size[0] // 2) * (PLAIN.latent_size[1] // 2)


@pytest.fixture(autouse=True)
def _splash_in_float32(monkeypatch):
    """Resolve "auto" to the splash kernel, which is interpreted here and then computes in float32."""
    monkeypatch.setattr(attention, "resolve", lambda backend, _: "splash" if backend == "auto" else backend)


def by_splash(recipe):
    return changed(recipe, name="splash", student={"attention": "auto"})  # the name: other tests have other programs


def unstacked(params, config):
    return {**params, "student": transformer.unstack(params["student"], config.student)}


def begun(params, config, seed=0):
    return stream.init_stream(params, prompt(seed, 2), config=config, seed=3)


@pytest.mark.parametrize(
    ("config", "blocks"), [(PLAIN, 2), (SINK, 5), (FIRST, 3)], ids=["clip", "ring and sink", "first frame"]
)
def test_a_stream_equals_that_of_the_plain_cache(params, config, blocks):
    params = unstacked(params, config)
    expected, plain = next_blocks(params, begun(params, config), config, blocks)
    shown, state = next_blocks(params, begun(params, by_splash(config)), by_splash(config), blocks)
    np.testing.assert_allclose(np.concatenate(shown, 1), np.concatenate(expected, 1), atol=2e-4)
    net, slots = config.student, len(state.cache.frame)
    assert {x.shape for x in state.cache.k} == {(2, net.num_heads, 128, net.head_dim)}  # one block of the kernel
    seen = kv_cache.frame_major(state.cache, TOKENS)
    assert {x.shape for x in seen.v} == {(2, slots, TOKENS, net.num_heads, net.head_dim)}
    for one, other in zip((*seen.k, *seen.v), (*plain.cache.k, *plain.cache.v), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_a_new_prompt_with_a_recomputed_cache(params):
    params, shown = unstacked(params, SINK), []
    for config in (SINK, by_splash(SINK)):
        _, state = next_blocks(params, begun(params, config), config, 4)
        state = stream.switch_prompt(params, state, prompt(5, 2), config=config)
        state = stream.recompute_context(params, state, config=config)
        shown.append(np.concatenate(next_blocks(params, state, config, 2)[0], 1))
    np.testing.assert_allclose(shown[1], shown[0], atol=2e-4)


def test_a_stream_goes_on_with_the_other_kernel(params, tmp_path):
    params, path = unstacked(params, SINK), tmp_path / "stream.safetensors"
    expected, _ = next_blocks(params, begun(params, SINK), SINK, 5)
    for before, after in ((SINK, by_splash(SINK)), (by_splash(SINK), SINK), (by_splash(SINK), by_splash(SINK))):
        _, state = next_blocks(params, begun(params, before), before, 3)
        kept = jax.tree.map(np.asarray, state.cache)
        state_io.save_stream(path, state, config=before)
        state = state_io.load_stream(path, begun(params, after), config=after)
        if before == after:
            jax.tree.map(np.testing.assert_array_equal, state.cache, kept)
        shown, _ = next_blocks(params, state, after, 2)
        np.testing.assert_allclose(np.concatenate(shown, 1), np.concatenate(expected[3:], 1), atol=2e-4)


def test_padded_tokens_are_never_seen(params):
    """Keys and values after the last slot do not reach a result, whatever they are."""
    config = by_splash(SINK)
    params = unstacked(params, config)
    _, state = next_blocks(params, begun(params, config), config, 3)
    used = len(state.cache.frame) * TOKENS
    keys = tuple(x.at[:, :, used:].set(jnp.nan) for x in state.cache.k)
    values = tuple(x.at[:, :, used:].set(1e4) for x in state.cache.v)  # of weight 0; 0 times NaN would be NaN
    cache = dataclasses.replace(state.cache, k=keys, v=values)
    expected, _ = next_blocks(params, stream.copy_stream(state), config, 1)
    shown, _ = next_blocks(params, dataclasses.replace(state, cache=cache), config, 1)
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_splits_the_heads(params):
    heads = {"dim": 24, "num_heads": 4}
    config = by_splash(changed(SINK, teacher=heads, student=heads, train_vae={"curriculum": ()}))
    net, parallel, shown = config.student, ParallelConfig(tensor=2, context=2), []
    weights = {"student": random_params(transformer.abstract(net), 1, 0.15), "vae": params["vae"]}
    recipe = dataclasses.replace(config, parallel=parallel)
    places = placement.Placement(), placement.Placement(make_mesh(parallel, jax.devices()[:4]), net.rules)
    for place in places:
        with place.current():
            placed = placement.stream_params(weights, transformer.spec(net), net.rules, place)
            placed = {**placed, "student": transformer.unstack(placed["student"], net)}
            state = stream.init_stream(placed, prompt(0), config=recipe, seed=3)
            blocks, state = next_blocks(placed, state, recipe, 4)
            shown.append(np.concatenate(blocks, 1))
    np.testing.assert_allclose(shown[1], shown[0], atol=2e-4)
    assert {x.addressable_shards[0].data.shape for x in state.cache.k} == {(1, 1, 128, net.head_dim)}


def test_which_caches_have_heads_first(monkeypatch):
    monkeypatch.undo()
    net, causal = changed(PLAIN.student, attention="splash", dtype="bfloat16"), CausalConfig(3, window=5, sink=2)
    assert kv_cache.is_head_major(net, causal)
    assert not kv_cache.is_head_major(net, dataclasses.replace(causal, positions="relative"))
    assert not kv_cache.is_head_major(dataclasses.replace(net, kv_cache="int8"), causal)
    auto = dataclasses.replace(net, attention="auto")
    for platform, expected in (("tpu", True), ("cuda", False), ("cpu", False)):
        with constraints.lowering_for(platform):
            assert kv_cache.is_head_major(auto, causal) == expected
            make = functools.partial(kv_cache.init_cache, auto, causal, batch=1, height=4, width=4)
            assert len(jax.eval_shape(functools.partial(make, unstacked=True)).k[0].shape) == (4 if expected else 5)
            assert len(jax.eval_shape(make).k.shape) == 6


def test_exchanged_halves_are_rotated_to_the_same_numbers():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 2, 12)).astype(np.float32)
    rotation = rope.rotation(jnp.arange(3), rows=2, columns=2, head_dim=12, theta=50.0)
    expected = rope.rotate(x, rotation, halves=True)
    np.testing.assert_array_equal(rope.rotate(x, rotation, halves=True, exchange=True), expected)
