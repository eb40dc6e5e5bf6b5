"""What the compiled program of a streamed block holds and copies, for the CPU always, for GPU and TPU where compilers
are installed (extras ``cuda12``, ``tpu``)."""

import dataclasses
import importlib.util
import math
import re

import jax.numpy as jnp
import pytest

from causvid_jax.analysis import compile_report, topology
from causvid_jax.config import CausalConfig
from tests import tiny

LAYERS, WINDOW = 4, 8192
NETWORK = {"dim": 256, "num_heads": 2, "num_layers": LAYERS, "ffn_dim": 256, "freq_dim": 16}
COMPILERS = {"cpu": "jaxlib", "h200:1": "jax_cuda12_plugin", "v6e:2x2": "libtpu"}
COPIES = {"cpu": 3, "h200:1": 1, "v6e:2x2": 1}
"""Bound on temporaries in layers' keys. XLA's attention transposes the keys and values of the layer at hand, of the
2 x LAYERS that the cache has; cuDNN and splash read the cache itself."""
INT8_COPIES = {"cpu": 3, "h200:1": 3, "v6e:2x2": 4}
"""The same with an int8 cache, of which the keys and values of one layer are copied to the compute type.

The compiler for the v6e takes 3.08 with JAX 0.12.
"""


def recipe_for(machine, kv_cache="dtype"):
    recipe = tiny.RECIPE
    net = dataclasses.replace(recipe.student, **NETWORK, attention="auto", kv_cache=kv_cache)
    if machine != "cpu":
        net = dataclasses.replace(net, dtype="bfloat16", precision="fast")
    return dataclasses.replace(recipe, student=net, causal=CausalConfig(frames_per_block=1, window=WINDOW))


def compiled_block(recipe, machine, unstacked):
    """Compile ``next_block`` for one device of ``machine``."""
    described = None if machine == "cpu" else topology.describe(machine)
    return compile_report.lower_block(recipe, described, unstacked=unstacked).compile()


@pytest.mark.parametrize("machine", COMPILERS)
def test_a_block_with_an_int8_cache_holds_one_layer_in_the_compute_type(machine):
    if importlib.util.find_spec(COMPILERS[machine]) is None:
        pytest.skip(f"{COMPILERS[machine]} is not installed: no compiler for {machine}")
    recipe = recipe_for(machine, "int8")
    net, (height, width) = recipe.student, recipe.latent_size
    elements = WINDOW * (height // 2) * (width // 2) * net.dim
    memory = compiled_block(recipe, machine, unstacked=True).memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * LAYERS * elements
    assert memory.temp_size_in_bytes < INT8_COPIES[machine] * elements * jnp.dtype(net.dtype).itemsize


@pytest.mark.parametrize("machine", COMPILERS)
def test_a_block_copies_no_cache(machine):
    if importlib.util.find_spec(COMPILERS[machine]) is None:
        pytest.skip(f"{COMPILERS[machine]} is not installed: no compiler for {machine}")
    recipe = recipe_for(machine)
    net, (height, width) = recipe.student, recipe.latent_size
    elements = WINDOW * (height // 2) * (width // 2) * net.dim  # of one layer's keys
    layer = elements * jnp.dtype(net.dtype).itemsize
    compiled = compiled_block(recipe, machine, unstacked=True)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * LAYERS * layer  # the donated cache is the one that comes back
    assert memory.temp_size_in_bytes < COPIES[machine] * layer
    for sizes in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text()):
        assert math.prod(map(int, sizes.split(","))) < (elements if COPIES[machine] == 1 else LAYERS * elements)
