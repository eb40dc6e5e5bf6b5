"""Recipes and parameters of the tests of streams."""

import jax
import numpy as np
import pytest

from causvid_jax.models import taehv, transformer, vae
from causvid_jax.sampling import stream
from tests.tiny import random_params, stream_recipe

PLAIN = stream_recipe()
WINDOW = stream_recipe(window=5, sink=2, positions="relative")
FIRST = stream_recipe(17, independent_first_frame=True)


def prompt(seed, batch=1):
    return jax.random.normal(jax.random.key(seed), (batch, PLAIN.text.length, PLAIN.text.dim))


def next_blocks(params, state, config, count):
    """Return the latents of ``count`` blocks, and the state after them, block by block."""
    latents = []
    for _ in range(count):
        block, state = stream.next_block(params, state, config=config)
        latents.append(np.asarray(block))
    return latents, state


@pytest.fixture(scope="session")
def params():
    """Return random weights, also where a fresh network has zeros: no branch may be silent."""
    made = {
        "student": random_params(transformer.abstract(PLAIN.student), 1, 0.15),
        "vae": random_params(vae.abstract(PLAIN.vae), 2, 0.3),
        "taehv": random_params(taehv.abstract(PLAIN.taehv), 3, 0.15),
    }
    return jax.device_put(made)
