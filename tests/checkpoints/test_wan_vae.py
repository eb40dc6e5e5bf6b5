"""Published names and layouts of the Wan VAE, both ways."""

import jax
import numpy as np
import pytest

from causvid_jax.checkpoints import wan_vae
from causvid_jax.config import ConfigError, VAEConfig
from causvid_jax.models import vae

CONFIG = VAEConfig(base_dim=4, z_dim=2)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), vae.abstract(CONFIG))


@pytest.mark.parametrize(
    ("export", "load"),
    [(wan_vae.to_original, wan_vae.from_original), (wan_vae.to_diffusers, wan_vae.from_diffusers)],
)
def test_round_trip(params, export, load):
    state = export(params, CONFIG)
    assert len(state) == 194
    jax.tree.map(np.testing.assert_array_equal, load(state, CONFIG), params)


def test_published_names_and_shapes():
    """Names and shapes as they stand in the published files, at full size."""
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int8), vae.abstract(VAEConfig()))
    original = {name: value.shape for name, value in wan_vae.to_original(tree).items()}
    diffusers = {name: value.shape for name, value in wan_vae.to_diffusers(tree).items()}
    for first, second, shape in (
        ("encoder.conv1.weight", "encoder.conv_in.weight", (96, 3, 3, 3, 3)),
        ("encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight", (192, 96, 1, 1, 1)),
        ("encoder.downsamples.0.residual.3.gamma", "encoder.down_blocks.0.norm2.gamma", (96, 1, 1, 1)),
        ("encoder.downsamples.2.resample.1.weight", "encoder.down_blocks.2.resample.1.weight", (96, 96, 3, 3)),
        ("encoder.downsamples.5.time_conv.weight", "encoder.down_blocks.5.time_conv.weight", (192, 192, 3, 1, 1)),
        ("encoder.middle.1.norm.gamma", "encoder.mid_block.attentions.0.norm.gamma", (384, 1, 1)),
        ("encoder.head.2.bias", "encoder.conv_out.bias", (32,)),
        ("conv1.weight", "quant_conv.weight", (32, 32, 1, 1, 1)),
        ("conv2.bias", "post_quant_conv.bias", (16,)),
        ("decoder.middle.2.residual.6.weight", "decoder.mid_block.resnets.1.conv2.weight", (384, 384, 3, 3, 3)),
        (
            "decoder.upsamples.3.time_conv.weight",
            "decoder.up_blocks.0.upsamplers.0.time_conv.weight",
            (768, 384, 3, 1, 1),
        ),
        ("decoder.upsamples.4.shortcut.bias", "decoder.up_blocks.1.resnets.0.conv_shortcut.bias", (384,)),
        (
            "decoder.upsamples.11.resample.1.weight",
            "decoder.up_blocks.2.upsamplers.0.resample.1.weight",
            (96, 192, 3, 3),
        ),
        ("decoder.upsamples.14.residual.2.weight", "decoder.up_blocks.3.resnets.2.conv1.weight", (96, 96, 3, 3, 3)),
        ("decoder.head.0.gamma", "decoder.norm_out.gamma", (96, 1, 1, 1)),
    ):
        assert original[first] == diffusers[second] == shape


def test_refusals(params):
    state = wan_vae.to_original(params, CONFIG)
    with pytest.raises(ConfigError, match="1 VAE weights are missing.*'conv1.bias'.*194"):
        wan_vae.from_original({name: value for name, value in state.items() if name != "conv1.bias"}, CONFIG)
    with pytest.raises(ConfigError, match="not of this VAE.*'extra'"):
        wan_vae.from_original(state | {"extra": np.zeros(1)}, CONFIG)
    with pytest.raises(ConfigError, match="conv1.bias has shape \\(3,\\).*\\(4,\\)"):
        wan_vae.from_original(state | {"conv1.bias": np.zeros(3)}, CONFIG)
