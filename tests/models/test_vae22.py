"""The VAE of Wan2.2-TI2V-5B: published keys and size, parameter-free shortcuts."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_codecs import SMALL_VAE22, params_of

from causvid_jax.checkpoints import open_checkpoint, state_dict
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import WAN22_LATENT_MEAN, WAN22_LATENT_STD, WAN22_VAE
from causvid_jax.models import vae_layers


def test_size_and_statistics_are_the_published_ones():
    """The published file has 2,818,839,170 bytes of float32, some hundred kilobytes of which are its index."""
    count = network_of(WAN22_VAE).parameters(WAN22_VAE)
    assert 0 < 2_818_839_170 - 4 * count < 400_000
    assert len(WAN22_LATENT_MEAN) == len(WAN22_LATENT_STD) == 48 and WAN22_VAE.space_factor == 16
    shapes = network_of(WAN22_VAE).shapes(WAN22_VAE, "original")
    assert shapes["encoder.conv1.weight"] == (160, 12, 3, 3, 3)
    assert shapes["encoder.downsamples.1.downsamples.2.time_conv.weight"] == (320, 320, 3, 1, 1)
    assert shapes["decoder.upsamples.0.upsamples.3.resample.1.weight"] == (1024, 1024, 3, 3)
    assert shapes["decoder.upsamples.0.upsamples.3.time_conv.weight"] == (2048, 1024, 3, 1, 1)
    assert shapes["decoder.head.2.weight"] == (12, 256, 3, 3, 3)


def expected_keys(form):
    """Return the module names that the published classes give this small network, written down level by level."""
    norms = ("residual.0", "residual.2", "residual.3", "residual.6")
    if form == "diffusers":
        norms = ("norm1", "conv1", "norm2", "conv2")
    keys = set()
    for net, levels, blocks in (("encoder", (4, 4, 8, 8), 1), ("decoder", (12, 12, 12, 6), 2)):
        plural = "downsamples" if net == "encoder" else "upsamples"
        way = "down" if net == "encoder" else "up"
        for level in range(3):
            for block in range(blocks):
                inner = f"{net}.{plural}.{level}.{plural}.{block}"
                if form == "diffusers":
                    inner = f"{net}.{way}_blocks.{level}.resnets.{block}"
                keys |= {f"{inner}.{name}" for name in norms}
                if levels[level] != levels[level + 1] and block == 0:
                    keys.add(f"{inner}.{'shortcut' if form == 'original' else 'conv_shortcut'}")
            if level < 2:
                inner = f"{net}.{plural}.{level}.{plural}.{blocks}"
                if form == "diffusers":
                    inner = f"{net}.{way}_blocks.{level}.{way}sampler"
                keys.add(f"{inner}.resample.1")
                if level == (1 if net == "encoder" else 0):
                    keys.add(f"{inner}.time_conv")
    return keys


@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_keys_are_those_of_the_published_classes(form):
    shapes = network_of(SMALL_VAE22).shapes(SMALL_VAE22, form)
    modules = {name.rpartition(".")[0] for name in shapes}
    assert {name for name in modules if "samples." in name or "_blocks." in name} == expected_keys(form)
    opened = open_checkpoint(state_dict(params_of("vae22"), SMALL_VAE22, form), SMALL_VAE22)
    assert opened.format == form


def average_down(x, width, time, space, first):
    """The published ``AvgDown3D`` as index arithmetic, x [C, T, H, W]."""
    if first and time == 2:
        x = np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)
    channels, frames, height, rows = x.shape
    factor = time * space * space
    out = np.zeros((width, frames // time, height // space, rows // space))
    group = channels * factor // width
    for c in range(channels):
        for p in range(time):
            for q in range(space):
                for r in range(space):
                    index = ((c * time + p) * space + q) * space + r
                    out[index // group] += x[c, p::time, q::space, r::space] / group
    return out


def copy_up(x, width, time, first):
    """The published ``DupUp3D`` as index arithmetic."""
    channels, frames, height, rows = x.shape
    out = np.zeros((width, frames * time, height * 2, rows * 2))
    repeats = width * time * 4 // channels
    for o in range(width):
        for p in range(time):
            for q in range(2):
                for r in range(2):
                    out[o, p::time, q::2, r::2] = x[(((o * time + p) * 2 + q) * 2 + r) // repeats]
    return out[:, 1:] if first and time == 2 else out


@pytest.mark.parametrize("time", [1, 2])
def test_paths_without_parameters_are_the_published_ones(time):
    rng = np.random.default_rng(0)
    for frames, first in ((5, True), (1, True), (4, False)):
        x = rng.normal(size=(1, frames, 4, 6, 4)).astype(np.float32)
        moved = np.moveaxis(x[0], -1, 0)
        if time == 2 or not first:
            down = vae_layers.average_down(jnp.asarray(x), 8, (time == 2, True), starts=first)
            np.testing.assert_allclose(np.moveaxis(down[0], -1, 0), average_down(moved, 8, time, 2, first), atol=1e-6)
        up = vae_layers.copy_up(jnp.asarray(x), 2, time == 2, starts=first)
        np.testing.assert_allclose(np.moveaxis(up[0], -1, 0), copy_up(moved, 2, time, first), atol=1e-6)
    picture = rng.normal(size=(1, 1, 4, 6, 3))
    tiles = vae_layers.patchify(jnp.asarray(picture), 2)
    # channel (c, column, row) of the published "b c f (h q) (w r) -> b (c r q) f h w"
    np.testing.assert_allclose(tiles[0, 0, 1, 2, 1 * 4 + 1 * 2 + 0], picture[0, 0, 2, 5, 1], rtol=1e-6)
    np.testing.assert_allclose(vae_layers.unpatchify(tiles, 2), picture, rtol=1e-6)
