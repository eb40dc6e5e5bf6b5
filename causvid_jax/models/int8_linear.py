"""Linear layers of the transformer's blocks in 8 bits, for sampling only (``TransformerConfig.linear="int8"``).

A weight is rounded once, when it is read, with a scale for every output channel. Activations are rounded in every pass,
with a scale for every token::

    s_w = max_in |W| / 127,   W8 = round(W / s_w)        [1, out], [in, out]
    s_x = max_in |x| / 127,   x8 = round(x / s_x)        [..., 1], [..., in]
    x W + b ~ s_x s_w (x8 W8) + b

The sum of x8 W8 is exact in int32, because inputs have fewer than 2^31 / 127^2 = 133,000 channels. Scales and bias are
float32. These layers are q, k, v and o of self-attention and cross-attention (with an image branch also its keys and
values), and the two of the MLP. Embeddings, modulation and head do not change.

Source: vector-wise quantization of LLM.int8() (arXiv 2208.07339, section 3.1), without its separate outliers.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from causvid_jax.config import ConfigError, TransformerConfig, require
from causvid_jax.models.quantization import quantize, quantized
from causvid_jax.sharding.params import ParamSpec

Params = dict[str, Any]
_KERNEL = "kernel"


def rounded_spec(layer: Any) -> Any:
    """Return the specification of a layer with every kernel ``[in, out]`` as ``{"int8", "scale" [1, out]}``."""
    if isinstance(layer, ParamSpec):
        return layer
    return {name: _pair(inner) if name == _KERNEL else rounded_spec(inner) for name, inner in layer.items()}


def _pair(kernel: ParamSpec) -> dict[str, ParamSpec]:
    scale = ParamSpec((1, kernel.shape[-1]), (None, kernel.axes[-1]), nn.initializers.ones)
    return {"int8": kernel, "scale": scale}


def round_parameter(path: str, x: Any, *, config: TransformerConfig) -> Any:
    """Return the parameter at ``path`` as the device holds it: a kernel of the blocks as ``{"int8", "scale"}``.

    The kernel is first rounded to ``config.dtype``, like a kernel that is read from a file. Other parameters do not
    change.
    """
    if not (path.startswith("blocks/") and path.endswith(f"/{_KERNEL}")):
        return x
    return quantized(x, -2, config.dtype)


def round_params(params: Params, config: TransformerConfig) -> Params:
    """Return ``params`` with the kernels of the blocks as ``config.linear`` says; unchanged if they are so already."""
    if config.linear == "dtype" or is_rounded(params):
        return params

    def one(path: Any, x: Any) -> Any:
        return round_parameter(jax.tree_util.keystr(path, simple=True, separator="/"), x, config=config)

    return jax.tree_util.tree_map_with_path(one, params)


def is_rounded(params: Params) -> bool:
    """Return whether the kernels of the blocks are in 8 bits."""
    blocks = params["blocks"]
    layer = blocks[0] if isinstance(blocks, tuple) else blocks
    return isinstance(layer["ffn"]["fc1"][_KERNEL], Mapping)


def check(params: Params, config: TransformerConfig) -> None:
    """Check that the kernels of the blocks are in 8 bits if, and only if, ``config.linear`` is ``"int8"``.

    Raises:
        ConfigError: they are of the other form.
    """
    kind = "int8" if is_rounded(params) else "dtype"
    require(
        kind == config.linear,
        f"transformer.linear is {config.linear!r}, but these weights are for {kind!r}; load, sample and serve "
        "round weights when they read them, other programs accept: 'dtype'",
    )


@jax.custom_vjp
def product(x: jax.Array, kernel: Mapping[str, jax.Array]) -> jax.Array:
    """Return ``x W``, float32 ``[..., out]``, of ``x [..., in]`` and a kernel ``{"int8" [in, out], "scale" [1, out]}``.

    Raises:
        ConfigError: the function is differentiated.
    """
    rounded, scale = quantize(x, -1)
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    total = jax.lax.dot_general(rounded, kernel["int8"], axes, preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * scale * kernel["scale"][0]


def _refuse(*_: Any) -> Any:
    raise ConfigError(
        "transformer.linear is 'int8', which has no gradient and is for sampling; training accepts: 'dtype'"
    )


product.defvjp(_refuse, _refuse)
