"""A stream whose context pass reads noise: the block itself is the same, and the cache is that of the noisy block."""

import jax.numpy as jnp
import numpy as np

from causvid_jax.models import transformer
from causvid_jax.sampling import stream
from tests import tiny


def test_the_cache_of_a_stream_holds_the_block_with_noise():
    streams = {}
    for mode in ("training", "always"):
        recipe = tiny.tiny_recipe(causal={"context_noise": 200.0, "add_context_noise": mode})
        params = {"student": tiny.random_transformer(recipe.student)}
        text = jnp.ones((1, recipe.text.length, recipe.text.dim))
        state = stream.init_stream(params, text, config=recipe, seed=3)
        before = stream.copy_stream(state)
        streams[mode] = stream.next_block(params, state, config=recipe)
    x0, after = streams["always"]
    np.testing.assert_allclose(x0, streams["training"][0], atol=1e-6)
    # Two denoising steps draw noise 0 and 1, so that the context pass draws noise 2.
    noise = stream.block_noise(before.seed, before.block, 2, x0.shape[1:])
    networks = {"config": recipe.student, "causal": recipe.causal}
    for latents, end in ((0.8 * x0 + 0.2 * noise, after), (x0, streams["training"][1])):
        _, cache = transformer.cached(
            params["student"], latents, jnp.full((1, 1), 200.0), before.text, before.cache, **networks
        )
        np.testing.assert_allclose(end.cache.k[:, :, 0], cache.k[:, :, 0], atol=1e-5)
