"""Layers of the diffusion transformer as functions of arrays.

Matmuls run in ``dtype`` and accumulate in float32. Norms, modulation, rotary angles, softmax and the residual stream
are always float32.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float

from causvid_jax.sharding import constraints

Params = dict[str, Any]
PRODUCT = "product"  # checkpoint name of the results of linear layers, for rematerialization policies


def dot_precision(dtype: Any) -> jax.lax.Precision:
    """Return the precision of products and convolutions of operands of ``dtype``: the highest for float32.

    By default accelerators multiply float32 with less precision (TF32 on GPU, one bfloat16 pass on TPU: relative errors
    of 5e-4 and 4e-3). Products of narrower operands are exact in float32.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the product of two arrays of one type, accumulated and returned in float32 (:func:`dot_precision`)."""
    return jnp.einsum(equation, x, y, precision=dot_precision(y.dtype), preferred_element_type=jnp.float32)


_FORWARD_MODE = contextvars.ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def differentiable_by_jvp() -> Iterator[None]:
    """Trace products without ``custom_vjp``, which ``jax.jvp`` cannot differentiate."""
    token = _FORWARD_MODE.set(True)
    try:
        yield
    finally:
        _FORWARD_MODE.reset(token)


def matmul(x: jax.Array, kernel: jax.Array, dtype: str, result: str = "float32") -> jax.Array:
    """Return ``x [..., in] @ kernel [in, out]`` in type ``result``, with operands of ``dtype``, accumulated in float32.

    Its derivative is explicit (:func:`_matmul`), except under :func:`differentiable_by_jvp`.
    """
    return (_product if _FORWARD_MODE.get() else _matmul)(x, kernel, dtype, result)


def _product(x: jax.Array, kernel: jax.Array, dtype: str, result: str) -> jax.Array:
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jnp.matmul(x, kernel, precision=dot_precision(dtype), preferred_element_type=jnp.dtype(result))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, kernel: jax.Array, dtype: str, result: str) -> jax.Array:
    """Compute :func:`matmul` with an explicit derivative.

    The automatic derivative multiplies the float32 cotangent by a ``dtype`` operand, and matrix units (AMX, tensor
    cores, MXU) cannot run such a mixed product. The explicit derivative first rounds the cotangent to ``dtype``, as is
    usual in mixed-precision training. Both gradients accumulate in float32.
    """
    return _product(x, kernel, dtype, result)


def _matmul_forward(x: jax.Array, kernel: jax.Array, dtype: str, result: str) -> tuple[jax.Array, Any]:
    # The backward pass needs only the rounded operands, which take half the memory.
    empty = (jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype))
    return _product(x, kernel, dtype, result), (x.astype(dtype), kernel.astype(dtype), empty)


def _matmul_backward(dtype: str, _: str, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, (like_x, like_kernel) = residuals
    ct = cotangent.astype(dtype)
    dx = jnp.matmul(ct, _transposed(kernel), precision=dot_precision(dtype), preferred_element_type=jnp.float32)
    return dx.astype(like_x.dtype), _kernel_gradient(x, ct).astype(like_kernel.dtype)


def _kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Return ``sum x^T cotangent`` over all axes but the last, ``[in, out]`` in float32."""
    options: dict[str, Any] = {"precision": dot_precision(x.dtype), "preferred_element_type": jnp.float32}
    if constraints.platform() == "cpu":
        x, cotangent = (z.reshape(-1, z.shape[-1]) for z in (x, cotangent))
        return jnp.matmul(_transposed(x), cotangent, **options)
    # Merged axes would merge a split axis (tokens) with others. Every device would then gather all activations and
    # compute the whole gradient. If axes are contracted one by one, each device sums its own part.
    summed = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, cotangent, ((summed, summed), ((), ())), **options)


def _transposed(x: jax.Array) -> jax.Array:
    """Return ``x.T``; on CPU in row-major memory layout.

    XLA's fast CPU matmul accepts row-major operands only. Without the layout constraint XLA folds the transpose into
    the product and uses a kernel that is 5 to 15 times slower.
    """
    if constraints.platform() != "cpu":
        return x.T
    return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1)))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(
    p: Params, x: Float[jax.Array, "*n i"], dtype: str = "float32", result: str = "float32"
) -> Float[jax.Array, "*n o"]:
    """Return ``x W + b``, float32 ``[..., out]``, for ``x [..., in]``; the product ``x W`` has type ``result``."""
    return checkpoint_name(matmul(x, p["kernel"], dtype, result), PRODUCT) + p["bias"]


def layer_norm(x: Float[jax.Array, "*n M"], eps: float, p: Params | None = None) -> Float[jax.Array, "*n M"]:
    """Return ``(x - mean) / sqrt(var + eps)`` over the last axis in float32; ``p`` adds a scale and a bias."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(var + eps)
    return y if p is None else y * p["scale"] + p["bias"]


def rms_norm(
    x: Float[jax.Array, "*n M"], scale: jax.Array, eps: float, *, rotated: bool = False
) -> Float[jax.Array, "*n M"]:
    """Return ``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32.

    Set ``rotated`` if the result is rotated next. On a GPU the sums are then computed first, and the rotation divides
    by their roots. Otherwise XLA writes the normalized x to memory in float32, only for the rotation to read.
    """
    x = x.astype(jnp.float32)
    total = jnp.square(x).sum(-1, keepdims=True)
    if rotated and constraints.platform() in ("gpu", "cuda"):
        total = jax.lax.optimization_barrier(total)
    return x * jax.lax.rsqrt(total / x.shape[-1] + eps) * scale


def modulate(
    x: Float[jax.Array, "B F n M"], shift: Float[jax.Array, "#B #F M"], scale: Float[jax.Array, "#B #F M"]
) -> Float[jax.Array, "B F n M"]:
    """Return ``x (1 + scale) + shift`` for ``x [B, F, n, M]`` and a shift and scale per frame, ``[B, F, M]``."""
    return x * (1.0 + scale[:, :, None]) + shift[:, :, None]


def mlp(p: Params, x: jax.Array, activation: Any, dtype: str) -> jax.Array:
    """Return ``fc2(activation(fc1(x)))``, float32 ``[..., out]``."""
    return linear(p["fc2"], activation(linear(p["fc1"], x, dtype)), dtype)


gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
gelu_exact = functools.partial(jax.nn.gelu, approximate=False)


def timestep_sinusoid(timestep: Float[jax.Array, "*n"], dim: int) -> Float[jax.Array, "*n d"]:
    """Return ``[cos(t w_i) | sin(t w_i)]``, ``w_i = 10000^(-2 i / dim)``, i < dim / 2; float32 ``[..., dim]``.

    t is the ``timestep`` in [0, 1000]. Source: Wan2.1, ``wan/modules/model.py``.
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
