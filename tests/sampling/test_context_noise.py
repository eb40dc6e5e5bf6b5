"""What the cache of a stream holds: the block with noise, or the keys of the last denoising step."""

import jax.numpy as jnp
import numpy as np

from causvid_jax.diffusion import flow
from causvid_jax.models import transformer
from causvid_jax.sampling import schedule, stream
from tests import tiny


def start(**causal):
    """Return the tiny recipe with causal settings, random weights, a stream before its first block, and a copy."""
    recipe = tiny.tiny_recipe(causal=causal)
    params = {"student": tiny.random_transformer(recipe.student)}
    text = jnp.ones((1, recipe.text.length, recipe.text.dim))
    state = stream.init_stream(params, text, config=recipe, seed=3)
    return recipe, params, state, stream.copy_stream(state)


def test_the_cache_of_a_stream_holds_the_block_with_noise():
    streams = {}
    for mode in ("training", "always"):
        recipe, params, state, before = start(context_noise=200.0, add_context_noise=mode)
        streams[mode] = stream.next_block(params, state, config=recipe)
    x0, after = streams["always"]
    np.testing.assert_allclose(x0, streams["training"][0], atol=1e-6)
    noise = stream.block_noise(before.seed, before.block, stream.CONTEXT_STEP, x0.shape[1:])
    networks = {"config": recipe.student, "causal": recipe.causal}
    for latents, end in ((0.8 * x0 + 0.2 * noise, after), (x0, streams["training"][1])):
        _, cache = transformer.cached(
            params["student"], latents, jnp.full((1, 1), 200.0), before.text, before.cache, **networks
        )
        np.testing.assert_allclose(end.cache.k[:, :, 0], cache.k[:, :, 0], atol=1e-5)


def test_without_a_context_pass_the_keys_and_values_of_the_last_step_stay():
    recipe, params, state, before = start(context_pass=False)
    result, end = stream.next_block(params, state, config=recipe)
    cache, x0 = before.cache, jnp.zeros_like(result)
    for step, timestep in enumerate(flow.student_timesteps(recipe.diffusion)):
        sigma = timestep / 1000
        x = (1 - sigma) * x0 + sigma * stream.block_noise(before.seed, before.block, step, x0.shape[1:])
        velocity, cache = transformer.cached(
            params["student"],
            x,
            jnp.full((1, 1), timestep),
            before.text,
            cache,
            config=recipe.student,
            causal=recipe.causal,
        )
        x0 = x - sigma * velocity
    assert schedule.passes_per_block(recipe) == 2
    np.testing.assert_allclose(result, x0, atol=1e-5)
    np.testing.assert_allclose(end.cache.k, cache.k, atol=1e-5)
    np.testing.assert_allclose(end.cache.v, cache.v, atol=1e-5)
