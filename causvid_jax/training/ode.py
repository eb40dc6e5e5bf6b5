"""ODE regression (CausVid, section 4.3, equation 6): the stage ``init`` trains the student on ODE trajectories."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import Recipe
from causvid_jax.data import pictures, pipeline
from causvid_jax.data import sources as datasets
from causvid_jax.diffusion import flow
from causvid_jax.distill.ode_regression import ode_regression_loss
from causvid_jax.models import transformer
from causvid_jax.models.image_branch import conditioned
from causvid_jax.sharding.placement import Placement
from causvid_jax.training import samples, weights
from causvid_jax.training.run import Run
from causvid_jax.training.update import NetworkStep, network_step

Batch = dict[str, Any]
STAGE_OF = {"bidirectional": "teacher", "causal": "causal"}
"""Teacher of the trajectories (``train_init.teacher``) to its stage, from whose weights the student starts."""

# ---- update ----------------------------------------------------------------------------------------------------------


def init_loss(params: Any, batch: Batch, key: jax.Array, *, recipe: Recipe) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss and metrics of :func:`~causvid_jax.distill.ode_regression.ode_regression_loss`.

    ``batch`` has ``trajectory [B, Q + 1, F, h, w, C]``, ``text [B, S, E]`` and, from a causal teacher, the past that
    each block read, as ``context [B, F, h, w, C]``.
    """
    config, causal = recipe.train_init, recipe.causal
    network = conditioned(transformer.block_causal, pictures.picture_of(batch), recipe.student)
    velocity = functools.partial(network, config=recipe.student, causal=causal, clean_timestep=causal.context_noise)
    return ode_regression_loss(
        velocity,
        params,
        jnp.moveaxis(batch["trajectory"], 1, 0),
        batch["text"],
        key,
        timesteps=flow.student_timesteps(recipe.diffusion),
        block_sizes=causal.block_sizes(batch["trajectory"].shape[2]),
        include_clean=config.include_clean,
        prompt_switch_prob=config.prompt_switch_prob,
        context=batch.get("context"),
    )


def init_step(recipe: Recipe, placement: Placement) -> NetworkStep:
    """Return the train step of the stage ``init``."""
    return network_step(functools.partial(init_loss, recipe=recipe), recipe.train_init, recipe.student, placement)


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_shapes(recipe: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and types of the arrays of one step, ``[B, ...]``, by name."""
    states = len(flow.student_timesteps(recipe.diffusion)) + 1
    shapes = {"trajectory": (states, *recipe.latent_shape), **pictures.shapes(recipe)}
    if recipe.train_init.teacher == "causal":
        shapes["context"] = recipe.latent_shape
    shapes["text"] = (recipe.text.length, recipe.text.dim)
    size = recipe.train_init.batch_size
    return {name: jax.ShapeDtypeStruct((size, *shape), np.float32) for name, shape in shapes.items()}


def open_trajectories(recipe: Recipe, workdir: pathlib.Path) -> dict[int, Any]:
    """Open the trajectories by their length in latent frames, 0 for whole clips.

    Raises:
        ConfigError: the trajectories are missing or not finished.
    """
    if recipe.train_init.teacher == "bidirectional":
        return {0: datasets.trajectories(recipe, workdir)}
    stretches = recipe.train_init.stretches
    return {frames: datasets.trajectories(recipe, workdir, frames) for _, frames, _ in stretches}


def read_batches(
    run: Run, trajectories: Mapping[int, Any], *, batch_size: int, frames: int, seed: int
) -> Iterator[Batch]:
    """Read this process's examples of batches of trajectories of ``frames`` latent frames (0: whole clips)."""
    return pipeline.example_batches(
        trajectories[frames],
        batch_size=batch_size,
        seed=seed,
        text_length=run.recipe.text.length,
        rows=run.placement.example_indices(batch_size),
    )


# ---- loop ------------------------------------------------------------------------------------------------------------


def train_init(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Train the student from ``init_from``, else from the teacher if that has its size, else from new weights.

    Raises:
        ConfigError: weights or data are missing or do not fit, or clips are longer than positions allow.
    """
    weights.check_sink_positions(run.recipe, run.name)
    vae_params, recipe = weights.measured_vae(run.recipe, run.workdir)
    trajectories = open_trajectories(recipe, run.workdir)
    reader, step, names = weights.open_encoder(run), init_step(recipe, run.placement), batch_shapes(recipe)
    fresh = dataclasses.replace(recipe.student, lora=recipe.teacher.lora) != recipe.teacher
    state = weights.initial_state(
        run, step, recipe.student, init_from, stage=STAGE_OF[recipe.train_init.teacher], fresh=fresh
    )
    sample = samples.stream_sampler(run, recipe, vae_params, reader)
    state = run.loop(
        state,
        step.train_step,
        functools.partial(read_batches, run, trajectories),
        lambda batch: run.placement.batch(weights.with_text(batch, reader, names)),
        lambda state: sample(state.network.averaged),
    )
    weights.finish(run, state.network, recipe, recipe.student)
