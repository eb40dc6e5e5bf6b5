"""The video VAE: parity with diffusers, chunks that equal the whole clip, causality, the published size."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.checkpoints import load
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, ConfigError, VAEConfig
from causvid_jax.models import conv, vae

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# Two levels, both in time as well: every kind of layer except the spatial-only resampling, which the golden has.
SMALL = VAEConfig(
    base_dim=4,
    z_dim=3,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    latent_mean=(0.1, 0.2, -0.3),
    latent_std=(0.5, 2.0, 1.0),
)
encode = jax.jit(vae.encode, static_argnames=("config",))
decode = jax.jit(vae.decode, static_argnames=("config",))
encode_chunk = jax.jit(vae.encode_chunk, static_argnames=("config", "first"))
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


@functools.cache
def small_params():
    """Return random parameters of SMALL, gammas too; the head's kernel is so small that no output is clamped."""
    leaves, structure = jax.tree.flatten(vae.init(jax.random.key(0), SMALL))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(structure, leaves)
    params["decoder"]["head"]["conv"]["kernel"] *= 0.3
    return params


def latents(frames, batch=1):
    return jax.random.normal(jax.random.key(2), (batch, frames, 2, 3, SMALL.z_dim))


def video(frames):
    return jax.random.uniform(jax.random.key(3), (1, frames, 8, 12, 3), minval=-1)


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
    both = jax.jit(lambda p, v: (vae.encode_moments(p, v, config=SMALL)[0], vae.encode(p, v, config=SMALL)))
    mean, normalised = both(small_params(), video(5))
    expected = (np.asarray(mean) - np.float32([0.1, 0.2, -0.3])) / np.float32([0.5, 2.0, 1.0])
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)
    assert len(WAN_LATENT_MEAN) == len(WAN_LATENT_STD) == VAEConfig().z_dim
    assert (WAN_LATENT_MEAN[0], WAN_LATENT_STD[-1]) == (-0.7571, 1.9160)


@pytest.mark.parametrize(("chunk", "chunks"), [(1, 6), (3, 6)])
def test_decoded_chunks_are_the_whole(chunk, chunks):
    z = latents(chunk * chunks, batch=2)
    traces = []

    @jax.jit
    def step(params, z, cache):
        traces.append(1)
        return vae.decode_chunk(params, z, cache, config=SMALL)

    cache, frames = vae.init_decode_cache(SMALL, batch=2, height=2, width=3), []
    for i in range(chunks):
        out, cache = step(small_params(), z[:, chunk * i : chunk * (i + 1)], cache)
        frames.append(out)
    whole = decode(small_params(), z, config=SMALL)
    assert whole.shape == (2, 1 + 4 * (chunk * chunks - 1), 8, 12, 3)
    np.testing.assert_allclose(np.concatenate(frames, axis=1)[:, 3:], whole, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("sizes", [(1, 4, 4, 4), (5, 8)])
def test_encoded_chunks_are_the_whole(sizes):
    frames = video(13)
    cache, out, start = vae.init_encode_cache(SMALL, batch=1, height=8, width=12), [], 0
    for size in sizes:
        piece = frames[:, start : start + size]
        z, cache = encode_chunk(small_params(), piece, cache, config=SMALL, first=start == 0)
        out.append(z)
        start += size
    np.testing.assert_allclose(np.concatenate(out, axis=1), encode(small_params(), frames, config=SMALL), atol=1e-5)


def test_the_future_does_not_change_the_past():
    z, frames = latents(4), video(13)
    seen = decode(small_params(), z, config=SMALL)
    changed = decode(small_params(), z.at[:, 2:].add(1.0), config=SMALL)
    np.testing.assert_array_equal(seen[:, :5], changed[:, :5])
    assert np.abs(seen[:, 5:] - changed[:, 5:]).max(axis=(0, 2, 3, 4)).min() > 1e-4
    seen = encode(small_params(), frames, config=SMALL)
    changed = encode(small_params(), frames.at[:, 5:].set(0.5), config=SMALL)
    np.testing.assert_array_equal(seen[:, :2], changed[:, :2])
    assert np.abs(seen[:, 2:] - changed[:, 2:]).max(axis=(0, 2, 3, 4)).min() > 1e-4


def test_gradients_are_finite_and_reach_every_parameter():
    """A black clip gives exact zeros before norms, where a norm without a lower limit has a NaN gradient."""
    frames = jnp.zeros((1, 5, 8, 12, 3))
    zeroed = jax.tree.map(lambda x: x, small_params())
    zeroed["encoder"]["conv1"]["bias"] = jnp.zeros(SMALL.base_dim)

    def loss(params, frames):
        mean, logvar = vae.encode_moments(params, frames, config=SMALL)
        out = vae.decode(params, vae.normalize(mean, SMALL), config=SMALL, clamp=False)
        return jnp.abs(out - 0.2).mean() + jnp.square(logvar).mean()

    gradient = jax.jit(jax.grad(loss))
    for params, clip in ((zeroed, frames), (small_params(), video(5))):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(params, clip)))
    silent = [path for path, g in jax.tree_util.tree_flatten_with_path(gradient(params, clip))[0] if not np.any(g)]
    assert not silent


def test_clamp():
    loud = jax.tree.map(lambda x: x, small_params())
    loud["decoder"]["head"]["conv"]["bias"] += jnp.array([3.0, -3.0, 0.0])
    both = jax.jit(lambda p, z: [vae.decode(p, z, config=SMALL, clamp=clamp) for clamp in (True, False)])
    clamped, free = both(loud, latents(2))
    np.testing.assert_array_equal(clamped, np.clip(free, -1, 1))
    assert free.max() > 1 and free.min() < -1


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


def test_a_single_image_takes_the_last_tap_only():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((3, 3, 3, 4, 5)), "bias": rng.standard_normal(5)}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x = jnp.asarray(rng.standard_normal((2, 1, 8, 8, 4)), jnp.float32)
    y, past = conv.causal_conv(params, x)
    expected, expected_past = conv.causal_conv(params, x, jnp.zeros((2, 2, 8, 8, 4)))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(past, expected_past)


def test_bfloat16_stays_close():
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    got = decode(small_params(), latents(2), config=half)
    assert got.dtype == jnp.float32
    expected = decode(small_params(), latents(2), config=SMALL)
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    cache = vae.init_decode_cache(half, batch=1, height=2, width=3)
    assert {x.dtype for x in jax.tree.leaves(cache.past)} == {jnp.dtype("bfloat16")}


def test_the_published_size():
    """Count the parameters of the published checkpoint, and compare cache shapes with the published decoder's."""
    tree = vae.abstract(VAEConfig())

    def count(tree):
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    assert (count(tree), len(jax.tree.leaves(tree))) == (126_892_531, 194)
    assert (count(tree["encoder"]), count(tree["decoder"])) == (53_595_872, 73_295_331)
    made = jax.eval_shape(lambda key: vae.init(key, VAEConfig()), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
    cache = jax.eval_shape(lambda: vae.init_decode_cache(VAEConfig(), batch=1, height=60, width=104))
    shapes = [leaf.shape for leaf in jax.tree.leaves(cache.past)]
    size = {(60, 104): {16: 1, 384: 11}, (120, 208): {192: 1, 384: 6}, (240, 416): {192: 6}, (480, 832): {96: 7}}
    expected = [(1, 2, *hw, width) for hw, widths in size.items() for width, n in widths.items() for _ in range(n)]
    assert sorted(shapes) == sorted(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: vae.encode(p, jnp.zeros((1, 4, 16, 16, 3)), config=SMALL), "4 frames .*accepted: 1 \\+ 4n"),
        (lambda p: vae.encode(p, jnp.zeros((1, 5, 18, 16, 3)), config=SMALL), "18 x 16 .*multiples of 4"),
        (lambda p: vae.decode(p, jnp.zeros((1, 2, 2, 2, 16)), config=SMALL), "\\(1, 2, 2, 2, 16\\).*h, w, 3"),
        (
            lambda p: vae.encode_chunk(p, jnp.zeros((1, 5, 16, 16, 3)), None, config=SMALL, first=False),
            "5 frames .*accepted: 4n",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call(small_params())
