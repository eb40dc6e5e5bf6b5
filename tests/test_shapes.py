"""The check of annotated shapes finds what it must find."""

import jax
import jax.numpy as jnp
import pytest

from causvid_jax.config import TransformerConfig
from causvid_jax.diffusion import flow
from causvid_jax.models import transformer
from tests import shapes

NET = TransformerConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=1, in_channels=4, out_channels=4, freq_dim=8)


def test_public_functions_are_checked():
    """At least the 40 functions of models and diffusion, and each of the forward modes."""
    annotated = [transformer.bidirectional, transformer.block_causal, transformer.cached, transformer.encode_text]
    assert all(hasattr(function, "__wrapped__") for function in (*annotated, flow.add_noise))


@pytest.mark.parametrize(
    "timestep,text,message",
    [
        ((1, 2), (1, 3, 8), "timestep has shape"),  # a timestep per frame
        ((1, 3), (2, 3, 8), "prompt_embeds has shape"),  # one prompt per clip
        ((1, 3), (3, 8), "prompt_embeds has shape"),
    ],
)
def test_a_wrong_shape_is_refused(timestep, text, message):
    params = transformer.abstract(NET)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 4, 4, 4), timestep, text)]
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(lambda p, *a: transformer.bidirectional(p, *a, config=NET), params, *arrays)


def test_two_arguments_share_a_shape():
    with pytest.raises(TypeError, match="add_noise: noise"):
        flow.add_noise(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 4)), 0.5)
    shapes.check(None, jax.Array | None, "an optional argument")
