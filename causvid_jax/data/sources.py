"""What a recipe reads: the datasets of its working directory and the prompts it knows."""

import os
import pathlib

from causvid_jax.config import DataConfig, Recipe, require
from causvid_jax.data import arrays, captions, digits, pipeline, videos

LATENTS, PROMPTS, TRAJECTORIES = "latents", "prompts", "trajectories"


def folder(workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """Where dataset ``name`` of a working directory lies; an absolute path stands for itself."""
    return pathlib.Path(workdir) / "data" / name


def latents(recipe: Recipe, workdir: str | os.PathLike) -> pipeline.Examples | pipeline.Mixture:
    """The latents that training reads: the recipe's mixture, or the dataset ``latents``.

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
    """The training prompts: those of ``data.prompt_file``, else the captions of the clips.

    Raises:
        ConfigError: a prompt file that cannot be read, or videos that are not prepared yet.
    """
    data = recipe.data
    if data.prompt_file:
        return captions.read_prompts(data.prompt_file)
    if data.name == "moving_digits":
        return digits.captions(data, "train")
    lines = [line for name, _ in _mixture(data) for line in videos.used(folder(workdir, name))]
    require(
        bool(lines),
        f"no captions of videos in {pathlib.Path(workdir) / 'data'}; prepare them with launch.prepare --stage=videos "
        "or name a list of prompts in data.prompt_file",
    )
    return list(dict.fromkeys(line["caption"] for line in lines))


def _mixture(data: DataConfig) -> tuple[tuple[str, float], ...]:
    return data.mixture or ((LATENTS, 1.0),)
