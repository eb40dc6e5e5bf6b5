"""The teacher's guided ODE trajectories of a batch: of whole clips, or of every block given its clean past."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from causvid_jax.config import Recipe
from causvid_jax.diffusion.guidance import per_branch
from causvid_jax.distill.ode_regression import splice
from causvid_jax.distill.rollout import noisy_context
from causvid_jax.distill.trajectories import teacher_trajectory
from causvid_jax.models import experts, transformer
from causvid_jax.models.image_branch import Picture, conditioned
from causvid_jax.sampling.teacher import guide_teacher


def bidirectional_states(
    params: Any,
    numbers: jax.Array,
    embeds: jax.Array,
    *picture: jax.Array,
    recipe: Recipe,
    key: jax.Array,
    negative: jax.Array,
) -> jax.Array:
    """Return the trajectories of whole clips, float32 [B, Q + 1, F, h, w, C]; arguments as :func:`causal_states`."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), recipe.latent_shape))(numbers)
    network = conditioned(experts.bidirectional, Picture(*picture) if picture else None, recipe.teacher)
    network = functools.partial(network, params, config=recipe.teacher, experts=recipe.experts)
    states = teacher_trajectory(
        guide_teacher(network, embeds, negative, recipe),
        noise,
        recipe.trajectory_diffusion,
    )
    return rearrange(states, "q b ... -> b q ...")


def causal_key(seed: int, frames: int) -> jax.Array:
    """Return the random key of the causal trajectories of ``frames`` latent frames (0: whole clips).

    Each length has its own key. With one key for all, the first blocks of short and whole clips would have the same
    noise, and both datasets would contain the same examples.
    """
    key = jax.random.key(seed)
    return jax.random.fold_in(key, frames) if frames else key


def causal_states(
    params: Any,
    numbers: jax.Array,
    embeds: jax.Array,
    own: jax.Array,
    other: jax.Array,
    *picture: jax.Array,
    recipe: Recipe,
    key: jax.Array,
    negative: jax.Array,
) -> jax.Array:
    """Return the trajectories of every block given its clean past, and after them the contexts.

    Args:
        params: parameters of the causal teacher.
        numbers: numbers of the trajectories, uint32 [B].
        embeds: prompt embeddings [B, S, E].
        own: latents of the clips [B, F, h, w, C].
        other: latents of the clips whose past may replace that of ``own`` (``ode_regression.splice``).
        picture: arrays of :class:`Picture`, for a network with an image branch.
        recipe: its teacher, blocks and diffusion are used.
        key: random key; trajectory i uses ``fold_in(key, i)``.
        negative: embeddings of the negative prompt [S, E].

    Returns:
        float32 [B, Q + 2, F, h, w, C]: the Q + 1 states, then the context.
    """
    diffusion, shape = recipe.trajectory_diffusion, own.shape[1:]
    sizes, switched = recipe.causal.block_sizes(shape[0]), recipe.train_init.prompt_switch_prob
    block_causal = conditioned(transformer.block_causal, Picture(*picture) if picture else None, recipe.teacher)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(numbers)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])
    past = jax.vmap(lambda k: splice(k, 1, sizes, switched)[0])(keys[:, 1])
    context = jnp.where(past[:, :, None, None, None], other, own)
    # Keys 0 and 1 of a trajectory are split off above.
    context = jax.vmap(lambda x, i: noisy_context(x, jax.random.fold_in(key, i), 2, recipe.causal))(context, numbers)

    def network(x: jax.Array, timestep: jax.Array, embeds: jax.Array) -> jax.Array:
        return block_causal(
            params,
            x,
            timestep,
            embeds,
            config=recipe.teacher,
            causal=recipe.causal,
            clean=per_branch(context, x),
            clean_timestep=recipe.causal.context_noise,
        )

    states = teacher_trajectory(
        guide_teacher(network, embeds, negative, recipe),
        noise,
        diffusion,
    )
    return rearrange([*states, context], "q b ... -> b q ...")
