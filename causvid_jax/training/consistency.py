"""Causal consistency distillation (Causal Forcing++, rCM): the stage ``consistency``, which initializes the student.

It needs the causal teacher and real latents, and no trajectories.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import Recipe, TransformerConfig, require
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.guidance import guided_velocity, per_branch, scale_at
from causvid_jax.distill import consistency
from causvid_jax.distill.rollout import noisy_context
from causvid_jax.models import layers, transformer
from causvid_jax.text import encoder
from causvid_jax.training import flow_matching, samples, weights
from causvid_jax.training.run import Run
from causvid_jax.training.update import TrainState, network_step

Batch = dict[str, Any]


def tangent_network(config: TransformerConfig) -> TransformerConfig:
    """Return the student's configuration for ``jax.jvp``: blockwise attention without T x T arrays, and no remat."""
    return dataclasses.replace(config, attention="blockwise", remat="none")


def consistency_loss(
    params: Any, batch: Batch, key: jax.Array, *, state: TrainState, frozen: tuple[Any, jax.Array], recipe: Recipe
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss that ``train_consistency.kind`` names.

    Args:
        params: of the student.
        batch: ``latents [B, F, h, w, C]`` and ``text [B, S, E]``.
        key: draws noise levels and noise.
        state: its EMA is the discrete target, its step the progress of the continuous warm-up.
        frozen: parameters of the causal teacher, and the embeddings of the negative prompt ``[S, E]``.
        recipe: grid, networks, ``train_consistency``.

    Returns:
        The scalar loss and the metrics of :func:`causvid_jax.distill.consistency.discrete_loss` or
        :func:`~causvid_jax.distill.consistency.continuous_loss`.
    """
    config, causal, (teacher, negative_prompt_embeds) = recipe.train_consistency, recipe.causal, frozen
    latents, text = batch["latents"], batch["text"]
    blocks = causal.block_sizes(latents.shape[1])
    clean = noisy_context(latents, key, 2, causal)  # the losses split keys 0 and 1 off

    def velocity(params: Any, network: TransformerConfig, x: jax.Array, timestep: jax.Array, text: jax.Array) -> Any:
        options: dict[str, Any] = {"clean": per_branch(clean, x), "clean_timestep": causal.context_noise}
        return transformer.block_causal(params, x, timestep, text, config=network, causal=causal, **options)

    def guided(x: jax.Array, timestep: jax.Array) -> jax.Array:
        score = functools.partial(velocity, teacher, recipe.teacher)
        scale = scale_at(timestep, config.guidance_scale, interval=recipe.diffusion.guidance_interval)
        return guided_velocity(score, x, timestep, text, negative_prompt_embeds, scale, recipe.diffusion.guidance_eta)

    def student(x: jax.Array, timestep: jax.Array) -> jax.Array:
        return velocity(params, recipe.student, x, timestep, text)

    if config.kind == "discrete":
        sigmas = flow.teacher_sigmas(dataclasses.replace(recipe.diffusion, num_inference_steps=config.grid_steps))
        networks = consistency.Networks(
            student, lambda x, t: velocity(state.network.averaged, recipe.student, x, t, text), guided
        )
        return consistency.discrete_loss(networks, latents, key, sigmas=sigmas, block_sizes=blocks)

    def differentiable(x: jax.Array, timestep: jax.Array) -> jax.Array:
        constant = jax.lax.stop_gradient(params)
        with layers.differentiable_by_jvp():
            return velocity(constant, tangent_network(recipe.student), x, timestep, text)

    networks = consistency.Networks(student, differentiable, guided)
    ratio = jnp.minimum(state.step / config.tangent_warmup, 1.0)
    options: dict[str, Any] = {"shift": recipe.diffusion.shift, "block_sizes": blocks, "ratio": ratio}
    return consistency.continuous_loss(networks, latents, key, scale=config.loss_scale, **options)


def train_consistency(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Train the student from ``init_from``, else from the causal teacher if that has its size, else from new weights.

    Raises:
        ConfigError: a network has an image branch, or weights, data or the length of clips do not fit.
    """
    require(
        not run.recipe.reads_picture,
        "the stage consistency does not train networks with an image branch; use the stage init",
    )
    weights.check_sink_positions(run.recipe, run.name)
    vae_params, recipe = weights.measured_vae(run.recipe, run.workdir)
    reader, loss = weights.open_encoder(run), functools.partial(consistency_loss, recipe=recipe)
    step = network_step(loss, recipe.train_consistency, recipe.student, run.placement)
    negative_prompt_embeds = jnp.asarray(encoder.negative_prompt_embeds(reader))
    teacher = weights.load_network(run, "causal", recipe.teacher)
    fresh = dataclasses.replace(recipe.student, lora=recipe.teacher.lora) != recipe.teacher
    state = weights.initial_state(run, step, recipe.student, init_from, stage="causal", fresh=fresh)
    sample = samples.stream_sampler(run, recipe, vae_params, reader)
    state = run.loop(
        state,
        lambda state, batch: step.train_step(state, batch, teacher, negative_prompt_embeds),
        functools.partial(flow_matching.read_batches, run),
        lambda batch: run.placement.batch(weights.with_text(batch, reader, ("latents", "text"))),
        lambda state: sample(state.network.averaged),
    )
    weights.finish(run, state.network, recipe, recipe.student)
