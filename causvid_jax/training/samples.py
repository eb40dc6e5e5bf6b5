"""What a stage shows as it goes, in its first process: sample videos, a picture of them, the judge's reading."""

import pathlib
from collections.abc import Sequence

import numpy as np
from einops import rearrange

from causvid_jax.config import ConfigError, Recipe
from causvid_jax.data import sources as recipe_data
from causvid_jax.distributed import collectives
from causvid_jax.evaluation import classifier, metrics
from causvid_jax.media import write_video


def prompts(recipe: Recipe, workdir: pathlib.Path, count: int) -> list[str]:
    """``count`` training captions, the same ones at every step of a run."""
    captions = recipe_data.prompts(recipe, workdir)
    order = np.random.default_rng(0).permutation(len(captions))
    return [captions[order[i % len(captions)]] for i in range(count)]


def show(video: np.ndarray, folder: pathlib.Path, step: int, recipe: Recipe, columns: int = 4) -> None:
    """Write the first clips side by side as ``folder/STEP.mp4``; video uint8 ``[B, T, H, W, 3]``."""
    if not collectives.first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    columns = min(columns, len(video))
    rows = min(2, len(video) // columns)
    grid = rearrange(video[: rows * columns], "(r c) t h w k -> t (r h) (c w) k", r=rows)
    write_video(folder / f"{step:06d}.mp4", grid, recipe.video.fps, upscale=max(1, 128 // recipe.video.height))


def scores(video: np.ndarray, captions: Sequence[str], recipe: Recipe) -> dict[str, float]:
    """The judge's agreement with ``captions``; empty where the recipe has no judge (other data)."""
    if recipe.data.name != "moving_digits" or not collectives.first():
        return {}
    try:
        reader = classifier.load(recipe.data)
    except ConfigError:
        return {}
    with collectives.alone():
        reading = classifier.read(reader, video, data=recipe.data)
    return metrics.accuracies(reading.triples, [classifier.wanted(caption) for caption in captions])
