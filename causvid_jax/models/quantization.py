"""Round arrays to 8-bit integers with scales: caches, scores of attention, weights in 8 bits."""

import functools

import jax
import jax.numpy as jnp

TOKENS = -3
"""Axis of ``[..., n, N, D]`` over which a latent frame of a cache has one scale."""


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return ``q = round(x / s)``, int8 with the shape of ``x``, and ``s = max |x| / 127`` over ``axis``, float32.

    s has length 1 along ``axis``, and ``|s q - x| <= s / 2``. If all x are zero, s is 0.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis, keepdims=True) / 127.0
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale


@functools.partial(jax.jit, static_argnames=("axis", "dtype"))
def quantized(x: jax.Array, axis: int, dtype: str = "float32") -> dict[str, jax.Array]:
    """Round x to ``dtype`` and return :func:`quantize` of it as a parameter in 8 bits, ``{"int8", "scale"}``."""
    rounded, scale = quantize(x.astype(dtype), axis)
    return {"int8": rounded, "scale": scale}


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
