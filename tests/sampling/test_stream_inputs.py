"""What the pure functions of a stream do with arguments of other shapes, types and ranges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.models import conv
from causvid_jax.sampling import stream
from tests.refusals import refused
from tests.sampling.conftest import PLAIN, prompt


def test_embeddings_seeds_and_pixels_of_another_kind_are_refused(params):
    """Fewer tokens leave out padding, a fraction of a seed was dropped, and bytes are no pixels in [-1, 1]."""
    text, image = prompt(0), np.zeros((1, 5, 16, 16, 3), np.uint8)
    state = jax.eval_shape(lambda: stream.init_stream(params, text, config=PLAIN))
    change = functools.partial(stream.change_prompt, config=PLAIN)
    for wrong in (text[0], text[:, :-1], text[:0]):
        refused("the prompt embeddings have shape", stream.init_stream, params, wrong, config=PLAIN)
    refused("the prompt embeddings have shape", jax.eval_shape, change, params, state, text[:, :-1])
    for seed in (1.7, "x", [1.0]):
        refused("seed is .*; accepted: whole numbers", stream.init_stream, params, text, config=PLAIN, seed=seed)
    np.testing.assert_array_equal(stream.seeds_of(2**70 + 5, 2), [5, 6])
    np.testing.assert_array_equal(stream.seeds_of(-1, 2), [2**32 - 1, 0])
    refused("a video of type uint8 cannot be encoded", conv.check_video, image, time=4, space=4, starts=True)


def test_a_step_outside_the_schedule_is_the_nearest_one(params):
    """Without denoising the block was not written to the cache."""
    given = jax.random.normal(jax.random.key(9), (1, 2, 4, 4, 4))
    blocks = {}
    for start in (-1, 0, 3, 9):
        state = stream.init_stream(params, prompt(0), config=PLAIN, seed=5)
        _, state = stream.next_block_from(params, state, given, start, config=PLAIN)
        blocks[start], _ = stream.next_block(params, state, config=PLAIN)
    np.testing.assert_array_equal(blocks[-1], blocks[0])
    np.testing.assert_array_equal(blocks[9], blocks[3])


def test_noise_of_half_precision_is_read(params):
    noise = jnp.full((4, 1, 2, *PLAIN.latent_size, PLAIN.vae.z_dim), 0.5)
    start = lambda: stream.init_stream(params, prompt(0), config=PLAIN)  # noqa: E731
    want, _ = stream.next_block(params, start(), config=PLAIN, noise=noise)
    got, _ = stream.next_block(params, start(), config=PLAIN, noise=noise.astype(jnp.float16))
    np.testing.assert_allclose(got, want, atol=1e-6)  # another program, which rounds differently
