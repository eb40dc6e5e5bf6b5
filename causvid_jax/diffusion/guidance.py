"""Classifier-free guidance, in one convention: ``g = 1`` is the conditional network and ``g = 0`` the unconditional.

The published DMD code writes ``cond + s (cond - uncond)``, which is this with ``g = 1 + s``; the published samplers
write what is written here. At one x_t guidance of velocities and of x0 predictions are the same thing, since
``x0 = x_t - sigma v`` is affine and the weights ``1 - g`` and ``g`` add up to one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange


def guide(unconditional: jax.Array, conditional: jax.Array, guidance: float) -> jax.Array:
    """``uncond + g (cond - uncond)``, for velocities or x0 predictions alike."""
    return unconditional + guidance * (conditional - unconditional)


def per_branch(value: jax.Array, x: jax.Array) -> jax.Array:
    """What belongs to the clips, ``[B, ...]``, for the rows of ``x``, which are B or in a guided call 2B: clip by clip.

    A network that reads more than :func:`guided_velocity` hands on (clean frames, a picture) takes it through this.
    """
    return jnp.repeat(value, len(x) // len(value), axis=0)


def guided_velocity(
    velocity_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    guidance: float,
) -> jax.Array:
    """The guided velocity, from one call of the network on a batch of 2B: each clip's two prompts side by side.

    Side by side, and not all unconditional ones first: over a batch sharded in B both then lie on the device of their
    clip, and nothing is sent.

    Args:
      velocity_fn: ``(x, timestep, text) -> velocity``.
      x: ``[B, F, h, w, C]``.
      timestep: ``[B, F]``.
      text: ``[B, S, E]``.
      null_text: the empty prompt, ``[S, E]`` or ``[B, S, E]``.
      guidance: the static weight g; with exactly 1 the unconditional branch is not computed at all.
    """
    if guidance == 1.0:
        return velocity_fn(x, timestep, text)
    null_rows = jnp.broadcast_to(null_text, text.shape).astype(text.dtype)
    texts = rearrange([null_rows, text], "two b ... -> (b two) ...")
    both = velocity_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(timestep, 2, axis=0), texts)
    unconditional, conditional = rearrange(both, "(b two) ... -> two b ...", two=2)
    return guide(unconditional, conditional, guidance)
