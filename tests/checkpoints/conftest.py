"""Tiny random networks and their checkpoints, for the tests of this folder."""

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from causvid_jax.checkpoints import wan_transformer, wan_vae
from causvid_jax.config import TransformerConfig, VAEConfig
from causvid_jax.models import transformer, vae

TINY = TransformerConfig(
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=3,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    freq_dim=8,
)
TINY_VAE = VAEConfig(base_dim=4, z_dim=2)


def random_tree(abstract, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), abstract)


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="session")
def tiny_vae():
    return TINY_VAE


@pytest.fixture(scope="session")
def params():
    return random_tree(transformer.abstract(TINY), np.float32)


@pytest.fixture(scope="session")
def half_params():
    return random_tree(transformer.abstract(TINY), ml_dtypes.bfloat16, seed=1)


@pytest.fixture(scope="session")
def vae_params():
    return random_tree(vae.abstract(TINY_VAE), np.float32, seed=2)


@pytest.fixture(scope="session")
def states(params):
    """{naming: state dict} of the transformer."""
    return {naming: dict(wan_transformer.to_published(params, TINY, naming)) for naming in ("original", "diffusers")}


@pytest.fixture(scope="session")
def vae_states(vae_params):
    return {
        "original": wan_vae.to_original(vae_params, TINY_VAE),
        "diffusers": wan_vae.to_diffusers(vae_params, TINY_VAE),
    }


@pytest.fixture
def save():
    """``save(path, state)``: a safetensors file as others write it."""

    def write(path, state, metadata=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(state, path, metadata or {"format": "pt"})
        return path

    return write
