"""Classifier-free guidance, ``uncond + g (cond - uncond)``. With ``g = 1`` it is the conditional network.

The published samplers use this form. The published DMD code writes ``cond + s (cond - uncond)``, where ``g = 1 + s``.
At one x_t it equals guidance of x0 predictions: ``x0 = x_t - sigma v`` is affine in v, and the weights sum to one.

Sources: arXiv 2207.12598; 2404.07724 (interval); 2410.02416 (projection).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from causvid_jax.diffusion import flow


def scale_at(
    timestep: Float[jax.Array, "B F"],
    high: float,
    low: float = 0.0,
    boundary: float = 0.0,
    interval: tuple[float, float] = (0.0, 1000.0),
) -> float | Float[jax.Array, "B F"]:
    """Return the guidance scale of each frame: 1 outside ``interval`` (arXiv 2404.07724), both bounds included.

    Inside it is ``high``, but for two experts (``config.ExpertsConfig``) ``low`` where ``timestep < boundary``. A
    ``low`` or ``boundary`` of 0 means one scale. The result is the number ``high`` if all timesteps have this scale.
    """
    scale = jnp.where(timestep >= boundary, high, low) if boundary and low and low != high else high
    first, last = interval
    if (first <= 0 and last >= 1000) or (isinstance(scale, float) and scale == 1.0):
        return scale
    return jnp.where((timestep >= first) & (timestep <= last), scale, 1.0)


def per_branch(value: jax.Array, x: jax.Array) -> jax.Array:
    """Repeat every example of ``value [B, ...]`` to the batch size of ``x``, which is B or 2B.

    :func:`guided_velocity` calls the network on 2B examples. A network with inputs that it does not pass (clean frames,
    an image) must repeat them this way.
    """
    return jnp.repeat(value, len(x) // len(value), axis=0)


def guided_velocity(
    velocity_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x: Float[jax.Array, "B F h w C"],
    timestep: Float[jax.Array, "B F"],
    prompt_embeds: Float[jax.Array, "B S E"],
    negative_prompt_embeds: Float[jax.Array, "*batch S E"],
    guidance_scale: float | Float[jax.Array, "..."],
    eta: float = 1.0,
) -> Float[jax.Array, "B F h w D"]:
    """Return ``v_uncond + g (v_cond - v_uncond)`` from one call of the network on a batch of 2B.

    With ``eta`` below 1 it is ``v_cond + (g - 1) (d - (1 - eta) (<d, x0> / <x0, x0>) x0)`` with
    ``d = v_cond - v_uncond``, ``x0 = x - sigma v_cond`` and inner products over h, w and C of each frame.

    The two branches of a clip are adjacent in the batch. If the batch is sharded, both are on the device of the clip,
    and no communication is needed.

    Args:
        velocity_fn: ``(x, timestep, prompt_embeds) -> velocity``.
        x: noisy latents ``[B, F, h, w, C]``.
        timestep: ``[B, F]``, in [0, 1000].
        prompt_embeds: ``[B, S, E]``.
        negative_prompt_embeds: of the unconditional branch, ``[S, E]`` or ``[B, S, E]``.
        guidance_scale: weight g, a number (1: no unconditional branch is computed) or an array ``[B]`` or ``[B, F]``.
        eta: weight of the parallel part, in [0, 1]; 1 is plain guidance.

    Returns:
        The velocity, ``[B, F, h, w, D]`` with the D output channels of the network.
    """
    number = isinstance(guidance_scale, (int, float))
    if number and guidance_scale == 1.0:
        return velocity_fn(x, timestep, prompt_embeds)
    negative = jnp.broadcast_to(negative_prompt_embeds, prompt_embeds.shape).astype(prompt_embeds.dtype)
    embeds = rearrange([negative, prompt_embeds], "two b ... -> (b two) ...")
    both = velocity_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(timestep, 2, axis=0), embeds)
    unconditional, conditional = rearrange(both, "(b two) ... -> two b ...", two=2)
    scale = guidance_scale if number else flow.expand(guidance_scale, conditional)
    if eta == 1.0:
        return unconditional + scale * (conditional - unconditional)
    d = (conditional - unconditional).astype(jnp.float32)
    x0 = flow.x0_from_velocity(x, conditional, flow.sigma_from_timestep(timestep))
    inner, norm = (jnp.sum(y * x0, axis=(-3, -2, -1), keepdims=True) for y in (d, x0))
    d -= (1.0 - eta) * inner / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny) * x0
    return (conditional + (scale - 1.0) * d).astype(conditional.dtype)
