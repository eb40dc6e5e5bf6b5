"""The two score networks of the stage ``distill``: forward modes, timesteps, and their inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from causvid_jax.config import ExpertsConfig, Recipe, TransformerConfig
from causvid_jax.data import pictures
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.guidance import per_branch
from causvid_jax.distill import gan, scores
from causvid_jax.distill.exit_steps import Rollout, exit_steps_of
from causvid_jax.distill.rollout import noisy_context
from causvid_jax.models import adapters, experts, transformer
from causvid_jax.models.image_branch import Picture, conditioned
from causvid_jax.training.dmd_data import clip_shape


def shares_base(recipe: Recipe) -> bool:
    """Return whether the fake score is adapters on the student's frozen base; the base is then stored once."""
    return recipe.train_distill.critic_init == "student" and recipe.student.lora.rank > 0


def critic_spec(recipe: Recipe) -> dict[str, Any]:
    """Return the specification of the parameters that the state holds for the fake score.

    These are the parameters of its network, or only its adapters (:func:`shares_base`), and the discriminator's head if
    the objective has a discriminator.
    """
    config, net = recipe.train_distill, recipe.fake_score
    spec = transformer.spec(net)
    head = {gan.HEAD: gan.head_spec(net, config)} if config.objective == "dmd_gan" else {}
    return (adapters.split(spec)[0] if shares_base(recipe) else spec) | head


def fake_params(critic: Any, student: Any, recipe: Recipe) -> Any:
    """Return all parameters of the fake score: those of the state, with the student's base if it is shared."""
    return adapters.join(critic, adapters.split(student)[1]) if shares_base(recipe) else critic


def score(
    params: Any,
    x: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
    *,
    clean: jax.Array,
    mode: str,
    network: TransformerConfig,
    recipe: Recipe,
    picture: Picture | None = None,
    pair: ExpertsConfig = ExpertsConfig(),  # noqa: B008
) -> jax.Array:
    """Return a score network's velocity ``[B, F, h, w, C]`` in its forward mode.

    Args:
        params: of the network.
        x: noisy latents ``[B, F, h, w, C]``, or 2B of them (``diffusion.guidance``).
        timestep: ``[B, F]``, in [0, 1000].
        text: prompt embeddings, ``[B, S, E]``.
        clean: the past of the mode ``"causal"``, ``[B, F, h, w, C]`` (:func:`score_options`).
        mode: ``"bidirectional"``; ``"causal"``: each block attends to the clean blocks before it; or ``"chunk"``: every
            clip is a single block (:func:`scored`).
        network: sizes of the network.
        recipe: block structure.
        picture: for a network with an image branch.
        pair: of a bidirectional network of two experts.
    """
    if mode != "causal":
        bidirectional = conditioned(experts.bidirectional, picture, network)
        return bidirectional(params, x, timestep, text, config=network, experts=pair)
    return conditioned(transformer.block_causal, picture, network)(
        params,
        x,
        timestep,
        text,
        config=network,
        causal=recipe.causal,
        clean=per_branch(clean, x),
        clean_timestep=recipe.causal.context_noise,
    )


def score_options(x: jax.Array, batch: Any, key: jax.Array, recipe: Recipe) -> dict[str, Any]:
    """Return the keywords of :func:`real_score` and :func:`fake_score` for the student's output ``x [B, F, h, w, C]``.

    As a past, x has the noise of ``causal.add_context_noise``, as in a causal teacher's training. ``key`` is that of
    the losses, and ``batch`` may have pictures.
    """
    clean = noisy_context(jax.lax.stop_gradient(x), key, 5, recipe.causal)  # the losses use the numbers 0 to 4
    return {"clean": clean, "recipe": recipe, "picture": pictures.picture_of(batch)}


def real_score(params: Any, *inputs: jax.Array, recipe: Recipe, **options: Any) -> jax.Array:
    """Return the teacher's velocity in the forward mode ``train_distill.teacher``; arguments as in :func:`score`."""
    mode = recipe.train_distill.teacher
    return score(params, *inputs, mode=mode, network=recipe.teacher, pair=recipe.experts, recipe=recipe, **options)


def fake_score(params: Any, *inputs: jax.Array, recipe: Recipe, **options: Any) -> jax.Array:
    """Return the critic's velocity in the forward mode ``train_distill.critic_mode``; arguments as in :func:`score`."""
    params = {name: value for name, value in params.items() if name != gan.HEAD}
    mode = recipe.train_distill.critic_mode
    return score(params, *inputs, mode=mode, network=recipe.fake_score, recipe=recipe, **options)


def student_rollout(recipe: Recipe) -> Rollout:
    """Return the settings of the student's own rollouts."""
    timesteps = tuple(flow.student_timesteps(recipe.diffusion))
    first = flow.first_block_timesteps(recipe.diffusion)
    return Rollout(recipe.student, recipe.causal, timesteps, first, recipe.train_distill.exit_steps)


def score_levels(key: jax.Array, frames: int, recipe: Recipe) -> scores.Levels:
    """Return the range of the scores' timesteps for ``frames`` latent frames, as ``score_timesteps`` says.

    ``key`` is that of ``dmd.generate``, which draws the exit steps. Causal scores were trained with one timestep per
    block, so they get one per block. Source: ``ts_schedule`` and ``ts_schedule_max`` of Self-Forcing's code.
    """
    config, diffusion = recipe.train_distill, recipe.diffusion
    blocks = recipe.causal.block_sizes(frames) if config.teacher == config.critic_mode == "causal" else ()
    if config.score_timesteps == "all":
        return scores.Levels(block_sizes=blocks)
    exit_step = exit_steps_of(student_rollout(recipe), key, clip_shape(recipe)[0])[0]
    sigmas = np.array([*flow.student_timesteps(diffusion), 0.0]) / 1000
    times = jnp.asarray(flow.u_from_sigma(sigmas, diffusion.shift), jnp.float32)
    high = times[exit_step] if config.score_timesteps == "at_exit" else None
    return scores.Levels(times[exit_step + 1], high, blocks)


def scored(
    x0: jax.Array, mask: jax.Array | None, text: jax.Array, recipe: Recipe
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Return ``(x0, mask, text)`` for the scores: of clips, or with ``teacher="chunk"`` of single blocks as clips."""
    if recipe.train_distill.teacher != "chunk":
        return x0, mask, text
    x0, mask = jax.tree.map(
        lambda x: rearrange(x, "b (n k) ... -> (b n) k ...", k=recipe.causal.frames_per_block), (x0, mask)
    )
    return x0, mask, jnp.repeat(text, len(x0) // len(text), axis=0)
