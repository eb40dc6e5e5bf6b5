"""The tiny codec: parity with PyTorch, chunks that equal the whole clip, causality, the published size."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import make_taehv as golden
import numpy as np
import pytest

from causvid_jax.checkpoints import load
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import ConfigError, TAEHVConfig, VAEConfig
from causvid_jax.models import taehv, vae

SMALL = TAEHVConfig(z_dim=3, encoder_dim=4, decoder_dims=(6, 5, 4, 3), blocks=1)
encode = jax.jit(functools.partial(taehv.encode, config=SMALL))
decode = jax.jit(functools.partial(taehv.decode, config=SMALL), static_argnames=("clamp",))


@functools.cache
def small_params():
    """Return parameters that are all random."""
    return load(golden.random_weights(network_of(SMALL).shapes(SMALL, "original"), 1), config=SMALL)[0]


def latents(frames, batch=1):
    return jax.random.normal(jax.random.key(2), (batch, frames, 2, 3, SMALL.z_dim))


def video(frames):
    return jax.random.uniform(jax.random.key(3), (1, frames, 8, 16, 3), minval=-1)


def test_equals_pytorch():
    arrays = dict(np.load(golden.GOLDEN))
    state = golden.random_weights(
        network_of(TAEHVConfig()).shapes(TAEHVConfig(**golden.SIZES), "original"), golden.SEED
    )
    errors = golden.errors_of(state, arrays)
    assert len(errors) == 4 and max(errors.values()) <= 1e-4, errors
    assert arrays["encoded"].std() > 0.1 and arrays["decoded"].std() > 0.5


@pytest.mark.parametrize("chunk", [1, 3])
def test_decoded_chunks_are_the_whole(chunk):
    z, traces = latents(6, batch=2), []

    @jax.jit
    def step(params, z, cache):
        traces.append(1)
        return taehv.decode_chunk(params, z, cache, config=SMALL)

    cache, frames = taehv.init_decode_cache(SMALL, batch=2, height=2, width=3), []
    for i in range(0, 6, chunk):
        out, cache = step(small_params(), z[:, i : i + chunk], cache)
        frames.append(out)
    whole = decode(small_params(), z)
    assert whole.shape == (2, 21, 16, 24, 3)
    np.testing.assert_allclose(np.concatenate(frames, axis=1)[:, 3:], whole, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("size", [4, 8])
def test_encoded_chunks_are_the_whole(size):
    frames, traces = video(16), []

    @jax.jit
    def step(params, frames, cache):
        traces.append(1)
        return taehv.encode_chunk(params, frames, cache, config=SMALL)

    cache, out = taehv.init_encode_cache(SMALL, batch=1, height=8, width=16), []
    for i in range(0, 16, size):
        z, cache = step(small_params(), frames[:, i : i + size], cache)
        out.append(z)
    np.testing.assert_allclose(np.concatenate(out, axis=1), encode(small_params(), frames), atol=1e-5)
    assert len(traces) == 1


def test_the_last_group_is_filled_with_its_last_frame():
    frames = video(5)
    filled = jnp.concatenate([frames, frames[:, -1:], frames[:, -1:], frames[:, -1:]], axis=1)
    short = encode(small_params(), frames)
    assert short.shape == (1, 2, 1, 2, SMALL.z_dim)
    np.testing.assert_array_equal(short, encode(small_params(), filled))


def test_the_future_does_not_change_the_past():
    z, frames = latents(4), video(12)
    free = functools.partial(decode, small_params(), clamp=False)
    seen, changed = free(z), free(z.at[:, 2:].add(1.0))
    np.testing.assert_array_equal(seen[:, :5], changed[:, :5])
    assert np.abs(seen[:, 5:] - changed[:, 5:]).max(axis=(0, 2, 3, 4)).min() > 1e-4
    seen, changed = encode(small_params(), frames), encode(small_params(), frames.at[:, 7:].set(0.5))
    np.testing.assert_array_equal(seen[:, :1], changed[:, :1])
    assert np.abs(seen[:, 1:] - changed[:, 1:]).max(axis=(0, 2, 3, 4)).min() > 1e-4


def test_clamp():
    loud = jax.tree.map(lambda x: x, small_params())
    loud["decoder"]["conv_out"]["bias"] = loud["decoder"]["conv_out"]["bias"] + np.float32([2.0, -2.0, 0.0])
    clamped, free = (decode(loud, latents(2), clamp=clamp) for clamp in (True, False))
    np.testing.assert_array_equal(clamped, np.clip(free, -1, 1))
    assert free.max() > 1 and free.min() < -1


def test_a_stream_can_show_its_frames_through_either_decoder():
    """Arguments, shapes and types are those of the large VAE; parameters and cache are its own."""
    for name in ("decode", "decode_chunk", "init_decode_cache", "encode", "time_factor", "space_factor"):
        ours, theirs = (list(inspect.signature(getattr(module, name)).parameters) for module in (taehv, vae))
        assert ours == theirs, name
    z = jax.ShapeDtypeStruct((2, 3, 4, 6, 3), jnp.float32)

    def shown(module, config):
        def both(params, z):
            cache = module.init_decode_cache(config, batch=2, height=4, width=6)
            return module.decode_chunk(params, z, cache, config=config)[0], module.decode(params, z, config=config)

        return jax.eval_shape(both, module.abstract(config), z)

    assert shown(taehv, SMALL) == shown(vae, VAEConfig(base_dim=2, z_dim=3))


def test_fresh_parameters_carry_signal_and_gradients_reach_all_of_them():
    config = dataclasses.replace(SMALL, encoder_dim=16, decoder_dims=(32, 24, 16, 16))
    params = taehv.init(jax.random.key(0), config)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), taehv.abstract(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == shapes

    def loss(params):
        out = taehv.decode(params, taehv.encode(params, video(5), config=config), config=config, clamp=False)
        return jnp.square(out).mean(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert out.shape == (1, 5, 8, 16, 3) and 0.05 < out.std() < 20
    silent = [path for path, g in jax.tree_util.tree_flatten_with_path(gradient)[0] if not np.any(g)]
    assert not silent and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_bfloat16_stays_close():
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    got = jax.jit(functools.partial(taehv.decode, config=half, clamp=False))(small_params(), latents(2))
    assert got.dtype == jnp.float32
    expected = decode(small_params(), latents(2), clamp=False)
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    cache = taehv.init_decode_cache(half, batch=1, height=2, width=3)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}


def test_the_published_size():
    """Count the parameters of the published network (taew2_1), and the bytes of its decoder's cache at 480 x 832."""
    tree = taehv.abstract(TAEHVConfig())
    counts = {net: sum(leaf.size for leaf in jax.tree.leaves(tree[net])) for net in tree}
    assert counts == {"encoder": 1_470_928, "decoder": 9_844_611}
    cache = jax.eval_shape(lambda: taehv.init_decode_cache(TAEHVConfig(), batch=1, height=60, width=104))
    expected = [(1, 1, 60, 104, 256), (1, 1, 120, 208, 128), (1, 1, 240, 416, 64)]
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [shape for shape in expected for _ in range(3)]
    assert (taehv.time_factor(TAEHVConfig()), taehv.space_factor(TAEHVConfig())) == (4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: taehv.encode(p, jnp.zeros((1, 4, 18, 16, 3)), config=SMALL), "18 x 16 .*multiples of 8"),
        (lambda p: taehv.encode(p, jnp.zeros((1, 4, 16, 16, 4)), config=SMALL), "16, 4\\) cannot .*height, width, 3"),
        (lambda p: taehv.decode(p, jnp.zeros((1, 2, 2, 2, 16)), config=SMALL), "\\(1, 2, 2, 2, 16\\).*h, w, 3"),
        (lambda p: taehv.encode_chunk(p, jnp.zeros((1, 5, 16, 16, 3)), None, config=SMALL), "5 frames .*accepted: 4n"),
        (
            lambda p: TAEHVConfig(temporal_upsample=(False, True, False)),
            "the same length and the same number of true entries",
        ),
        (lambda p: TAEHVConfig(decoder_dims=(8, 8)), "has 2 entries; 3 levels need 4"),
        (lambda p: TAEHVConfig(dtype="float16"), "taehv.dtype is 'float16'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call(small_params())
