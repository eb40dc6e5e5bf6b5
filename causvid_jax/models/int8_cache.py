"""Keys and values of a stream in 8 bits: every latent frame, head and channel has a scale (``models.kv_cache``)."""

import jax

from causvid_jax.models.quantization import quantize

TOKENS = -3
"""Axis of ``[..., n, N, D]`` over which a frame has one scale."""


def stored(k: jax.Array, v: jax.Array, layer: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return keys and values ``[B, K, n, N, D]`` of a block in the form of a layer's cache ``layer``.

    A cache of two arrays holds keys and values in its dtype. A cache of four arrays holds int8 keys and values, and
    their float32 scales ``[B, K, 1, N, D]``.
    """
    if len(layer) == 2:
        return k.astype(layer[0].dtype), v.astype(layer[1].dtype)
    (k, k_scale), (v, v_scale) = quantize(k, TOKENS), quantize(v, TOKENS)
    return k, v, k_scale, v_scale


def readable(layer: tuple[jax.Array, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    """Return keys and values ``[B, S, n, N, D]`` of a layer's cache; from int8, times their scales, in ``dtype``."""
    if len(layer) == 2:
        return layer[0], layer[1]
    k, v, k_scale, v_scale = layer
    return (k * k_scale).astype(dtype), (v * v_scale).astype(dtype)
