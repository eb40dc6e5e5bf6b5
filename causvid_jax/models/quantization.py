"""Round arrays to 8-bit integers with scales, for caches, scores of attention and weights of the text encoder."""

import jax
import jax.numpy as jnp


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return ``q = round(x / s)``, int8 with the shape of ``x``, and ``s = max |x| / 127`` over ``axis``, float32.

    s has length 1 along ``axis``, and ``|s q - x| <= s / 2``. If all x are zero, s is 0.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis, keepdims=True) / 127.0
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale
