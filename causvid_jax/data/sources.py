"""Find and open the datasets and prompts of a recipe in its working directory."""

import itertools
import json
import os
import pathlib
from typing import Any

from causvid_jax.checkpoints import lineage
from causvid_jax.checkpoints import workdir as weights
from causvid_jax.config import ConfigError, DataConfig, Recipe, require
from causvid_jax.data import arrays, captions, digits, moving_digits, pictures, pipeline, videos
from causvid_jax.distributed import collectives
from causvid_jax.models import experts

LATENTS, PROMPTS, TRAJECTORIES, CLIPS = "latents", "prompts", "trajectories", "clips"


def folder(workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """Return the folder of the dataset ``name``: ``WORKDIR/data/NAME``, or ``name`` itself if it is absolute."""
    return pathlib.Path(workdir) / "data" / name


def clips(recipe: Recipe, workdir: str | os.PathLike, split: str) -> Any:
    """Return the pixel clips of a split, ``"train"`` or ``"test"``: moving digits, or clips of own videos.

    Raises:
        ConfigError: they are not written yet, or have another size than the recipe's clips.
    """
    if recipe.data.name == "moving_digits":
        return moving_digits.source(pathlib.Path(workdir) / "data", recipe.data, recipe.video, split)
    path = folder(workdir, CLIPS)
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
    ends = list(itertools.accumulate((line["clips"] for line in videos.used(path)), initial=0))
    require(
        ends[-1] == len(source), f"{path / videos.USED} lists {ends[-1]} clips of {len(source)}; prepare them again"
    )
    numbers = videos.part_of([range(*pair) for pair in itertools.pairwise(ends)], split)
    return pipeline.Part(source, list(itertools.chain.from_iterable(numbers)))


def latents(recipe: Recipe, workdir: str | os.PathLike) -> pipeline.Examples | pipeline.Mixture:
    """Return the latents that training reads: the recipe's mixture, or the dataset ``latents``.

    Raises:
        ConfigError: a dataset is not finished, was made with another VAE, lacks the pictures that the recipe's networks
            read, or has another shape than the first.
    """
    datasets = _mixture(recipe.data)
    sources = [checked_source(folder(workdir, name), recipe, workdir, vae="vae") for name, _ in datasets]
    for (name, _), source in zip(datasets, sources, strict=True):
        _check_pictures(source, name, recipe, workdir)
    if len(sources) == 1:
        return sources[0]
    shapes = [source[0]["latents"].shape for source in sources]
    for (name, _), shape in zip(datasets, shapes, strict=True):
        require(
            shape == shapes[0],
            f"data.mixture: the latents of {name} are {list(shape)}, those of {datasets[0][0]} are {list(shapes[0])}; "
            "they must be the same",
        )
    return pipeline.Mixture(sources, [weight for _, weight in datasets])


def with_pictures(recipe: Recipe, workdir: str | os.PathLike) -> pipeline.Source:
    """Return the dataset ``latents`` with its pictures, from which trajectories and samples start.

    Raises:
        ConfigError: as :func:`latents`.
    """
    source: pipeline.Source = checked_source(folder(workdir, LATENTS), recipe, workdir, vae="vae")
    _check_pictures(source, LATENTS, recipe, workdir)
    return source


def _check_pictures(source: Any, name: str, recipe: Recipe, workdir: str | os.PathLike) -> None:
    """Refuse latents without the encoded first frames that the recipe's networks read."""
    absent = [key for key in pictures.shapes(recipe) if key not in source[0]]
    require(
        not absent,
        f"the latents of {name} have no {' and no '.join(absent)}, which a network with an image branch reads; remove "
        f"{folder(workdir, name)} and prepare it again with this recipe",
    )


def checked_source(path: pathlib.Path, recipe: Recipe, workdir: str | os.PathLike, **stages: str) -> Any:
    """Return the examples of a dataset after checking that it was made with the weights of ``workdir``.

    Args:
        path: folder of the dataset.
        recipe: recipe of the networks.
        workdir: working directory with their weights. Weights that are not there are not checked.
        stages: key of the dataset's identity to the stage whose digest it has.

    Raises:
        ConfigError: the dataset is not finished, or was made with other weights than those of ``workdir``.
    """
    source = arrays.source(path)
    identity = arrays.read_identity(path)

    def has(stage: str) -> bool:
        try:
            return weights.find(recipe.name, stage, workdir).exists()
        except ConfigError:
            return False  # a dataset may be used without the weights that made it

    def check() -> None:
        made_by = {key: stage for key, stage in stages.items() if key in identity and has(stage)}
        opened = {key: weights.open_stage(recipe, stage, workdir) for key, stage in made_by.items()}
        lineage.check_dataset(path, identity, opened, f"causvid prepare --stage={_stage_of(identity)}")

    collectives.check_on_first(check)
    return source


def trajectories(recipe: Recipe, workdir: str | os.PathLike, frames: int = 0) -> Any:
    """Return the ODE trajectories of the recipe's teacher, of ``frames`` latent frames (0: whole clips).

    Raises:
        ConfigError: they are not finished, or were made with another teacher or other timesteps.
    """
    causal = recipe.train_init.teacher == "causal"
    path = causal_folder(workdir, frames) if causal else folder(workdir, TRAJECTORIES)
    made_by = {name: name for name in experts.NAMES} | {"teacher": "causal" if causal else "teacher"}
    source = checked_source(path, recipe, workdir, **made_by)
    stored = json.loads(arrays.read_identity(path).get("diffusion", "{}"))
    for name in ("denoising_timesteps", "warp", "shift", "student_shift"):
        present = json.loads(json.dumps(getattr(recipe.diffusion, name)))
        require(
            stored.get(name, 0.0 if name == "student_shift" else present) == present,
            f"{path} was made with diffusion.{name} {stored.get(name)}, and the recipe has {present}; remove {path} "
            "and run causvid prepare --stage=trajectories",
        )
    return source


def _stage_of(identity: dict[str, Any]) -> str:
    """Return the stage of ``causvid prepare`` that makes a dataset of this identity."""
    if "videos" in identity:
        return "videos"
    return {"trajectories": "trajectories", "causal_trajectories": "trajectories", "streams": "streams"}.get(
        str(identity.get("name")), "latents"
    )


def causal_folder(workdir: str | os.PathLike, frames: int = 0) -> pathlib.Path:
    """Return the folder of the causal teacher's trajectories of ``frames`` latent frames (0: whole clips)."""
    return folder(workdir, "causal_trajectories" + (f"_{frames}" if frames else ""))


def streams(recipe: Recipe, workdir: str | os.PathLike, clips: int) -> Any:
    """Return the student's streams of ``clips`` clips.

    Raises:
        ConfigError: they are not finished, or were made with another student or VAE.
    """
    return checked_source(streams_folder(workdir, clips), recipe, workdir, student="distill", vae="vae")


def streams_folder(workdir: str | os.PathLike, clips: int) -> pathlib.Path:
    """Return the folder of the student's streams of ``clips`` clips."""
    return folder(workdir, f"streams_{clips}")


def prompts(recipe: Recipe, workdir: str | os.PathLike) -> list[str]:
    """Return the training prompts: those of ``data.prompt_file``, else the distinct captions of the clips.

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
    clips = videos.used(folder(workdir, CLIPS)) if LATENTS in names else []
    lines = lines or videos.part_of(clips, "train")
    require(
        bool(lines),
        f"no captions of videos in {pathlib.Path(workdir) / 'data'}; prepare them with prepare --stage=data or "
        "--stage=videos, or name a list of prompts in data.prompt_file",
    )
    return list(dict.fromkeys(line["caption"] for line in lines))


def _mixture(data: DataConfig) -> tuple[tuple[str, float], ...]:
    return data.mixture or ((LATENTS, 1.0),)
