"""What the video VAE and the tiny codec share: chunks that equal the whole clip, causality, clamp, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import make_taehv
import numpy as np
import pytest

from causvid_jax.checkpoints import load
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import ConfigError, TAEHVConfig, VAEConfig
from causvid_jax.models import taehv, vae
from tests.tiny import random_params

MODULES = {"vae": vae, "vae22": vae, "taehv": taehv}
# Two levels, both in time as well: every kind of layer except the spatial-only resampling, which the golden has.
SMALL_VAE = VAEConfig(
    base_dim=4,
    z_dim=3,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    latent_mean=(0.1, 0.2, -0.3),
    latent_std=(0.5, 2.0, 1.0),
)
SMALL_TAEHV = TAEHVConfig(z_dim=3, encoder_dim=4, decoder_dims=(6, 5, 4, 3), blocks=1)
SMALL_VAE22 = VAEConfig(
    base_dim=4,
    z_dim=3,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(False, True),
    decoder_base_dim=6,
    patch_size=2,
    is_residual=True,
)
SMALL = {"vae": SMALL_VAE, "vae22": SMALL_VAE22, "taehv": SMALL_TAEHV}

ATOL = {"vae": 1e-5, "vae22": 2e-5, "taehv": 1e-5}


@functools.cache
def params_of(name):
    """Return parameters that are all random; the VAE's head is so small that no output is clamped."""
    if name == "taehv":
        state = make_taehv.random_weights(network_of(SMALL_TAEHV).shapes(SMALL_TAEHV, "original"), 1)
        return load(state, config=SMALL_TAEHV)[0]
    params = jax.tree.map(jnp.asarray, random_params(vae.init(jax.random.key(0), SMALL[name]), 1))
    if name == "vae":
        params["decoder"]["head"]["conv"]["kernel"] *= 0.3
    return params


@functools.cache
def compiled(name, function, **settings):
    """Return a function of the codec ``name`` at its small size."""
    return jax.jit(functools.partial(getattr(MODULES[name], function), config=SMALL[name], **settings))


def latents(frames, batch=1):
    return jax.random.normal(jax.random.key(2), (batch, frames, 2, 3, 3))


def video(frames):
    return jax.random.uniform(jax.random.key(3), (1, frames, 8, 16, 3), minval=-1)


# Chunks of latents; frames that a latent becomes, and their size.
DECODED = [
    ("vae", 1, 6, (4, 8, 12)),
    ("vae", 3, 18, (4, 8, 12)),
    ("vae22", 2, 6, (2, 16, 24)),
    ("taehv", 1, 6, (4, 16, 24)),
    ("taehv", 3, 6, (4, 16, 24)),
]


@pytest.mark.parametrize("name,chunk,count,shown", DECODED)
def test_decoded_chunks_are_the_whole(name, chunk, count, shown):
    z, traces = latents(count, batch=2), []

    @jax.jit
    def step(params, z, cache):
        traces.append(1)
        return MODULES[name].decode_chunk(params, z, cache, config=SMALL[name])

    cache, frames = MODULES[name].init_decode_cache(SMALL[name], batch=2, height=2, width=3), []
    for i in range(0, count, chunk):
        out, cache = step(params_of(name), z[:, i : i + chunk], cache)
        frames.append(out)
    whole = compiled(name, "decode")(params_of(name), z)
    assert whole.shape == (2, shown[0] * (count - 1) + 1, *shown[1:], 3) and np.std(whole) > 0.01
    np.testing.assert_allclose(np.concatenate(frames, axis=1)[:, shown[0] - 1 :], whole, atol=ATOL[name])
    assert len(traces) == 1


@pytest.mark.parametrize(
    "name,sizes",
    [("vae", (1, 4, 4, 4)), ("vae", (5, 8)), ("vae22", (1, 4, 4)), ("taehv", (4, 4, 4, 4)), ("taehv", (8, 8))],
)
def test_encoded_chunks_are_the_whole(name, sizes):
    frames, traces = video(sum(sizes)), []

    @functools.partial(jax.jit, static_argnames="first")
    def step(params, frames, cache, **first):
        traces.append(1)
        return MODULES[name].encode_chunk(params, frames, cache, config=SMALL[name], **first)

    cache, out, start = MODULES[name].init_encode_cache(SMALL[name], batch=1, height=8, width=16), [], 0
    for size in sizes:
        first = {} if name == "taehv" else {"first": start == 0}
        z, cache = step(params_of(name), frames[:, start : start + size], cache, **first)
        out.append(z)
        start += size
    whole = compiled(name, "encode")(params_of(name), frames)
    np.testing.assert_allclose(np.concatenate(out, axis=1), whole, atol=ATOL[name])
    assert len(traces) == len(set(sizes))


# The frame of the clip that changes first, and the latents before the one that holds it.
@pytest.mark.parametrize("name,frames,changed,kept", [("vae", 13, 5, 2), ("taehv", 12, 7, 1)])
def test_the_future_does_not_change_the_past(name, frames, changed, kept):
    z, clip, params = latents(4), video(frames), params_of(name)
    decode, encode = compiled(name, "decode", clamp=False), compiled(name, "encode")
    pairs = (decode(params, z), decode(params, z.at[:, 2:].add(1.0)), 5)
    for seen, other, same in (pairs, (encode(params, clip), encode(params, clip.at[:, changed:].set(0.5)), kept)):
        np.testing.assert_array_equal(seen[:, :same], other[:, :same])
        assert np.abs(seen[:, same:] - other[:, same:]).max(axis=(0, 2, 3, 4)).min() > 1e-4


@pytest.mark.parametrize("name,last,shift", [("vae", ("head", "conv"), 3.0), ("taehv", ("conv_out",), 2.0)])
def test_clamp(name, last, shift):
    loud = jax.tree.map(lambda x: x, params_of(name))
    layer = functools.reduce(dict.__getitem__, last, loud["decoder"])
    layer["bias"] = layer["bias"] + np.float32([shift, -shift, 0.0])
    clamped, free = (compiled(name, "decode", clamp=clamp)(loud, latents(2)) for clamp in (True, False))
    np.testing.assert_array_equal(clamped, np.clip(free, -1, 1))
    assert free.max() > 1 and free.min() < -1


@pytest.mark.parametrize("name", ["vae", "taehv"])
def test_bfloat16_stays_close(name):
    half = dataclasses.replace(SMALL[name], dtype="bfloat16")
    decode = jax.jit(functools.partial(MODULES[name].decode, config=half, clamp=False))
    got = decode(params_of(name), latents(2))
    assert got.dtype == jnp.float32
    expected = compiled(name, "decode", clamp=False)(params_of(name), latents(2))
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    cache = MODULES[name].init_decode_cache(half, batch=1, height=2, width=3)
    assert {x.dtype for x in jax.tree.leaves(getattr(cache, "past", cache))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name,config", [("vae", VAEConfig()), ("taehv", TAEHVConfig())])
def test_fresh_parameters_have_the_abstract_shapes(name, config):
    made = jax.eval_shape(lambda key: MODULES[name].init(key, config), jax.random.key(0))
    shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (made, MODULES[name].abstract(config)))
    assert next(shapes) == next(shapes)


REFUSED = [
    ("vae", "encode", (1, 4, 16, 16, 3), "4 frames .*accepted: 1 \\+ 4n"),
    ("vae", "encode", (1, 5, 18, 16, 3), "18 x 16 .*multiples of 4"),
    ("vae", "decode", (1, 2, 2, 2, 16), "\\(1, 2, 2, 2, 16\\).*h, w, 3"),
    ("vae", "encode_chunk", (1, 5, 16, 16, 3), "5 frames .*accepted: 4n"),
    ("taehv", "encode", (1, 4, 18, 16, 3), "18 x 16 .*multiples of 8"),
    ("taehv", "encode", (1, 4, 16, 16, 4), "16, 4\\) cannot .*height, width, 3"),
    ("taehv", "decode", (1, 2, 2, 2, 16), "\\(1, 2, 2, 2, 16\\).*h, w, 3"),
    ("taehv", "encode_chunk", (1, 5, 16, 16, 3), "5 frames .*accepted: 4n"),
]


@pytest.mark.parametrize("name,function,shape,message", REFUSED)
def test_other_shapes_are_refused(name, function, shape, message):
    chunk = function == "encode_chunk"
    cache, first = (None,) if chunk else (), {"first": False} if chunk and name == "vae" else {}
    with pytest.raises(ConfigError, match=message):
        getattr(MODULES[name], function)(params_of(name), jnp.zeros(shape), *cache, config=SMALL[name], **first)
