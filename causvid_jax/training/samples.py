"""Samples of a stage in training: videos, and the classifier's scores for them."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from causvid_jax.config import ConfigError, Recipe
from causvid_jax.data import pictures, pipeline
from causvid_jax.data import sources as datasets
from causvid_jax.distributed import collectives
from causvid_jax.evaluation import classifier, metrics
from causvid_jax.media import to_uint8, write_video
from causvid_jax.models import vae
from causvid_jax.models.image_branch import Picture, has_branch
from causvid_jax.sampling import stream
from causvid_jax.sampling import teacher as teacher_sampler
from causvid_jax.text import encoder
from causvid_jax.training.run import Run
from causvid_jax.training.weights import replicated

CLASSIFIER = "classifier.safetensors"
"""The classifier of a working directory."""


Sampler = Callable[[Any], dict[str, float]]
"""Writes a video of samples of a network's parameters and returns their scores."""


def stream_sampler(run: Run, recipe: Recipe, vae_params: Any, reader: encoder.Encoder) -> Sampler:
    """Return the sampler of a few training captions as streams of one clip's length."""
    captions, picture = examples(recipe, run.workdir, run.config.samples)
    embeds: Any = (
        jnp.asarray(encoder.encode(reader, captions)) if captions else None
    )  # without samples it is not called
    options: dict[str, Any] = {"picture": picture} if has_branch(recipe.student) else {}
    generate = run.placement.jit_replicated(lambda params: stream.generate(params, embeds, config=recipe, **options)[1])

    def sample(student: Any) -> dict[str, float]:
        params = {"student": student, "vae": replicated(vae_params, run.placement)}
        return write(run, to_uint8(generate(params)), captions, recipe)

    return sample


def clip_sampler(run: Run, recipe: Recipe, vae_params: Any, reader: encoder.Encoder) -> Sampler:
    """Return the sampler of a few training captions as whole clips of the many-step teacher."""
    captions, picture = examples(recipe, run.workdir, run.config.samples)
    embeds = encoder.encode(reader, captions) if captions else np.zeros(0)
    pictures_of = () if picture is None or not has_branch(recipe.teacher) else (picture.embeds, picture.latents)
    negative_embeds, seeds = encoder.negative_prompt_embeds(reader), np.arange(len(captions), dtype=np.uint32)

    @run.placement.jit_replicated
    def generate(teacher: Any, vae_params: Any) -> jax.Array:
        options: dict[str, Any] = {"seeds": seeds, "config": recipe}
        latents = teacher_sampler.sample_clip(teacher, embeds, negative_embeds, *pictures_of, **options)
        return vae.decode(vae_params, latents, config=recipe.vae)

    def sample(teacher: Any) -> dict[str, float]:
        return write(run, to_uint8(generate(teacher, replicated(vae_params, run.placement))), captions, recipe)

    return sample


def many_steps(recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe that streams the causal teacher: its student is the teacher, with ``steps`` denoising steps.

    Their nominal timesteps are ``1000 (1 - i / steps)``.
    """
    timesteps = tuple(1000.0 * (1 - i / steps) for i in range(steps))
    diffusion = dataclasses.replace(
        recipe.diffusion, denoising_timesteps=timesteps, first_block_timesteps=(), student_shift=0.0
    )
    return dataclasses.replace(recipe, student=recipe.teacher, diffusion=diffusion)


def examples(recipe: Recipe, workdir: pathlib.Path, count: int) -> tuple[list[str], Picture | None]:
    """Return ``count`` training captions and, for networks with an image branch, the pictures of their clips."""
    if not (recipe.reads_picture and count):
        return prompts(recipe, workdir, count), None
    source = datasets.with_pictures(recipe, workdir)
    clips = [source[i % len(source)] for i in range(count)]
    rows = [pictures.of_example(clip) for clip in clips]
    picture = pictures.picture_of({name: np.stack([row[name] for row in rows]) for name in pictures.shapes(recipe)})
    return [pipeline.as_text(clip["caption"]) for clip in clips], picture


def prompts(recipe: Recipe, workdir: pathlib.Path, count: int) -> list[str]:
    """Return ``count`` training captions, the same ones at every step of a run."""
    captions = datasets.prompts(recipe, workdir) if count else []
    order = np.random.default_rng(0).permutation(len(captions))
    return [captions[order[i % len(captions)]] for i in range(count)]


def write(run: Run, video: np.ndarray, captions: Sequence[str], recipe: Recipe) -> dict[str, float]:
    """Write the first clips of ``video`` (uint8 ``[B, T, H, W, 3]``) side by side and return the scores of all."""
    show(video, run.folder / "samples" / f"{run.step:06d}.mp4", recipe)
    return scores(run, video, captions, recipe)


def show(video: np.ndarray, path: pathlib.Path, recipe: Recipe) -> None:
    """Write up to two rows of four clips, uint8 ``[B, T, H, W, 3]``, side by side into one video."""
    if not collectives.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(4, len(video))
    rows = min(2, len(video) // columns)
    grid = rearrange(video[: rows * columns], "(r c) t h w k -> t (r h) (c w) k", r=rows)
    write_video(path, grid, recipe.video.fps, upscale=max(1, 128 // recipe.video.height))


def scores(run: Run, video: np.ndarray, captions: Sequence[str], recipe: Recipe) -> dict[str, float]:
    """Return the classifier's accuracies, 0 to 1, for clips uint8 ``[B, T, H, W, 3]`` of ``captions``.

    The classifier is that of the working directory, else that of the package. The result is empty if there is none for
    these data, and in all but process 0.
    """
    if recipe.data.name != "moving_digits" or not collectives.is_first():
        return {}
    try:
        own = run.workdir / CLASSIFIER
        reader = classifier.load(recipe.data, own if own.is_file() else classifier.DEFAULT_PATH)
    except ConfigError:
        return {}
    with collectives.single_process():
        reading = classifier.read(reader, video, data=recipe.data)
    return metrics.accuracies(reading.triples, [classifier.target_triples(caption) for caption in captions])
