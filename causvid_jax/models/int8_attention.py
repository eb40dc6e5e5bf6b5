"""Attention whose scores are products of 8-bit integers, as a Pallas kernel for GPU and TPU, for sampling only.

The method is SageAttention (arXiv 2410.02367). The mean of the keys is subtracted from every key. This changes all
scores of a query by the same number, which softmax cancels, and removes outliers that all keys share. Queries and
smoothed keys are then rounded to int8 with a scale for every token and head::

    S = s_q s_k (q8 k8^T) / sqrt(D),    out = softmax(S) v

The sum of q8 k8^T is exact in int32. The second product has operands of the compute type. One program of the kernel
computes a block of queries of one head. It loops over the keys with a running softmax, so no T x S array exists, and
ends at the last key in use.

On CPU the kernel is interpreted, which is slow. It was compiled for described devices, but never timed on a device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from causvid_jax.config import ConfigError, require
from causvid_jax.models.quantization import quantize
from causvid_jax.sharding import constraints

LOWEST = -1e30
"""Score of a key that is masked; finite, so that a block without visible keys has no NaN."""
BLOCKS = {"tpu": (512, 512), "gpu": (128, 64)}
"""Queries and keys of a block of scores."""


def smoothed(k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return ``k [B, S, N, D]`` in float32 minus its mean over the keys where ``mask [S]`` is true (None: all)."""
    k = k.astype(jnp.float32)
    if mask is None:
        return k - k.mean(1, keepdims=True)
    shown = mask[:, None, None].astype(jnp.float32)
    return k - (k * shown).sum(1, keepdims=True) / jnp.maximum(shown.sum(), 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, dtype: str, mask: jax.Array | None, used: jax.Array | None
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(D)) v``, float32 ``[B, T, N, D]``, with int8 operands of the first product.

    Args:
        q: ``[B, T, N, D]``.
        k: ``[B, S, N, D]``.
        v: ``[B, S, N, D]``.
        dtype: type of the operands of the second product.
        mask: bool ``[S]``, the keys that all queries see; None: all.
        used: scalar count for a mask that is true for exactly the first ``used`` keys; the other keys cost nothing.

    Raises:
        ConfigError: the function is differentiated, or there is no such kernel for the device.
    """
    platform = constraints.platform()
    kind = {"cuda": "gpu"}.get(platform, platform)
    require(
        kind in ("cpu", *BLOCKS), f"attention is 'int8', which has no kernel for {platform}; accepted: 'auto', 'xla'"
    )
    (batch, length, _, size), keys = q.shape, k.shape[1]
    block_q, block_k = BLOCKS[kind if kind in BLOCKS else "gpu"]
    width = size + (0 if kind == "cpu" else -size % 128)

    def rows(x: jax.Array, block: int) -> jax.Array:  # [B, T, N, D] -> [B N, T', D']
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, width - size)))
        return rearrange(x, "b t n d -> (b n) t d")

    queries, q_scale = quantize(rows(q.astype(jnp.float32) / math.sqrt(size), block_q), -1)
    smooth, k_scale = quantize(rows(smoothed(k, mask), block_k), -1)
    visible = jnp.ones((keys,), bool) if mask is None else mask
    bias = jnp.where(jnp.pad(visible, (0, -keys % block_k)), 0.0, LOWEST).reshape(-1, block_k)
    count = jnp.asarray(keys if used is None else used, jnp.int32)
    out = _call(
        (-(-count // block_k)).reshape(1),
        queries,
        q_scale,
        smooth,
        rearrange(k_scale, "h (p c) one -> h p (one c)", c=block_k),
        bias,
        rows(v.astype(dtype), block_k),
        block_q=block_q,
        kind=kind,
    )
    return rearrange(out, "(b n) t d -> b t n d", b=batch)[:, :length, :, :size].astype(jnp.float32)


def _refuse(*_: Any) -> Any:
    raise ConfigError("attention is 'int8', which has no gradient and is for sampling; training accepts: 'auto', 'xla'")


attention.defvjp(_refuse, _refuse)


def _call(count: jax.Array, *arrays: jax.Array, block_q: int, kind: str) -> jax.Array:
    """Run :func:`_kernel` for every head and block of queries."""
    from jax.experimental import pallas as pl

    queries, _, smooth, k_scale, bias, v = arrays
    heads, length, width = queries.shape
    whole = (smooth.shape[1], k_scale.shape[1], k_scale.shape[2])
    in_specs = [
        pl.BlockSpec((1,), lambda h, i: (0,), **_scalar_memory(kind)),
        pl.BlockSpec((1, block_q, width), lambda h, i: (h, i, 0)),
        pl.BlockSpec((1, block_q, 1), lambda h, i: (h, i, 0)),
        pl.BlockSpec((1, whole[0], width), lambda h, i: (h, 0, 0)),
        pl.BlockSpec((1, whole[1], whole[2]), lambda h, i: (h, 0, 0)),
        pl.BlockSpec((whole[1], whole[2]), lambda h, i: (0, 0)),
        pl.BlockSpec((1, whole[0], width), lambda h, i: (h, 0, 0)),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, block=bias.shape[1]),
        grid=(heads, length // block_q),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((1, block_q, width), lambda h, i: (h, i, 0)),
        out_shape=jax.ShapeDtypeStruct((heads, length, width), v.dtype),
        interpret=kind == "cpu",
        name="int8_attention",
        **_compiler_params(kind),
    )(count, *arrays)


def _scalar_memory(kind: str) -> dict[str, Any]:
    if kind != "tpu":
        return {}
    from jax.experimental.pallas import tpu

    return {"memory_space": tpu.SMEM}


def _compiler_params(kind: str) -> dict[str, Any]:
    """Return the compiler's settings. On a TPU all keys and values of a head are in VMEM: 2 x 13 MB at window 21."""
    if kind == "tpu":
        from jax.experimental.pallas import tpu

        return {
            "compiler_params": tpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20
            )
        }
    if kind == "gpu":
        from jax.experimental.pallas import triton

        return {"compiler_params": triton.CompilerParams(num_warps=8, num_stages=2)}
    return {}


def _kernel(count: Any, q: Any, q_scale: Any, k: Any, k_scale: Any, bias: Any, v: Any, out: Any, *, block: int) -> None:
    """Compute one block of queries of one head; arguments are references to arrays."""
    from jax.experimental import pallas as pl

    queries, scale = q[0], q_scale[0]  # [Q, D] int8, [Q, 1]

    def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, top, weight = carry
        here, row = pl.ds(i * block, block), pl.ds(i, 1)
        products = jax.lax.dot_general(
            queries, k[0, here, :], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        scores = products.astype(jnp.float32) * scale * k_scale[0, row, :] + bias[row, :]
        highest = jnp.maximum(top, scores.max(1, keepdims=True))
        weights, before = jnp.exp(scores - highest), jnp.exp(top - highest)
        values = v[0, here, :]
        product = jax.lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total * before + product, highest, weight * before + weights.sum(1, keepdims=True)

    lowest = jnp.full(scale.shape, LOWEST, jnp.float32)
    start = (jnp.zeros(queries.shape, jnp.float32), lowest, jnp.zeros(scale.shape, jnp.float32))
    total, _, weight = jax.lax.fori_loop(0, count[0], add, start)
    out[0] = (total / weight).astype(out.dtype)
