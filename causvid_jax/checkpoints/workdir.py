"""Find and load the weights of each stage.

A stage writes ``WORKDIR/<stage>/weights.safetensors``. Networks that are not trained (``text_encoder``,
``image_encoder``, ``taehv``) may be there under their own names. A published folder is read unchanged: original Wan2.1,
diffusers, or ComfyUI's split files. Weights that come with the package are in
``causvid_jax/assets/<recipe>/<stage>.safetensors``.
"""

import dataclasses
import functools
import logging
import os
import pathlib
import shutil
from typing import Any

from causvid_jax.checkpoints import checkpoint, lineage, source, store
from causvid_jax.checkpoints.checkpoint import NAMED_FILES, Checkpoint
from causvid_jax.checkpoints.table import OURS, Config
from causvid_jax.config import STAGES, CLIPConfig, ConfigError, Recipe, TransformerConfig, VAEConfig, require
from causvid_jax.models.experts import NAMES

_LOG = logging.getLogger(__name__)
ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
ROAD_RECORD = "road.json"
"""Record of ``causvid road``, in its ``--workdir`` and beside the weights of the package."""
TOKENIZER = "text_encoder/tokenizer.json"
"""The text encoder's tokenizer in a working directory."""
TOKENIZERS = ("text_encoder", "tokenizer", "google/umt5-xxl", ".")
"""Folders that may hold the text encoder's tokenizer, ours first."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")

# By component: folders that may hold it; of our working directories the last stage first.
_FOLDERS = {
    "transformer": ("transformer", "distill", "consistency", "init", "teacher", "diffusion_models"),
    "vae": ("vae",),
    "text_encoder": ("text_encoder", "text_encoders"),
    "image_encoder": ("image_encoder", "clip_vision"),
    "taehv": ("taehv",),
}
# Folders of the two experts of Wan2.2-A14B, (high noise, low noise): original, diffusers, ours.
_EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"), NAMES)
_COMPONENTS = {"teacher": "transformer", "causal": "transformer"} | {
    name: name for name in ("vae", "taehv", "text_encoder", "image_encoder")
}


def place(name: str) -> str:
    """Return the path in a working directory of the weights of a stage, or of a network that is not trained."""
    return f"{name}/weights.safetensors"


def stage_path(workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """Return the path :func:`place` under ``workdir``."""
    return pathlib.Path(workdir) / place(name)


def components(path: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Return the networks of a folder of several by component: transformer, vae, text_encoder, image_encoder, taehv.

    Such a folder is an original Wan folder, a diffusers pipeline, ComfyUI's ``split_files``, or our working directory.
    The result is empty for a file or the folder of one network.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return {}
    folder = folder / "split_files" if (folder / "split_files").is_dir() else folder
    inside = {}
    for name, candidates in _FOLDERS.items():
        candidate = next((folder / inner for inner in candidates if source.weights_files(folder / inner)), None)
        if candidate is not None:
            inside[name] = candidate
    result = {}
    for name, patterns in NAMED_FILES.items():
        files = sorted(f for pattern in patterns for f in folder.glob(pattern) if f.suffix in source.SUFFIXES)
        if files:
            # If a folder has both kinds, they are the same weights; safetensors need no PyTorch.
            result[name] = min(files, key=lambda file: source.SUFFIXES.index(file.suffix))
    rest = [file for file in source.weights_files(folder) if not checkpoint.is_named_file(file)]
    if result and "transformer" not in inside and rest:
        inside["transformer"] = folder if len(rest) > 1 else rest[0]
    inside = {**result, **inside}
    return {name: inside[name] for name in _FOLDERS if name in inside}


def left_out(path: str | os.PathLike) -> list[str]:
    """Return a sentence for each part of a published folder that this version does not use."""
    folder = pathlib.Path(path)
    one, other = _EXPERTS[0], (_EXPERTS[1][1],)
    experts = [name for name in (*one, *other) if source.weights_files(folder / name)]
    unread = _unread(folder)
    sentences = [unread] if unread else []
    if experts:
        sentences.append(
            f"{' and '.join(experts)}: {folder} is Wan2.2 with two experts, which are converted one at a time "
            f"(--input={folder / experts[0]}); a teacher is sampled from the folder as it is"
        )
    return sentences


def _unread(folder: pathlib.Path) -> str:
    """Return a sentence about the folders of weights that no network of this version reads, "" without any."""
    folder = folder / "split_files" if (folder / "split_files").is_dir() else folder
    if not folder.is_dir():
        return ""
    known = {*STAGES, *(inner for pair in _EXPERTS for inner in pair)}
    known |= {inner for candidates in _FOLDERS.values() for inner in candidates}
    others = [path.name for path in sorted(folder.iterdir()) if path.name not in known and source.weights_files(path)]
    if not others or not components(folder):
        return ""
    return f"{folder} also holds weights in {', '.join(others)}, which no network of this version reads"


def find_experts(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Return the weights of both experts in a folder, ``{"high_noise": ..., "low_noise": ...}``.

    Raises:
        ConfigError: there are none, or one of them is missing.
    """
    root = pathlib.Path(folder)
    for pair in _EXPERTS:
        inside = [place(inner) if pair == NAMES else inner for inner in pair]
        have = [inner for inner in inside if (root / inner).exists()]
        require(
            len(have) != 1,
            f"{root} holds {' '.join(have)} but no {' '.join(inner for inner in inside if inner not in have)}; a "
            "teacher of two experts needs both",
        )
        if have:
            return {name: root / inner for name, inner in zip(NAMES, inside, strict=True)}
    accepted = "; ".join(" and ".join(pair) for pair in _EXPERTS)
    raise ConfigError(f"{root} holds no teacher of two experts; accepted: {accepted}")


def check_boundary(recipe: Recipe, expert: pathlib.Path) -> None:
    """Compare ``experts.boundary`` with ``1000 boundary_ratio`` of the ``model_index.json`` of a diffusers folder.

    ``expert`` is the path of one expert in this folder.

    Raises:
        ConfigError: they differ.
    """
    ratio = source.read_json(expert.parent / "model_index.json", default={}).get("boundary_ratio")
    published = 1000 * ratio if isinstance(ratio, (int, float)) else recipe.experts.boundary
    require(
        abs(published - recipe.experts.boundary) < 1e-3,
        f"{expert.parent} was published with boundary_ratio {ratio}, which is experts.boundary {published:g}; the "
        f"recipe has {recipe.experts.boundary:g}",
    )


def tokenizer_files(path: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Return the files of the text encoder's tokenizer in a folder, published or ours, by name; empty for none.

    ``tokenizer.json`` is always among them; the others are optional.
    """
    for inner in TOKENIZERS:
        files = {name: pathlib.Path(path) / inner / name for name in _TOKENIZER_FILES}
        files = {name: file for name, file in files.items() if file.is_file()}
        if "tokenizer.json" in files:
            return files
    return {}


def resolve(path: str | os.PathLike, stage: str) -> pathlib.Path:
    """Return the weights of ``stage`` at a path: a file, our working directory, or a published folder.

    Raises:
        ConfigError: the folder holds two experts, and the recipe has one teacher.
    """
    path = pathlib.Path(path)
    own = stage_path(path, stage)
    if not path.is_dir() or own.is_file():
        return own if own.is_file() else path
    component = _COMPONENTS.get(stage, "transformer")
    if component == "transformer":
        _refuse_experts(path)
    return _published(path, component) or path


def _published(folder: str | os.PathLike, component: str) -> pathlib.Path | None:
    """Return a component of a published folder, and log what no network reads there; None for stages of ours."""
    path = components(folder).get(component)
    if path is None or path in {stage_path(folder, name).parent for name in STAGES if name not in NAMED_FILES}:
        return None
    if unread := _unread(pathlib.Path(folder)):
        _say_once(unread)
    return path


def find(recipe: str, stage: str, workdir: str | os.PathLike | None = None) -> pathlib.Path:
    """Return the path of the weights of ``stage``: in ``workdir``, ours or published, else those of the package.

    A published transformer is a teacher. ``stage`` may also be a network that is not trained, such as text_encoder, or
    an expert of a teacher of two.

    Args:
        recipe: name of the recipe, for the weights of the package.
        stage: as in :func:`open_stage`.
        workdir: a working directory or a published folder; None takes the weights of the package.

    Raises:
        ConfigError: there are none, or the stage in ``workdir`` has not ended.
    """
    if stage in NAMES:
        require(workdir is not None, "the package comes with no teacher of two experts; give a folder by --checkpoint")
        return find_experts(workdir or ".")[stage]
    own = stage_path(workdir, stage) if workdir is not None else None
    if own is not None and own.is_file():
        return own
    if workdir is not None and _COMPONENTS.get(stage) == "transformer":
        _refuse_experts(pathlib.Path(workdir))
    if workdir is not None and stage in _COMPONENTS:
        published = _published(workdir, _COMPONENTS[stage])
        if published is not None:
            return published
    if own is not None and (own.parent / "checkpoints").is_dir():
        raise ConfigError(
            f"{own} does not exist: the stage {stage!r} in {own.parent} has not ended; end it with causvid train "
            f"--stage={stage}, or write its weights so far with causvid export --stage={stage} --output={own}"
        )
    packaged = ASSETS / recipe / f"{stage}.safetensors"
    if packaged.is_file():
        if workdir is not None:
            _say_once(f"{workdir} holds no {stage}; the one of the package is used")
        return packaged
    prefix = f"{own} does not exist and " if own is not None else ""
    if stage in STAGES:
        remedy = f"train it with causvid train --stage={stage}"
    else:
        remedy = f"copy the published one to {workdir}"
    raise ConfigError(f"{prefix}recipe {recipe!r} comes with no trained {stage}; {remedy}")


def _refuse_experts(folder: pathlib.Path) -> None:
    """Refuse to take one expert of a published folder for the whole teacher."""
    for high, low in _EXPERTS[:2]:
        require(
            not source.weights_files(folder / low),
            f"{folder} holds two experts, {high} and {low}, and the recipe has one teacher (experts.boundary 0); use "
            "--config=published:wan22_t2v_a14b, or give the folder of one expert",
        )


@functools.cache
def _say_once(text: str) -> None:
    """Log ``text`` once per process."""
    _LOG.warning(text)


def is_packaged(path: pathlib.Path) -> bool:
    """Return whether weights are files of the package."""
    return path.is_relative_to(ASSETS)


def check_known(folder: str | os.PathLike) -> None:
    """Raise a ConfigError if a folder has no weights, ours or published."""
    own = any(stage_path(folder, stage).is_file() for stage in (*STAGES, *NAMES, "text_encoder", "image_encoder"))
    original = any((pathlib.Path(folder) / name).is_dir() for name in _EXPERTS[0])
    require(
        own or original or components(folder),
        f"{folder} holds no weights; accepted: a working directory (as distill/weights.safetensors), a published "
        "folder, or what causvid convert makes",
    )


def config_of(recipe: Recipe, stage: str) -> Config:
    """Return the configuration that ``recipe`` has for the network of ``stage``."""
    if stage in ("teacher", "causal", *NAMES):
        return recipe.teacher
    if stage in ("student", "init", "consistency", "distill"):
        return recipe.student
    if stage == "vae":
        return recipe.vae
    return recipe.taehv if stage == "taehv" else recipe.umt5


def open_stage(
    recipe: Recipe,
    stage: str,
    workdir: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
) -> Checkpoint:
    """Open the weights of ``stage`` and check that they have the recipe's sizes; read only headers.

    Args:
        recipe: gives the sizes.
        stage: vae, taehv, teacher, causal, init, consistency, distill or text_encoder; or high_noise or low_noise, an
            expert of a teacher of two.
        workdir: a working directory or a published folder; None takes the weights of the package (:func:`find`).
        path: a file or folder of any known format to open instead.

    Raises:
        ConfigError: there are no weights, they are unreadable, of other sizes or of another stage, or the boundary of
            two experts differs from the recipe's.
    """
    path = find(recipe.name, stage, workdir) if path is None else pathlib.Path(path)
    if stage in NAMES:
        check_boundary(recipe, path)
    opened = checkpoint.open_checkpoint(path, config_of(recipe, stage))
    if len(opened.source.parts) > 1:
        _say_once(f"{opened.path}: uses {opened.source.of_parts}")
    trained = opened.source.metadata.get("stage")
    wrong = stage == "distill" and opened.format == OURS and trained in ("teacher", "causal")
    require(not wrong, f"{path} holds the weights of the stage {trained!r}, not of a student")
    return opened


def load_stage(
    recipe: Recipe,
    stage: str,
    workdir: str | os.PathLike | None = None,
    sharding: Any = None,
    *,
    path: str | os.PathLike | None = None,
) -> tuple[dict[str, Any], Any]:
    """Return ``(params, config)`` of the weights of ``stage``, float32.

    Arguments and errors as in :func:`open_stage` and :func:`checkpoint.load`.
    """
    return checkpoint.load(open_stage(recipe, stage, workdir, path), sharding)


def load_decoders(recipe: Recipe, workdir: str | os.PathLike | None = None) -> tuple[dict[str, Any], Recipe]:
    """Return the weights ``{"vae"}``, with ``"taehv"`` if the recipe decodes with it, and a recipe.

    The returned recipe is ``recipe`` with the latent statistics of the VAE's weights.

    Raises:
        ConfigError: weights are missing, unreadable or of other sizes.
    """
    params = {}
    params["vae"], config = load_stage(recipe, "vae", workdir)
    if recipe.decoder == "taehv":
        params["taehv"], _ = load_stage(recipe, "taehv", workdir)
    return params, dataclasses.replace(recipe, vae=config)


def find_statistics(recipe: Recipe, workdir: str | os.PathLike | None = None) -> VAEConfig:
    """Return the VAE's configuration with the latent statistics of its weights; only headers are read.

    Without ``workdir`` and without a VAE in the package it is the recipe's.

    Raises:
        ConfigError: there is no VAE in ``workdir`` and none in the package, or it has other sizes.
    """
    if workdir is None and not (ASSETS / recipe.name / "vae.safetensors").is_file():
        return recipe.vae
    return open_stage(recipe, "vae", workdir).config


def open_image_encoder(workdir: str | os.PathLike, teacher: TransformerConfig) -> Checkpoint:
    """Open CLIP's weights under ``workdir``, ours or published, and check that ``teacher`` reads their embeddings.

    Raises:
        ConfigError: there are none, or they are of another network, width or number of tokens.
    """
    opened = checkpoint.open_checkpoint(find("", "image_encoder", workdir))
    config = opened.config
    if not isinstance(config, CLIPConfig):
        raise ConfigError(f"{opened.path} holds a {checkpoint.describe(config)}; it must be CLIP's image encoder")
    have, want = (config.tokens, config.dim), (teacher.image_tokens, teacher.image_dim)
    require(
        have == want,
        f"image encoder {opened.path} gives {have[0]} embeddings of width {have[1]}; "
        f"the teacher reads {want[0]} of {want[1]}",
    )
    return opened


def publish(recipe: str, workdir: str | os.PathLike, folder: str | os.PathLike = ASSETS) -> list[pathlib.Path]:
    """Copy the trained VAE, tiny codec (if any), teacher and student of ``workdir`` to the package, in float16.

    The record of ``causvid road`` is copied too, if there is one: later runs estimate their time from it.

    Returns:
        the files, ``folder/recipe/STAGE.safetensors`` and ``folder/recipe/road.json``.

    Raises:
        ConfigError: a stage is not trained yet. Nothing is written then.
    """
    paths = []
    tiny = ("taehv",) if stage_path(workdir, "taehv").is_file() else ()
    trained = {stage: store.load_params(stage_path(workdir, stage)) for stage in ("vae", *tiny, "teacher", "distill")}
    for stage, (params, metadata) in trained.items():
        paths.append(pathlib.Path(folder) / recipe / f"{stage}.safetensors")
        # The digest of the VAE before it was rounded does not match; the latent statistics in "config" do.
        stored_metadata = {key: value for key, value in metadata.items() if key != lineage.VAE_DIGEST}
        store.save_params(paths[-1], params, stored_metadata, dtype="float16")
    record = pathlib.Path(workdir) / ROAD_RECORD
    if record.is_file():
        paths.append(pathlib.Path(folder) / recipe / ROAD_RECORD)
        shutil.copyfile(record, paths[-1])
    return paths
