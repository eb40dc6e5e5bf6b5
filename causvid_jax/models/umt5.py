"""The UMT5 text encoder (arXiv 2304.09151), which computes the ``prompt_embeds`` of Wan2.1.

It is a T5 encoder: pre-norm layers without biases and gated GELU. Positions enter only as a bias on the attention
scores that depends on the bucketed distance of two tokens. UMT5 has one bias table per layer; T5 shares one. Scores
are not scaled by ``1 / sqrt(D)``, because the published weights include that factor.
Source: Wan2.1, ``wan/modules/t5.py``.

Matmuls run in ``config.dtype``; norms, softmax, the bias and the residual stream are float32. Kernels and the token
table are arrays, or int8 with scales (:func:`quantize`).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Shaped

from causvid_jax.config import UMT5Config
from causvid_jax.models.layers import Params, einsum, gelu_tanh, matmul, rms_norm
from causvid_jax.models.quantization import quantized
from causvid_jax.sharding import constraints
from causvid_jax.sharding.params import Init, ParamSpec, abstract_tree, init_tree, stack_spec

# ---- parameters -----------------------------------------------------------------------------------------------------


def _kernel(fan_in: int, fan_out: int, axes: tuple[str, str], init: Init) -> dict[str, ParamSpec]:
    return {"kernel": ParamSpec((fan_in, fan_out), axes, init)}


def _scale(dim: int) -> dict[str, ParamSpec]:
    return {"scale": ParamSpec((dim,), ("embed",), nn.initializers.ones)}


def _layer_spec(config: UMT5Config) -> dict[str, Any]:
    """Return the parameters of one layer, with T5's initializers, which give the unscaled scores variance 1."""
    dim, inner = config.dim, config.num_heads * config.head_dim
    normal = nn.initializers.normal
    into, out = ("embed", "heads"), ("heads", "embed")
    return {
        "norm1": _scale(dim),
        "attn": {
            "q": _kernel(dim, inner, into, normal((dim * config.head_dim) ** -0.5)),
            "k": _kernel(dim, inner, into, normal(dim**-0.5)),
            "v": _kernel(dim, inner, into, normal(dim**-0.5)),
            "o": _kernel(inner, dim, out, normal(inner**-0.5)),
        },
        "relative_bias": ParamSpec((config.num_buckets, config.num_heads), (None, "heads"), normal(dim**-0.5)),
        "norm2": _scale(dim),
        "ffn": {
            "gate": _kernel(dim, config.ffn_dim, ("embed", "mlp"), normal(dim**-0.5)),
            "fc1": _kernel(dim, config.ffn_dim, ("embed", "mlp"), normal(dim**-0.5)),
            "fc2": _kernel(config.ffn_dim, dim, ("mlp", "embed"), normal(config.ffn_dim**-0.5)),
        },
    }


def spec(config: UMT5Config) -> dict[str, Any]:
    """Return shape, logical axes and initializer of every parameter; ``blocks`` has the stacked layers."""
    return {
        "token_embedding": ParamSpec((config.vocab_size, config.dim), (None, "embed"), nn.initializers.normal(1.0)),
        "blocks": stack_spec(_layer_spec(config), config.num_layers),
        "norm": _scale(config.dim),
    }


def init(key: jax.Array, config: UMT5Config) -> Params:
    """Return new float32 parameters."""
    return init_tree(key, spec(config))


def abstract(config: UMT5Config) -> Params:
    """Return the ``jax.ShapeDtypeStruct`` of every parameter."""
    return abstract_tree(spec(config))


def quantize(path: str, x: jax.Array) -> Any:
    """Return the parameter at ``path``; a kernel or the token table in 8 bits, as ``{"int8", "scale"}``.

    A kernel ``[..., in, out]`` has a float32 scale ``[..., 1, out]`` for every output channel. The token table
    ``[V, M]`` has a scale ``[V, 1]`` for every token. ``s = max |x| / 127`` over the other axis, and the int8 value is
    ``round(x / s)``.
    """
    axis = {"kernel": -2, "token_embedding": -1}.get(path.rpartition("/")[2])
    return x if axis is None else quantized(x, axis)


def _product(x: jax.Array, kernel: Any, dtype: str) -> jax.Array:
    """Return ``x W`` in float32. Integers of 8 bits are exact in ``dtype``, so an int8 kernel's scale follows."""
    if not isinstance(kernel, Mapping):
        return matmul(x, kernel, dtype)
    return matmul(x, kernel["int8"], dtype) * kernel["scale"][0]


# ---- relative positions ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _thresholds(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Return the smallest distance of each logarithmic bucket of one direction, ascending, without the first bucket.

    With E = num_buckets / 4 logarithmic buckets, bucket j starts at ``E (max_distance / E)^(j / E)``. Integers are
    compared, so that the rounding of a logarithm cannot move a boundary.
    """
    exact = num_buckets // 4
    starts = []
    for j in range(1, exact):
        power = exact ** (exact - j) * max_distance**j
        distance = math.floor(exact * (max_distance / exact) ** (j / exact)) - 1
        while distance**exact < power:
            distance += 1
        starts.append(distance)
    return tuple(starts)


def relative_buckets(relative: np.ndarray, config: UMT5Config) -> np.ndarray:
    """Return the bucket in ``[0, num_buckets)`` of each relative position ``key - query`` (int array of any shape).

    Half of the buckets are for keys after the query. In each half, distances below E = num_buckets / 4 have one bucket
    each. The other E buckets are logarithmic up to ``max_distance``; the last one also holds larger distances.
    """
    half, exact = config.num_buckets // 2, config.num_buckets // 4
    distance = np.abs(relative)
    starts = np.array(_thresholds(config.num_buckets, config.max_distance), np.int64)
    bucket = np.where(distance < exact, distance, exact + np.searchsorted(starts, distance, side="right"))
    return (bucket + np.where(relative > 0, half, 0)).astype(np.int32)


# ---- the encoder ----------------------------------------------------------------------------------------------------


def attention(p: Params, bias: jax.Array, x: jax.Array, mask: jax.Array, config: UMT5Config) -> jax.Array:
    """Return ``softmax(q k^T + bias) v W_o`` over the keys where ``mask [B, S]`` is true, float32 ``[B, S, M]``.

    ``bias`` is ``[N, S, S]`` with the query first, and ``x`` is ``[B, S, M]``.
    """
    dtype = config.dtype
    q, k, v = (
        rearrange(_product(x, p[name]["kernel"], dtype), "b s (N D) -> b s N D", N=config.num_heads).astype(dtype)
        for name in ("q", "k", "v")
    )
    scores = jnp.where(mask[:, None, None], einsum("bqnd,bknd->bnqk", q, k) + bias, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    out = einsum("bnqk,bknd->bqnd", weights, v)
    return _product(rearrange(out, "b s N D -> b s (N D)"), p["o"]["kernel"], dtype)


def feed_forward(p: Params, x: jax.Array, dtype: str) -> jax.Array:
    """Return ``fc2(gelu(gate(x)) * fc1(x))`` with the tanh form of GELU, float32 ``[B, S, M]``."""
    hidden = gelu_tanh(_product(x, p["gate"]["kernel"], dtype)) * _product(x, p["fc1"]["kernel"], dtype)
    return _product(hidden, p["fc2"]["kernel"], dtype)


def _layer_params(blocks: Params, index: jax.Array) -> Params:
    """Return the parameters of one layer of the stack.

    XLA's CPU backend converts a bfloat16 slice to float32. It moves the conversion of all layers out of the loop, which
    takes 19 GB at full size. The barrier keeps the conversion in the loop, where it fuses with the slice.
    """
    if constraints.platform() == "cpu":
        blocks, index = jax.lax.optimization_barrier((blocks, index))
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)


def encode(
    params: Params, ids: Int[jax.Array, "B S"], mask: Shaped[jax.Array, "B S"], *, config: UMT5Config
) -> Float[jax.Array, "B S M"]:
    """Return the prompt embeddings of token ids, zero where ``mask`` is false::

        x = embedding[ids]
        x += Attention(RMS(x)); x += FFN(RMS(x))   per layer
        prompt_embeds = RMS(x) * mask

    An embedding does not depend on padding, so short prompts can be encoded at their own length.

    Args:
        params: of :func:`spec`, of any floating type, or quantized by :func:`quantize`.
        ids: token ids in ``[0, vocab_size)``; other ids are clamped without a warning.
        mask: bool or 0/1, true for tokens of the prompt, at least one for each prompt (``</s>``).
        config: sizes and compute type.

    Returns:
        float32 ``[B, S, M]``.
    """
    mask = mask.astype(bool)
    positions = np.arange(ids.shape[1])
    buckets = relative_buckets(positions[None, :] - positions[:, None], config)  # [query, key]

    def layer(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        p = _layer_params(params["blocks"], index)
        with jax.named_scope("self_attention"):
            bias = rearrange(p["relative_bias"].astype(jnp.float32)[buckets], "q k N -> N q k")
            x = x + attention(p["attn"], bias, rms_norm(x, p["norm1"]["scale"], config.eps), mask, config)
        with jax.named_scope("ffn"):
            x = x + feed_forward(p["ffn"], rms_norm(x, p["norm2"]["scale"], config.eps), config.dtype)
        return x, None

    with jax.named_scope("embed"):
        table = params["token_embedding"]
        quantized = isinstance(table, Mapping)
        x = table["int8"][ids] * table["scale"][ids] if quantized else table[ids].astype(jnp.float32)  # [B, S, M]
    x, _ = jax.lax.scan(layer, x, jnp.arange(config.num_layers))
    return jnp.where(mask[..., None], rms_norm(x, params["norm"]["scale"], config.eps), 0.0)
