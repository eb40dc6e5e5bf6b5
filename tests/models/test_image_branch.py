"""Image to video: parity with diffusers, the three forward modes with image tokens, the condition channels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import make_image_branch as golden
import numpy as np
import pytest
from make_transformer import random_weights

from causvid_jax.checkpoints import load, state_dict
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import CausalConfig, ConfigError, TransformerConfig
from causvid_jax.models import image_branch, transformer

PLAIN = TransformerConfig(
    dim=40, ffn_dim=24, num_heads=2, num_layers=2, in_channels=8, out_channels=2, text_dim=10, text_length=6
)
CONFIG = dataclasses.replace(PLAIN, image_dim=12, image_tokens=5)
CAUSAL = CausalConfig(2)


@functools.cache
def params():
    """Return parameters that are all random, also the head and the modulation tables."""
    state = random_weights(network_of(CONFIG).shapes(CONFIG, "original"), 1)
    return load(state, config=CONFIG)[0]


@functools.cache
def inputs():
    """Return two blocks of two frames, timesteps that are equal inside a block, text and image embeddings."""
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (2, 4, 4, 4, CONFIG.in_channels)),
        jnp.repeat(jax.random.uniform(keys[1], (2, 2), maxval=1000.0), 2, axis=1),
        jax.random.normal(keys[2], (2, CONFIG.text_length, CONFIG.text_dim)),
        jax.random.normal(keys[3], (2, CONFIG.image_tokens, CONFIG.image_dim)),
    )


block_causal = jax.jit(functools.partial(transformer.block_causal, config=CONFIG, causal=CAUSAL))
bidirectional = jax.jit(functools.partial(transformer.bidirectional, config=CONFIG))


def test_a_query_norm_that_nothing_reads_is_passed_over():
    state = state_dict(params(), CONFIG, "diffusers")
    state |= {f"blocks.{i}.attn2.norm_added_q.weight": np.ones(40, np.float32) for i in range(2)}
    jax.tree.map(np.testing.assert_array_equal, load(state, config=CONFIG)[0], params())


def test_an_image_branch_with_zero_values_is_the_network_without_one():
    plain = network_of(PLAIN).shapes(PLAIN, "original")
    state = state_dict(params(), CONFIG, "original")
    without = load({name: state[name] for name in plain}, config=PLAIN)[0]
    silent = jax.tree.map(lambda x: x, params())
    silent["blocks"]["cross_attn"]["v_img"] = jax.tree.map(jnp.zeros_like, params()["blocks"]["cross_attn"]["v_img"])
    x, t, text, image = inputs()
    expected = jax.jit(functools.partial(transformer.bidirectional, config=PLAIN))(without, x, t, text)
    np.testing.assert_allclose(bidirectional(silent, x, t, text, image), expected, atol=1e-6)
    assert np.abs(bidirectional(params(), x, t, text, image) - expected).max() > 0.1


def test_the_three_readings_agree():
    x, t, text, image = inputs()
    causal = block_causal(params(), x, t, text, image)
    alone = bidirectional(params(), x[:, :2], t[:, :2], text, image)
    np.testing.assert_allclose(causal[:, :2], alone, atol=1e-5)

    prompt = jax.jit(functools.partial(transformer.encode_text, config=CONFIG))(params(), text, image)
    assert prompt.image_k.shape == prompt.image_v.shape == (2, 2, CONFIG.image_tokens, 2, 20)
    step = jax.jit(functools.partial(transformer.cached, config=CONFIG, causal=CAUSAL))
    cache, parts = transformer.init_cache(CONFIG, CAUSAL, batch=2, height=4, width=4, frames=4), []
    for start in (0, 2):
        part = slice(start, start + 2)
        velocity, cache = step(params(), x[:, part], t[:, part], prompt, cache)
        cache = transformer.advance(cache, 2)
        parts.append(velocity)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), causal, atol=1e-5)


def test_teacher_forcing_sees_the_image_too():
    """The first noisy block attends to no clean one, so it equals the first block without clean copies."""
    x, t, text, image = inputs()
    forced = jax.jit(functools.partial(transformer.block_causal, config=CONFIG, causal=CAUSAL))(
        params(), x, t, text, image, clean=x[::-1]
    )
    np.testing.assert_allclose(forced[:, :2], block_causal(params(), x, t, text, image)[:, :2], atol=1e-5)


def test_the_condition_equals_diffusers():
    assert golden.condition_errors(dict(np.load(golden.GOLDEN))) == [0.0, 0.0]


def test_the_condition_channels():
    latents = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 5))
    made = image_branch.image_condition(latents, known_frames=(0, 6))
    assert made.shape == (2, 3, 4, 6, 9)
    np.testing.assert_array_equal(made[..., 4:], latents)
    # Latent frame 2 holds pixel frames 5, 6, 7, 8.
    expected = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    np.testing.assert_array_equal(made[..., :4], np.broadcast_to(expected[None, :, None, None], (2, 3, 4, 6, 4)))
    assert image_branch.image_condition(latents)[..., :4].sum() == 2 * 4 * 4 * 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, t, text, image: transformer.bidirectional(params(), x, t, text, config=CONFIG),
            "shape None do not fit .*accepted: \\[batch, 5, 12\\]",
        ),
        (
            lambda x, t, text, image: transformer.encode_text(params(), text, image[:, :4], config=CONFIG),
            "shape \\(2, 4, 12\\) do not fit .*accepted: \\[batch, 5, 12\\]",
        ),
        (
            lambda x, t, text, image: transformer.bidirectional(params(), x, t, text, image, config=PLAIN),
            "shape \\(2, 5, 12\\) .*accepted: none .*image_dim = 0",
        ),
        (
            lambda x, t, text, image: transformer.bidirectional(params(), x[..., :2], t, text, image, config=CONFIG),
            "has 2 channels; this transformer requires 8",
        ),
        (
            lambda x, t, text, image: image_branch.image_condition(x, known_frames=(0, 13)),
            "\\(0, 13\\); a video of 4 latent frames has pixel frames 0 to 12",
        ),
        (lambda *_: TransformerConfig(image_dim=-1), "image_dim is -1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call(*inputs())
