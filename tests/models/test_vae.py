"""The video VAE: parity with diffusers, normalisation, gradients, convolutions, the published size."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_codecs import SMALL_VAE, params_of, video

from causvid_jax.checkpoints import load
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, ConfigError, VAEConfig
from causvid_jax.models import conv, vae

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
decode = jax.jit(vae.decode, static_argnames=("config",))
moments = jax.jit(vae.encode_moments, static_argnames=("config",))


@functools.cache
def golden():
    """(config, diffusers state dict, inputs and outputs) of tests/golden/make_vae.py."""
    spec = importlib.util.spec_from_file_location("make_vae", GOLDEN / "make_vae.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config, arrays = VAEConfig(**script.SIZES), np.load(GOLDEN / "vae.npz")
    shapes = network_of(config).shapes(config, "diffusers")
    assert sorted(shapes) == list(arrays["names"])
    return config, script.random_weights(shapes, script.SEED), arrays


def test_encode_matches_diffusers():
    config, state, arrays = golden()
    mean, logvar = moments(load(state, config=config)[0], arrays["video"], config=config)
    np.testing.assert_allclose(mean, arrays["mean"], atol=1e-4)
    np.testing.assert_allclose(logvar, arrays["logvar"], atol=1e-4)
    assert arrays["mean"].std() > 0.3


def test_decode_matches_diffusers():
    config, state, arrays = golden()
    got = decode(load(state, config=config)[0], arrays["latents"], config=config)
    np.testing.assert_allclose(got, arrays["decoded"], atol=1e-4)
    assert arrays["decoded"].std() > 0.3


def test_normalisation():
    both = jax.jit(lambda p, v: (vae.encode_moments(p, v, config=SMALL_VAE)[0], vae.encode(p, v, config=SMALL_VAE)))
    mean, normalised = both(params_of("vae"), video(5))
    expected = (np.asarray(mean) - np.float32([0.1, 0.2, -0.3])) / np.float32([0.5, 2.0, 1.0])
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)
    assert len(WAN_LATENT_MEAN) == len(WAN_LATENT_STD) == VAEConfig().z_dim
    assert (WAN_LATENT_MEAN[0], WAN_LATENT_STD[-1]) == (-0.7571, 1.9160)


def test_gradients_are_finite_and_reach_every_parameter():
    """A black clip gives exact zeros before norms, where a norm without a lower limit has a NaN gradient."""
    frames = jnp.zeros((1, 5, 8, 16, 3))
    zeroed = jax.tree.map(lambda x: x, params_of("vae"))
    zeroed["encoder"]["conv1"]["bias"] = jnp.zeros(SMALL_VAE.base_dim)

    def loss(params, frames):
        mean, logvar = vae.encode_moments(params, frames, config=SMALL_VAE)
        out = vae.decode(params, vae.normalize(mean, SMALL_VAE), config=SMALL_VAE, clamp=False)
        return jnp.abs(out - 0.2).mean() + jnp.square(logvar).mean()

    gradient = jax.jit(jax.grad(loss))
    for params, clip in ((zeroed, frames), (params_of("vae"), video(5))):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(params, clip)))
    silent = [path for path, g in jax.tree_util.tree_flatten_with_path(gradient(params, clip))[0] if not np.any(g)]
    assert not silent


def test_both_convolution_methods_agree():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 3, 2, 5)), "bias": jnp.arange(5.0)}
    x, past = (
        jax.random.normal(jax.random.key(1), (2, 4, 5, 6, 2)),
        jax.random.normal(jax.random.key(2), (2, 2, 5, 6, 2)),
    )
    (a, past_a), (b, past_b) = (conv.causal_conv(params, x, past, method=m) for m in ("taps", "volume"))
    np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_array_equal(past_a, x[:, -2:])
    np.testing.assert_array_equal(past_b, x[:, -2:])
    padded = np.pad(np.concatenate([past, x], 1), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.einsum("tijc,tijcd->d", padded[1, 3:6, 2:5, 4:7], params["kernel"]) + params["bias"]
    np.testing.assert_allclose(a[1, 3, 2, 4], expected, atol=1e-4)
    time = {"kernel": jax.random.normal(jax.random.key(3), (3, 1, 1, 2, 5)), "bias": jnp.zeros(5)}
    a, b = (conv.temporal_conv(time, x, stride=2, method=m) for m in ("taps", "volume"))
    assert a.shape == (2, 1, 5, 6, 5)
    np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ConfigError, match="'im2col'.*'taps', 'volume'"):
        conv.temporal_conv(time, x, method="im2col")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_upsampling_and_convolution_are_one_convolution_of_the_small_frames(dtype, tolerance):
    """Compare with the doubled frames, also at the borders, where the kernel reads zeros."""
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (2, 3, 4, 5, 6))
    params = {"kernel": jax.random.normal(keys[1], (3, 3, 6, 7)), "bias": jax.random.normal(keys[2], (7,))}
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    expected = conv.conv2d(params, doubled)
    ours = conv.upsampled_conv2d(params, x.astype(dtype))
    assert ours.dtype == dtype and ours.shape == (2, 3, 8, 10, 7)
    np.testing.assert_allclose(ours, expected, atol=tolerance * float(jnp.abs(expected).max()))


def test_a_single_image_takes_the_last_tap_only():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((3, 3, 3, 4, 5)), "bias": rng.standard_normal(5)}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x = jnp.asarray(rng.standard_normal((2, 1, 8, 8, 4)), jnp.float32)
    y, past = conv.causal_conv(params, x)
    expected, expected_past = conv.causal_conv(params, x, jnp.zeros((2, 2, 8, 8, 4)))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(past, expected_past)


def test_the_published_size():
    """Count the parameters of the published checkpoint, and compare cache shapes with the published decoder's."""
    tree = vae.abstract(VAEConfig())

    def count(tree):
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    assert (count(tree), len(jax.tree.leaves(tree))) == (126_892_531, 194)
    assert (count(tree["encoder"]), count(tree["decoder"])) == (53_595_872, 73_295_331)
    cache = jax.eval_shape(lambda: vae.init_decode_cache(VAEConfig(), batch=1, height=60, width=104))
    shapes = [leaf.shape for leaf in jax.tree.leaves(cache.past)]
    size = {(60, 104): {16: 1, 384: 11}, (120, 208): {192: 1, 384: 6}, (240, 416): {192: 6}, (480, 832): {96: 7}}
    expected = [(1, 2, *hw, width) for hw, widths in size.items() for width, n in widths.items() for _ in range(n)]
    assert sorted(shapes) == sorted(expected)


def test_the_shapes_of_a_cache_are_traced_once(monkeypatch):
    """Every stream, clip and memory plan needs them before its first frame."""
    calls, causal_conv = [], conv.causal_conv
    monkeypatch.setattr(conv, "causal_conv", lambda *args: calls.append(args) or causal_conv(*args))
    caches = [vae.init_decode_cache(SMALL_VAE, batch=1, height=5, width=7) for _ in range(2)]
    first, second = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache.past) for cache in caches)
    convolutions = len(jax.tree.leaves(caches[0].past))  # each keeps its last input frames
    assert first == second and len(calls) == convolutions > 1
