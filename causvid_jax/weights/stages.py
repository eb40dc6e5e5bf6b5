"""Where the weights of each stage lie, and the VAE's with the latent statistics measured after its training.

A stage leaves ``WORKDIR/<stage>/weights.safetensors``, and ``launch.convert`` writes published weights to the same
places, with the text encoder under ``text_encoder`` and TAEHV under ``taehv``. A recipe whose trained weights come with
the package has them in ``causvid_jax/assets/<recipe>/<stage>.safetensors``; what a working directory holds goes first.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from causvid_jax.config import ConfigError, TAEHVConfig, TransformerConfig, VAEConfig
from causvid_jax.models import taehv, transformer, vae
from causvid_jax.weights import files, sources, store
from causvid_jax.weights import taehv as published_taehv

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
_STATISTICS = ("latent_mean", "latent_std")

FILES = {
    "vae": "vae/weights.safetensors",
    "text_encoder": "text_encoder.safetensors",
    "image_encoder": "image_encoder.safetensors",
    "taehv": "taehv.safetensors",
}
"""Where a working directory has what is converted and not trained; the transformer lies under its stage."""
TOKENIZER = "tokenizer.json"
"""The text encoder's, beside it."""


def stage_path(workdir: str | os.PathLike, stage: str) -> pathlib.Path:
    """Where ``stage`` (``vae``, ``teacher``, ``init``, ``distill``) exports its weights."""
    return pathlib.Path(workdir) / stage / "weights.safetensors"


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
        ConfigError: a stage that is not trained yet.
    """
    written = []
    tiny = ("taehv",) if stage_path(workdir, "taehv").is_file() else ()
    for stage in ("vae", *tiny, "teacher", "distill"):
        params, metadata = store.load_params(stage_path(workdir, stage))
        written.append(pathlib.Path(folder) / recipe / f"{stage}.safetensors")
        store.save_params(written[-1], params, metadata, dtype="float16")
    return written
