"""Datasets and prompts of a recipe in its working directory."""

import os
import pathlib
from typing import Any

from causvid_jax.config import DataConfig, Recipe, require
from causvid_jax.data import arrays, captions, digits, moving_digits, pipeline, videos

LATENTS, PROMPTS, TRAJECTORIES, CLIPS = "latents", "prompts", "trajectories", "clips"


def folder(workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """Return the folder of dataset ``name`` in a working directory; an absolute path is returned as it is."""
    return pathlib.Path(workdir) / "data" / name


def clips(recipe: Recipe, workdir: str | os.PathLike, split: str) -> Any:
    """Return the pixel clips of a split, ``"train"`` or ``"test"``: moving digits, or those of own videos.

    Raises:
        ConfigError: they are not written yet, or have another size than the recipe's clips.
    """
    if recipe.data.name == "moving_digits":
        return moving_digits.source(pathlib.Path(workdir) / "data", recipe.data, recipe.video, split)
    path = folder(workdir, clips_name(split))
    require(
        arrays.is_complete(path),
        f"no clips at {path}; write them with prepare --stage=data --videos=DIR --captions=FILE",
    )
    source = arrays.source(path)
    shape, video = source[0]["video"].shape, recipe.video
    require(
        shape == (video.frames, video.height, video.width, 3),
        f"the clips at {path} have {shape[0]} frames of {shape[1]} x {shape[2]} pixels; the recipe's video has "
        f"{video.frames} of {video.height} x {video.width}",
    )
    return source


def clips_name(split: str) -> str:
    """Return the dataset of a split's own clips."""
    return CLIPS if split == "train" else f"{CLIPS}_{split}"


def latents(recipe: Recipe, workdir: str | os.PathLike) -> pipeline.Examples | pipeline.Mixture:
    """Return the latents that training reads: the recipe's mixture, or the dataset ``latents``.

    Raises:
        ConfigError: one that is not finished, or one of another size than the first.
    """
    chosen = _mixture(recipe.data)
    sources = [arrays.source(folder(workdir, name)) for name, _ in chosen]
    if len(sources) == 1:
        return sources[0]
    shapes = [source[0]["latents"].shape for source in sources]
    for (name, _), shape in zip(chosen, shapes, strict=True):
        require(
            shape == shapes[0],
            f"data.mixture: the latents of {name} are {list(shape)}, those of {chosen[0][0]} are {list(shapes[0])}; "
            "they must be the same",
        )
    return pipeline.Mixture(sources, [weight for _, weight in chosen])


def prompts(recipe: Recipe, workdir: str | os.PathLike) -> list[str]:
    """Return the training prompts: those of ``data.prompt_file``, else the captions of the clips.

    Raises:
        ConfigError: a prompt file that cannot be read, or videos that are not prepared yet.
    """
    data = recipe.data
    if data.prompt_file:
        return captions.read_prompts(data.prompt_file)
    if data.name == "moving_digits":
        return digits.captions(data, "train")
    names = [name for name, _ in _mixture(data)]
    lines = [line for name in names for line in videos.used(folder(workdir, name))]
    lines = lines or (videos.used(folder(workdir, CLIPS)) if LATENTS in names else [])
    require(
        bool(lines),
        f"no captions of videos in {pathlib.Path(workdir) / 'data'}; prepare them with prepare --stage=data or "
        "--stage=videos, or name a list of prompts in data.prompt_file",
    )
    return list(dict.fromkeys(line["caption"] for line in lines))


def _mixture(data: DataConfig) -> tuple[tuple[str, float], ...]:
    return data.mixture or ((LATENTS, 1.0),)
