"""Flow matching of the teacher (CausVid, section 3.1) and of the causal teacher by teacher forcing.

    x_t = (1 - sigma) x0 + sigma noise,    L = mean (v(x_t, t, caption) - (noise - x0))^2,    t = 1000 sigma

Sources: flow matching, arXiv 2210.02747; teacher forcing, stage 1 of Causal Forcing, arXiv 2602.02214.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from causvid_jax.config import Recipe, require
from causvid_jax.data import pictures, pipeline
from causvid_jax.data import sources as datasets
from causvid_jax.diffusion import flow
from causvid_jax.distill import ode_regression
from causvid_jax.distill.rollout import noisy_context
from causvid_jax.models import transformer
from causvid_jax.models.image_branch import conditioned
from causvid_jax.sharding.placement import Placement
from causvid_jax.text import encoder
from causvid_jax.training import samples, weights
from causvid_jax.training.run import Run
from causvid_jax.training.update import NetworkStep, network_step

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]

# ---- updates ---------------------------------------------------------------------------------------------------------


def drop_captions(
    text: jax.Array, key: jax.Array, probability: float, negative_prompt_embeds: Any | None = None
) -> jax.Array:
    """Return ``text [B, S, E]`` in which each caption is the negative prompt with ``probability``.

    The unconditional branch is then trained on the embeddings that guidance uses. Without ``negative_prompt_embeds``,
    ``[S, E]``, they are zeros, as for the empty negative prompt of a recipe of words.
    """
    keep = jax.random.uniform(key, (len(text), 1, 1)) >= probability
    return text * keep if negative_prompt_embeds is None else jnp.where(keep, text, negative_prompt_embeds)


def teacher_loss(
    params: Any,
    batch: Batch,
    key: jax.Array,
    *,
    recipe: Recipe,
    negative_prompt_embeds: Any | None = None,
    sigma: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Return the loss of the bidirectional teacher: one t per clip on the shifted grid, captions dropped at random.

    With ``train_teacher.chunks`` every block is a clip of its own.

    Args:
        params: of the teacher.
        batch: ``latents [B, F, h, w, C]`` and ``text [B, S, E]``, with pictures for an image branch.
        key: draws t, noise and which captions are dropped.
        recipe: grid, teacher, ``train_teacher.caption_dropout``.
        negative_prompt_embeds: ``[S, E]``, which replace dropped captions; None: zeros.
        sigma: ``[B, F]`` in [0, 1], instead of drawn ones.
        noise: shape of the latents, instead of drawn noise.

    Returns:
        The scalar loss and ``{"loss"}``.
    """
    latents, text = batch["latents"], batch["text"]
    if recipe.train_teacher.chunks:
        latents = rearrange(latents, "b (n k) h w c -> (b n) k h w c", k=recipe.causal.frames_per_block)
        text = jnp.repeat(text, len(latents) // len(text), axis=0)
    size, frames = latents.shape[:2]
    u_key, noise_key, drop_key = jax.random.split(key, 3)
    # Stratified: one u in each of B equal cells, which lowers the variance of the loss.
    if sigma is None:
        u = (jnp.arange(size) + jax.random.uniform(u_key, (size,))) / size
        sigma = jnp.broadcast_to(flow.sigma_from_u(u, recipe.diffusion.shift)[:, None], (size, frames))
    noise = jax.random.normal(noise_key, latents.shape) if noise is None else noise
    text = drop_captions(text, drop_key, recipe.train_teacher.caption_dropout, negative_prompt_embeds)
    x_t = flow.add_noise(latents, noise, sigma)
    network = conditioned(transformer.bidirectional, pictures.picture_of(batch), recipe.teacher)
    velocity = network(params, x_t, flow.timestep_from_sigma(sigma), text, config=recipe.teacher)
    loss = jnp.mean((velocity - flow.velocity_from(latents, noise)) ** 2)
    return loss, {"loss": loss}


def causal_loss(
    params: Any,
    batch: Batch,
    key: jax.Array,
    *,
    recipe: Recipe,
    negative_prompt_embeds: Any | None = None,
    sigma: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Return the teacher-forcing loss: every block has a t of its own and attends to the clean blocks before it.

    Arguments and results are those of :func:`teacher_loss`. With probability ``train_causal.prompt_switch_prob`` a clip
    continues the clean blocks of another clip (:func:`ode_regression.splice`).
    """
    config, latents, text = recipe.train_causal, batch["latents"], batch["text"]
    size, frames = latents.shape[:2]
    blocks = recipe.causal.block_sizes(frames)
    u_key, noise_key, drop_key, splice_key = jax.random.split(key, 4)
    if sigma is None:
        sigma = flow.sigma_from_u(jax.random.uniform(u_key, (size, len(blocks))), recipe.diffusion.shift)
        sigma = flow.per_frame(sigma, blocks)
    noise = jax.random.normal(noise_key, latents.shape) if noise is None else noise
    text = drop_captions(text, drop_key, config.caption_dropout, negative_prompt_embeds)
    swapped = ode_regression.splice(splice_key, size, blocks, config.prompt_switch_prob)
    clean = jnp.where(swapped[:, :, None, None, None], jnp.roll(latents, -1, axis=0), latents)
    clean = noisy_context(clean, key, 4, recipe.causal)  # keys 0 to 3 are split off above
    x_t = flow.add_noise(latents, noise, sigma)
    network = conditioned(transformer.block_causal, pictures.picture_of(batch), recipe.teacher)
    velocity = network(
        params,
        x_t,
        flow.timestep_from_sigma(sigma),
        text,
        config=recipe.teacher,
        causal=recipe.causal,
        clean=clean,
        clean_timestep=recipe.causal.context_noise,
    )
    loss = jnp.mean((velocity - flow.velocity_from(latents, noise)) ** 2)
    return loss, {"loss": loss}


def teacher_step(recipe: Recipe, placement: Placement, negative_prompt_embeds: Any | None = None) -> NetworkStep:
    """Return the train step of the stage ``teacher``."""
    loss = functools.partial(teacher_loss, recipe=recipe, negative_prompt_embeds=negative_prompt_embeds)
    return network_step(loss, recipe.train_teacher, recipe.teacher, placement)


def negative_embeds(reader: encoder.Encoder) -> np.ndarray | None:
    """Return the embeddings ``[S, E]`` of the negative prompt; None if they are zeros."""
    embeds = encoder.negative_prompt_embeds(reader)
    return embeds if embeds.any() else None


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_shapes(recipe: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and types of the arrays of one step of the stage ``teacher``, ``[B, ...]``, by name."""
    size = recipe.train_teacher.batch_size
    text = (recipe.text.length, recipe.text.dim)
    shapes = {"latents": recipe.latent_shape, "text": text, **pictures.shapes(recipe)}
    return {name: jax.ShapeDtypeStruct((size, *shape), np.float32) for name, shape in shapes.items()}


def read_batches(run: Run, *, batch_size: int, frames: int, seed: int) -> Iterator[Batch]:
    """Read this process's examples of batches of clips of ``frames`` latent frames (0: all) with their captions.

    Raises:
        ConfigError: the latents are not prepared.
    """
    return pipeline.example_batches(
        datasets.latents(run.recipe, run.workdir),
        batch_size=batch_size,
        frames=frames,
        seed=seed,
        text_length=run.recipe.text.length,
        rows=run.placement.example_indices(batch_size),
    )


# ---- loop ------------------------------------------------------------------------------------------------------------


def train_teacher(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Train the bidirectional teacher on latents, from new weights or from ``init_from``.

    Raises:
        ConfigError: the recipe's teacher is two experts, or weights or data are missing or do not fit.
    """
    require(
        not run.recipe.experts.boundary,
        f"the stage teacher trains one network, and the recipe's teacher is two experts (experts.boundary "
        f"{run.recipe.experts.boundary:g}); use the published ones, or experts.boundary=0",
    )
    vae_params, recipe = weights.measured_vae(run.recipe, run.workdir)
    reader = weights.open_encoder(run)
    step = teacher_step(recipe, run.placement, negative_embeds(reader))
    state = weights.initial_state(run, step, recipe.teacher, init_from, fresh=True)
    train(run, recipe, step, state, reader, samples.clip_sampler(run, recipe, vae_params, reader))


CAUSAL_SAMPLE_STEPS = 16
"""Denoising steps of a causal teacher's samples, which are streams without guidance."""


def train_causal(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Train the causal teacher from the bidirectional one, or from ``init_from``.

    Raises:
        ConfigError: weights or data are missing or do not fit, or clips are longer than positions allow.
    """
    weights.check_sink_positions(run.recipe, run.name)
    vae_params, recipe = weights.measured_vae(run.recipe, run.workdir)
    reader = weights.open_encoder(run)
    loss = functools.partial(causal_loss, recipe=recipe, negative_prompt_embeds=negative_embeds(reader))
    step = network_step(loss, recipe.train_causal, recipe.teacher, run.placement)
    state = weights.initial_state(run, step, recipe.teacher, init_from)
    sampler = samples.stream_sampler(run, samples.many_steps(recipe, CAUSAL_SAMPLE_STEPS), vae_params, reader)
    train(run, recipe, step, state, reader, sampler)


def train(
    run: Run,
    recipe: Recipe,
    step: NetworkStep,
    state: Any,
    reader: encoder.Encoder,
    sample: samples.Sampler,
) -> None:
    """Run the steps of a stage on latents, then write the EMA."""
    state = run.loop(
        state,
        step.train_step,
        functools.partial(read_batches, run),
        lambda batch: run.placement.batch(weights.with_text(batch, reader, batch_shapes(recipe))),
        lambda state: sample(state.network.averaged),
    )
    weights.finish(run, state.network, recipe, recipe.teacher)
