"""Keys and values of a stream in 8 bits: every latent frame, head and channel has a scale (``models.kv_cache``)."""

import jax
import jax.numpy as jnp


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ``x [..., n, N, D]`` as int8 and its float32 scales ``[..., 1, N, D]``.

    ``s = max |x| / 127`` over the n tokens and ``round(x / s)``, so that ``|s q - x| <= s / 2``.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-3, keepdims=True) / 127.0
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale


def stored(k: jax.Array, v: jax.Array, layer: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return keys and values of a block as the arrays of a layer's cache ``layer`` hold them."""
    if len(layer) == 2:
        return k.astype(layer[0].dtype), v.astype(layer[1].dtype)
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    return k, v, k_scale, v_scale


def readable(layer: tuple[jax.Array, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    """Return the keys and values of a layer's cache for attention; int8 ones in ``dtype``."""
    if len(layer) == 2:
        return layer[0], layer[1]
    k, v, k_scale, v_scale = layer
    return (k * k_scale).astype(dtype), (v * v_scale).astype(dtype)
