"""Tiny random networks and their checkpoints, for the tests of this folder."""

import numpy as np

from causvid_jax.checkpoints import state_dict
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import CLIPConfig, TAEHVConfig, TransformerConfig, UMT5Config, VAEConfig
from tests.tiny import random_params

TINY = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=3, in_channels=4, out_channels=4, text_dim=10, freq_dim=8
)
TINY_VAE = VAEConfig(base_dim=4, z_dim=2)
EVERY = (
    TINY,
    TransformerConfig(
        dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_channels=12, out_channels=4, text_dim=10, image_dim=6
    ),
    TINY_VAE,
    UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3),
    CLIPConfig(image_size=8, patch_size=4, dim=80, ffn_dim=6, num_heads=1, num_layers=2, projection_dim=3),
    TAEHVConfig(z_dim=4, encoder_dim=10, decoder_dims=(14, 12, 8, 6)),
)


def published(config, form, seed=0):
    """Return (our parameters, a published state dict of them) for a network of the sizes ``config``."""
    params = random_params(network_of(config).abstract(config), seed)
    return params, state_dict(params, config, form)


def arrays(opened):
    """Return the arrays of an opened source, read."""
    out = {}
    for name, tensor in opened.tensors.items():
        with tensor.view() as view:
            out[name] = np.array(view)
            assert view.shape == tensor.shape and view.dtype == tensor.dtype
    return out


def assert_states(have, want):
    """Compare two state dicts bit by bit."""
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert have[name].dtype == value.dtype and have[name].shape == value.shape, name
        np.testing.assert_array_equal(have[name].reshape(-1).view(np.uint8), value.reshape(-1).view(np.uint8))
