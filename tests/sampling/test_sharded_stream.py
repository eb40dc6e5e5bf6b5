"""A stream on a mesh of four pretended devices shows what one device shows, and no device holds the whole of it."""

import dataclasses

import jax
import numpy as np
import pytest

from causvid_jax.config import ParallelConfig
from causvid_jax.models import transformer
from causvid_jax.sampling import stream
from causvid_jax.sharding import placement
from causvid_jax.sharding.mesh import make_mesh
from tests.sampling.conftest import WINDOW, prompt
from tests.tiny import changed, random_params

pytestmark = pytest.mark.usefixtures("compiled_anew")

HEADS = {"dim": 24, "num_heads": 4}
RECIPE = changed(WINDOW, teacher=HEADS, student=HEADS, train_vae={"curriculum": ()})
NET = RECIPE.student
MESHES = {
    "tensor 2 x context 2": ParallelConfig(tensor=2, context=2),
    "context 4": ParallelConfig(context=4),
    "tensor 4": ParallelConfig(tensor=4),
}


def show(params, recipe, place):
    """Latents and frames of four blocks, the prompt switched on the way, and the state after them."""
    rows = [np.asarray(prompt(seed)) for seed in (0, 1)]
    with place.current():
        params = placement.stream_params(params, transformer.spec(NET), NET.rules, place)
        state = stream.init_stream(params, rows[0], config=recipe, seed=3)
        start = state.cache.k.addressable_shards[0].data.shape
        shown = []
        for i in range(4):
            if i == 2:
                state = stream.recompute_context(
                    params, stream.switch_prompt(params, state, rows[1], config=recipe), config=recipe
                )
            latents, frames, state = stream.next_frames(params, state, config=recipe)
            shown += [np.asarray(latents), np.asarray(frames)]
    return shown, start, state


@pytest.fixture(scope="module")
def alone(params):
    params = {"student": random_params(transformer.abstract(NET), 1, 0.15), "vae": params["vae"]}
    return params, show(params, RECIPE, placement.Placement())[0]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_sharded_stream_shows_the_same(alone, mesh, capfd):
    params, expected = alone
    recipe = dataclasses.replace(RECIPE, parallel=MESHES[mesh])
    place = placement.Placement(make_mesh(recipe.parallel, jax.devices()[:4]), NET.rules)
    shown, start, state = show(params, recipe, place)
    for one, other in zip(shown, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-5)
    # One head of four on each device, from the first to the last block.
    held = (NET.num_layers, 1, 7, 4, 1, NET.head_dim)
    assert start == held and state.cache.k.addressable_shards[0].data.shape == held
    assert "rematerialization" not in capfd.readouterr().err


def test_a_device_holds_its_own_streams_only(alone):
    """Prompts and caches of two streams over data 2, and the same latents as without a mesh."""
    params, _ = alone
    recipe = dataclasses.replace(RECIPE, parallel=ParallelConfig(data=2, context=2))
    place = placement.Placement(make_mesh(recipe.parallel, jax.devices()[:4]), NET.rules)
    rows = prompt(0, batch=2)

    def two_blocks(params, recipe):
        state = stream.init_stream(params, rows, config=recipe)
        sizes = [x.addressable_shards[0].data.shape[1] for x in (state.text.k, state.text.v, state.cache.k)]
        first, state = stream.next_block(params, state, config=recipe)
        second, state = stream.next_block(params, state, config=recipe)
        sizes += [x.addressable_shards[0].data.shape[1] for x in (state.text.k, state.cache.k)]
        return np.concatenate([first, second], axis=1), sizes

    expected, _ = two_blocks(params, RECIPE)
    with place.current():
        latents, sizes = two_blocks(placement.stream_params(params, transformer.spec(NET), NET.rules, place), recipe)
    assert sizes == [1] * 5
    np.testing.assert_allclose(latents, expected, atol=1e-5 * np.abs(expected).max())
