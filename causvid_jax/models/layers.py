"""The arithmetic of the DiT's layers, as functions of arrays.

Matmuls run in ``dtype`` and accumulate in float32; norms, modulation, rotary angles, softmax and the residual stream
are float32 whatever ``dtype`` is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from causvid_jax.sharding import constraints

Params = dict[str, Any]
PRODUCT = "product"  # what products with weights are called where rematerialisation chooses what to keep


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """``x [..., in] @ kernel [in, out]`` with both cast to ``dtype``, accumulated and returned in float32.

    The derivative is written out because the automatic one would multiply the float32 cotangent by a ``dtype``
    operand: a mixed product that matrix units (AMX, tensor cores, MXU) cannot run. Here the cotangent is rounded to
    ``dtype`` first, as every mixed-precision trainer does, and both gradients accumulate in float32.
    """
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


def _matmul_forward(x, kernel, dtype):
    # The rounded operands are what the backward pass needs, at half the memory.
    empty = (jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype))
    return matmul(x, kernel, dtype), (x.astype(dtype), kernel.astype(dtype), empty)


def _transposed(x: jax.Array) -> jax.Array:
    """``x.T``, on CPU really moved in memory: XLA's fast CPU matmul takes row-major operands only, and a transpose
    that is left to the layout of the product falls back to one that is 5 to 15 times slower."""
    if constraints.platform() != "cpu":
        return x.T
    return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1)))


def _matmul_backward(dtype, residuals, cotangent):
    x, kernel, (like_x, like_kernel) = residuals
    ct = cotangent.astype(dtype)
    dx = jnp.matmul(ct, _transposed(kernel), preferred_element_type=jnp.float32)
    flat_x, flat_ct = x.reshape(-1, x.shape[-1]), ct.reshape(-1, ct.shape[-1])
    dkernel = jnp.matmul(_transposed(flat_x), flat_ct, preferred_element_type=jnp.float32)
    return dx.astype(like_x.dtype), dkernel.astype(like_kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(p: Params, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """``x W + b``; ``x [..., in]`` -> float32 ``[..., out]``."""
    return checkpoint_name(matmul(x, p["kernel"], dtype), PRODUCT) + p["bias"]


def layer_norm(x: jax.Array, eps: float, p: Params | None = None) -> jax.Array:
    """``(x - mean) / sqrt(var + eps)``, times scale plus bias if ``p`` is given; over the last axis, in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(var + eps)
    return y if p is None else y * p["scale"] + p["bias"]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """``x (1 + scale) + shift``; ``x [B, F, n, M]``, shift and scale per frame ``[B, F, M]``."""
    return x * (1.0 + scale[:, :, None]) + shift[:, :, None]


def mlp(p: Params, x: jax.Array, activation: Any, dtype: str) -> jax.Array:
    """``fc2(activation(fc1(x)))``."""
    return linear(p["fc2"], activation(linear(p["fc1"], x, dtype)), dtype)


gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
gelu_exact = functools.partial(jax.nn.gelu, approximate=False)


def timestep_sinusoid(timestep: jax.Array, dim: int) -> jax.Array:
    """``[cos(t w_i) | sin(t w_i)]`` with ``w_i = 10000^(-2 i / dim)``, ``i < dim / 2``; float32 ``[..., dim]``."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
