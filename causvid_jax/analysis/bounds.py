"""Refuse numbers that are too large together, although each is within its bounds, before memory is allocated.

Memory is computed from shapes (:mod:`causvid_jax.analysis.memory`). ``causvid sample`` and ``causvid bench`` compare
their own plans.
"""

import dataclasses
import math
from typing import Any

import jax

from causvid_jax.analysis import memory
from causvid_jax.analysis.memory import Phase
from causvid_jax.config import Recipe
from causvid_jax.data import generate, prepare
from causvid_jax.evaluation.plan import Plan
from causvid_jax.models import vae
from causvid_jax.models.decoder import vae_shapes
from causvid_jax.sampling import blocks

LARGEST_DEVICE = 2**40
"""More bytes than any single device has."""
_OF_A_STREAM = ("keys and values", "prompt's keys and values", "decoder's past")


def check_server(recipe: Recipe, sessions: int) -> None:
    """Refuse more sessions of a recipe than the memory of one device, or of all devices of a mesh, holds.

    Raises:
        ConfigError: the weights and the states of all sessions exceed the memory.
    """
    mesh = recipe.parallel
    devices = jax.device_count() if mesh.fsdp * mesh.context * mesh.tensor > 1 else 1
    phases = memory.sampling_phases(recipe, "student", batch=1, latents=recipe.video.latent_frames)
    items = dict(phases[-1].items)
    for name in _OF_A_STREAM:
        items[name] = {kind: count * sessions for kind, count in items[name].items()}
    limit = memory.memory_limit()
    memory.check_fits(
        [*phases[:-1], Phase(f"serve {sessions} sessions", items)],
        limit and limit * devices,
        "fewer --sessions, a smaller causal.window, video.height and video.width",
    )


def check_program(recipe: Recipe, batch: int, here: bool) -> None:
    """Refuse a program of ``batch`` streams that exceeds the memory of this machine (``here``), or of any device.

    Raises:
        ConfigError: its arrays exceed the memory.
    """
    phases = memory.sampling_phases(recipe, "student", batch=batch, latents=recipe.video.latent_frames, prompts=0)
    less = "a smaller --batch, a causal.window, a smaller video.height and video.width"
    memory.check_fits(phases, memory.memory_limit() if here else None, less)
    memory.check_fits(phases, LARGEST_DEVICE, less, "any device has less than")


def check_evaluation(recipe: Recipe, plan: Plan, teacher: bool = True) -> None:
    """Refuse an evaluation whose batches or clips exceed the memory.

    Raises:
        ConfigError: a batch of the longest streams does not fit the device, or all clips do not fit the host.
    """
    frames, longest = recipe.video.frames, max(2, plan.long_factor, plan.longest_factor) * recipe.video.frames
    latents = blocks.covering_latents(longest, recipe)
    phases = [*memory.sampling_phases(recipe, "student", batch=plan.batch, latents=latents, prompts=0)]
    if teacher:
        size: dict[str, Any] = {"batch": plan.batch, "latents": recipe.video.latent_frames, "prompts": 0}
        phases += memory.sampling_phases(recipe, "teacher", **size)
    pixels = _pixels(recipe)
    clips = 5 * plan.samples + plan.reference + (plan.long_samples or plan.samples)
    clips += 2 * (plan.switch_samples or plan.samples) + (plan.longest_samples if plan.longest_factor else 0)
    held = Phase(
        "evaluate",
        {
            "clips of all rows": {"uint8": clips * frames * pixels},
            "a batch of the longest streams": {"float32": 4 * plan.batch * longest * pixels},
        },
    )
    less = "fewer --samples, a smaller --batch, --long_factor or --longest_factor, shorter or smaller videos"
    memory.check_fits(phases, memory.memory_limit(), less)
    memory.check_fits([held], memory.host_memory(), less, "this machine has")


def check_stage(stage: str, recipe: Recipe, options: prepare.Options) -> None:
    """Refuse a stage of ``causvid prepare`` if a batch exceeds the memory.

    Raises:
        ConfigError: the batch does not fit the device, or its frames do not fit the host.
    """
    frames, pixels = recipe.video.frames, _pixels(recipe)
    size: dict[str, Any]
    less = "shorter or smaller videos (video.frames, video.height, video.width)"
    limit = None if stage == "data" else memory.memory_limit()  # digits are drawn without a device
    held = frames * pixels * (options.workers if recipe.data.name == "videos" else 1)
    if stage in ("latents", "videos"):
        batch = generate.CLIPS_AT_ONCE if stage == "latents" else options.batch
        less += ", a smaller --batch" if stage == "videos" else ""
        held += 4 * batch * jax.local_device_count() * frames * pixels
        memory.check_fits([_encode(recipe, batch)], limit, less)
    elif stage == "trajectories":
        size = {"batch": generate.STREAMS_AT_ONCE, "latents": recipe.video.latent_frames, "prompts": 0}
        memory.check_fits(memory.sampling_phases(recipe, "teacher", **size)[:-1], limit, less)  # nothing is decoded
    elif stage == "streams":
        clips = max((clips for clips, _ in recipe.train_taehv.rollouts), default=1)
        size = {"batch": generate.STREAMS_AT_ONCE, "latents": clips * recipe.video.latent_frames, "prompts": 0}
        less += ", fewer clips in train_taehv.rollouts"
        memory.check_fits(
            memory.sampling_phases(dataclasses.replace(recipe, decoder="vae"), "student", **size), limit, less
        )
        held += 2 * generate.STREAMS_AT_ONCE * clips * frames * pixels
    work = Phase(f"make the stage {stage!r}", {"frames": {"uint8": held}})
    memory.check_fits([work], memory.host_memory(), less, "this machine has")


def _encode(recipe: Recipe, batch: int) -> Phase:
    """Return the phase of a batch of clips that the VAE encodes."""
    shape = (batch, recipe.video.frames, recipe.video.height, recipe.video.width, 3)
    group = batch * vae.time_factor(recipe.vae) * recipe.video.height * recipe.video.width
    return Phase(
        "encode a batch of clips",
        {
            "VAE": memory.sizes(vae_shapes(recipe)),
            "clips": {"float32": 4 * math.prod(shape)},
            "work, about": {"float32": group * (5 * recipe.vae.base_dim + 3) * 4},
        },
    )


def _pixels(recipe: Recipe) -> int:
    return recipe.video.height * recipe.video.width * 3
