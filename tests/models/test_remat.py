"""The gradient is the same whatever a layer keeps for its backward pass, and it keeps what the policy names."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ConfigError, ParallelConfig, TransformerConfig
from causvid_jax.config.model import Remat
from causvid_jax.models import transformer
from causvid_jax.sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compiled_anew")

NET = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=4, num_layers=2, in_channels=4, out_channels=4, text_dim=5, text_length=3, freq_dim=8
)
CAUSAL = CausalConfig(frames_per_block=1)


def gradient(remat, mesh=None):
    config = dataclasses.replace(NET, remat=remat)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), transformer.abstract(config)
    )
    x = jax.random.normal(jax.random.key(100), (2, 2, 4, 4, 4))
    text = jax.random.normal(jax.random.key(101), (2, 3, 5))

    @jax.jit
    def run(params):
        velocity = transformer.block_causal(params, x, jnp.full((2, 2), 500.0), text, config=config, causal=CAUSAL)
        return jnp.mean(velocity**2)

    with jax.set_mesh(mesh) if mesh is not None else jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, jax.grad(run)(params))


@pytest.fixture(scope="module")
def kept():
    return gradient("none")


@pytest.mark.parametrize("remat", [name for name in typing.get_args(Remat) if name != "none"])
def test_gradients_do_not_depend_on_what_is_kept(kept, remat):
    for one, other in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_attention_is_kept_through_the_exchange_of_tokens_for_heads(kept):
    mesh = make_mesh(ParallelConfig(context=2, tensor=2), jax.devices()[:4])
    for one, other in zip(jax.tree.leaves(gradient("attention", mesh)), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_names_of_policies():
    assert dataclasses.replace(NET, remat=True).remat == "full"
    assert dataclasses.replace(NET, remat=False).remat == "none"
    with pytest.raises(ConfigError, match="transformer.remat is 'some'; accepted: 'none', 'attention'"):
        dataclasses.replace(NET, remat="some")
