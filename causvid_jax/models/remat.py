"""Rematerialize layers in training: choose which results are kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from causvid_jax.models import attention
from causvid_jax.models.layers import PRODUCT
from causvid_jax.sharding import constraints

LAYER_INPUT = "layer_input"


def attention_results(*names: str) -> Callable[..., Any]:
    """Return the policy that keeps the results of these names, and the results of cuDNN's attention.

    cuDNN's kernel returns the output and the softmax sums in one call, without a name for the sums. If the sums were
    not kept, the backward pass would compute the whole attention again.
    """
    policies = jax.checkpoint_policies

    def is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name.startswith("dot_product_attention_fwd")

    return policies.save_from_both_policies(policies.save_only_these_names(*names), is_cudnn)


def rematerialize(layer: Any, remat: str | bool) -> Any:
    """Return the linen module ``layer`` rematerialized; ``TransformerConfig.remat`` names the results that are kept."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    if remat == "offload" and constraints.platform() == "cpu":
        remat = "full"  # layer inputs are in host memory already
    policy = {
        "full": policies.nothing_saveable,
        "attention": attention_results(attention.RESULT),
        # Select by name: JAX's policies for products do not apply inside a function with a custom derivative (matmul).
        "dots": attention_results(attention.RESULT, PRODUCT),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[str(remat)]
    return nn.remat(layer, prevent_cse=False, policy=policy)
