"""Where the weights of each stage lie, and the VAE's with the latent statistics measured after its training.

A stage leaves ``WORKDIR/<stage>/weights.safetensors``. What is converted and not trained (``text_encoder``,
``image_encoder``, ``taehv``) lies likewise under its own name: ``launch.convert`` writes to :func:`place` and every
reader looks there. A recipe whose trained weights come with the package has them in
``causvid_jax/assets/<recipe>/<stage>.safetensors``; what a working directory holds goes first.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from causvid_jax.checkpoints import files, layouts, sources, store
from causvid_jax.checkpoints import taehv as published_taehv
from causvid_jax.config import CLIPConfig, ConfigError, Recipe, TAEHVConfig, TransformerConfig, VAEConfig, require
from causvid_jax.models import taehv, transformer, vae

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
_STATISTICS = ("latent_mean", "latent_std")

TOKENIZER = "text_encoder/tokenizer.json"
"""Where a working directory has the text encoder's tokenizer."""


def place(name: str) -> str:
    """Where a working directory has the weights of ``name``: a stage that is trained (``vae``, ``teacher``, ``init``,
    ``distill``), or a network that is not (``text_encoder``, ``image_encoder``, ``taehv``)."""
    return f"{name}/weights.safetensors"


def stage_path(workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """:func:`place` under ``workdir``."""
    return pathlib.Path(workdir) / place(name)


def find(recipe: str, stage: str, workdir: str | os.PathLike | None = None) -> pathlib.Path:
    """The weights of ``stage``: those under ``workdir`` if they exist, else those that come with the package.

    Raises:
        ConfigError: there are neither.
    """
    own = stage_path(workdir, stage) if workdir is not None else None
    packaged = ASSETS / recipe / f"{stage}.safetensors"
    for path in (own, packaged):
        if path is not None and path.is_file():
            return path
    missing = f"{own} does not exist and " if own is not None else ""
    raise ConfigError(
        f"{missing}recipe {recipe!r} comes with no trained {stage}; train it with launch.train --stage={stage}"
    )


def vae_metadata(config: VAEConfig) -> dict[str, str]:
    """Metadata to save beside VAE weights: the latent statistics of ``config``."""
    return {name: json.dumps(getattr(config, name)) for name in _STATISTICS}


def load_vae(path: str | os.PathLike, config: VAEConfig) -> tuple[dict[str, Any], VAEConfig]:
    """VAE parameters, and ``config`` with the statistics saved beside them (its own where the file has none).

    Raises:
        ConfigError: an unreadable file, or one of a VAE of other sizes.
    """
    params, metadata = store.load_params(path)
    store.check_tree(params, vae.abstract(config), f"VAE weights {path}")
    return params, latent_statistics(config, metadata)


def load_decoders(recipe: Recipe, workdir: str | os.PathLike | None = None) -> tuple[dict[str, Any], Recipe]:
    """``{"vae"}``, and ``"taehv"`` if ``recipe`` names it as its decoder; and the recipe with the latents' statistics.

    Raises:
        ConfigError: weights that are missing, unreadable or of other sizes.
    """
    params = {}
    params["vae"], config = load_vae(find(recipe.name, "vae", workdir), recipe.vae)
    if recipe.decoder == "taehv":
        params["taehv"] = load_taehv(find_taehv(recipe.name, workdir), recipe.taehv)
    return params, dataclasses.replace(recipe, vae=config)


def load_transformer(path: str | os.PathLike, config: TransformerConfig, role: str) -> dict[str, Any]:
    """Transformer parameters (numpy); ``role`` (teacher, student, ...) is what an error calls them.

    Raises:
        ConfigError: an unreadable file, or one of a transformer of other sizes.
    """
    params, _ = store.load_params(path)
    store.check_tree(params, transformer.abstract(config), f"{role} weights {path}")
    return params


def latent_statistics(config: VAEConfig, metadata: Mapping[str, str]) -> VAEConfig:
    """``config`` with the statistics of :func:`vae_metadata` (its own where there are none)."""
    saved: dict[str, Any] = {name: tuple(json.loads(metadata[name])) for name in _STATISTICS if name in metadata}
    return dataclasses.replace(config, **saved)


def find_statistics(recipe: str, config: VAEConfig, workdir: str | os.PathLike | None = None) -> VAEConfig:
    """``config`` as it will be when its weights are loaded: with the statistics beside them, of which nothing but the
    header is read; without any weights as it is.

    Raises:
        ConfigError: ``workdir`` is given and has no VAE, or one of other sizes.
    """
    packaged = ASSETS / recipe / "vae.safetensors"
    if workdir is None and not packaged.is_file():
        return config
    path = find(recipe, "vae", workdir)
    return latent_statistics(config, store.check_file(path, vae.abstract(config), f"VAE weights {path}"))


def find_taehv(recipe: str, workdir: str | os.PathLike | None = None) -> pathlib.Path:
    """TAEHV's weights: under ``workdir`` ours (``taehv/weights.safetensors``) or published (``taew2_1.*``), else those
    that come with the package.

    Raises:
        ConfigError: there are none.
    """
    folder = pathlib.Path(workdir or ".")
    places = [stage_path(folder, "taehv"), *(folder / f"taew2_1{end}" for end in (".safetensors", ".pth"))]
    for path in (*places, ASSETS / recipe / "taehv.safetensors"):
        if path.is_file():
            return path
    accepted = ", ".join(str(path.relative_to(folder)) for path in places)
    raise ConfigError(f"{folder} holds no weights of TAEHV; accepted: {accepted}")


def find_image_encoder(workdir: str | os.PathLike, teacher: TransformerConfig) -> pathlib.Path:
    """CLIP's weights under ``workdir``, whose rows ``teacher`` reads.

    Raises:
        ConfigError: there are none, or they are not those of an image encoder that ``teacher`` reads.
    """
    path = stage_path(workdir, "image_encoder")
    require(
        path.is_file(),
        f"{path} does not exist: CLIP's image encoder of the published folder, converted by launch.convert",
    )
    config = image_encoder_config(path)
    rows, wanted = (config.tokens, config.dim), (teacher.image_tokens, teacher.image_dim)
    require(
        rows == wanted,
        f"image encoder {path} gives {rows[0]} rows of width {rows[1]}; the teacher reads {wanted[0]} of {wanted[1]}",
    )
    return path


def image_encoder_config(path: str | os.PathLike) -> CLIPConfig:
    """The sizes of CLIP's image encoder in ``path``; ConfigError if it is no such file."""
    config = layouts.detect(sources.open_source(path)).config
    if not isinstance(config, CLIPConfig):
        raise ConfigError(f"{path} holds a {layouts.describe(config)}; it must be CLIP's image encoder")
    return config


def load_taehv(path: str | os.PathLike, config: TAEHVConfig) -> dict[str, Any]:
    """TAEHV's parameters (numpy), of a file of ours or a published one.

    Raises:
        ConfigError: an unreadable file, or one of another network.
    """
    if pathlib.Path(path).suffix == ".safetensors" and files.CHECKSUM in files.open_safetensors(path)[1]:
        params, _ = store.load_params(path)
        store.check_tree(params, taehv.abstract(config), f"TAEHV weights {path}")
        return params
    state = {}
    for name, tensor in sources.open_source(path).tensors.items():
        with tensor.view() as array:
            state[name] = np.array(array, np.float32)
    return published_taehv.from_published(state, config)


def publish(recipe: str, workdir: str | os.PathLike, folder: str | os.PathLike = ASSETS) -> list[pathlib.Path]:
    """Copy the VAE, teacher and student of ``workdir``, and the tiny codec if there is one, to the package's own
    weights, in half precision.

    Raises:
        ConfigError: a stage that is not trained yet; nothing is written then.
    """
    written = []
    tiny = ("taehv",) if stage_path(workdir, "taehv").is_file() else ()
    trained = {stage: store.load_params(stage_path(workdir, stage)) for stage in ("vae", *tiny, "teacher", "distill")}
    for stage, (params, metadata) in trained.items():
        written.append(pathlib.Path(folder) / recipe / f"{stage}.safetensors")
        store.save_params(written[-1], params, metadata, dtype="float16")
    return written
