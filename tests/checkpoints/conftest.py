"""Fixtures of the tests of this folder."""

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from causvid_jax.checkpoints import state_dict
from causvid_jax.models import transformer, vae
from tests.checkpoints.tiny_files import TINY, TINY_VAE
from tests.tiny import random_params


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="session")
def params():
    return random_params(transformer.abstract(TINY), scale=1.0)


@pytest.fixture(scope="session")
def half_params(params):
    return jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)


@pytest.fixture(scope="session")
def vae_params():
    return random_params(vae.abstract(TINY_VAE), seed=2)


@pytest.fixture(scope="session")
def states(params):
    """Return {format: state dict} of the transformer."""
    return {form: state_dict(params, TINY, form) for form in ("original", "diffusers")}


@pytest.fixture(scope="session")
def vae_states(vae_params):
    return {form: state_dict(vae_params, TINY_VAE, form) for form in ("original", "diffusers")}


@pytest.fixture
def save():
    """Return ``save(path, state)``, which writes a safetensors file as others write it."""

    def write(path, state, metadata=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: np.asarray(value) for name, value in state.items()}
        safetensors.numpy.save_file(state, path, metadata or {"format": "pt"})
        return path

    return write
