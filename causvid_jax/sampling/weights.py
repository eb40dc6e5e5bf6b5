"""Find and load the weights that a sampler needs, from files of ours or published ones as they are."""

import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from causvid_jax import checkpoints
from causvid_jax.checkpoints import convert, lineage, workdir
from causvid_jax.config import CausalConfig, ConfigError, Recipe, published, require
from causvid_jax.models import decoder, transformer
from causvid_jax.models.unstacked import unstack

_LOG = logging.getLogger("absl")
Opened = dict[str, checkpoints.Checkpoint]  # network to checkpoint, of which only headers are read
STAGES = {"student": "distill", "teacher": "teacher"}


def find(
    recipe: Recipe,
    role: str,
    checkpoint: str | None = None,
    *,
    encodes: bool | None = False,
    files: Mapping[str, str | os.PathLike] | None = None,
) -> tuple[Opened, Recipe]:
    """Open the checkpoints of ``role`` and of its codecs; return them and the recipe with the VAE's latent statistics.

    Args:
        recipe: of the networks.
        role: ``"student"`` or ``"teacher"``.
        checkpoint: a folder, also a published one, or one weights file of the role; None: the weights of the package.
        encodes: whether pixels become latents, which only the VAE does; the teacher also reads them by CLIP. None: if
            there is a VAE.
        files: network to a weights file or folder that goes before ``checkpoint``.

    Raises:
        ConfigError: a file that is missing or does not fit the recipe.
    """
    path = pathlib.Path(checkpoint) if checkpoint else None
    require(path is None or path.exists(), f"--checkpoint {checkpoint} does not exist")
    folder = path if path and path.is_dir() else None
    own = {name: pathlib.Path(file) for name, file in (files or {}).items()}
    for name, file in own.items():
        require(file.exists(), f"{name} weights {file} do not exist")
    single = path if path and not folder else None
    if folder:
        workdir.check_known(folder)
    found: Opened = {role: workdir.open_stage(recipe, STAGES[role], folder, own.get(role) or single)}
    require(
        not (folder and workdir.is_packaged(found[role].path)),
        f"--checkpoint {checkpoint} holds no {role}; give a folder that has one"
        + (", or the file by --student" if role == "student" else ""),
    )
    if role == "student":
        _check_window(found[role], recipe.causal)
        _note_settings(found[role], recipe)
    if recipe.decoder == "taehv":
        found["taehv"] = workdir.open_stage(recipe, "taehv", folder, own.get("taehv"))
        lineage.check_latents(found[role], found["taehv"])
        if not (encodes or (encodes is None and ("vae" in own or _has_vae(recipe, folder)))):
            return found, recipe
    if role == "teacher" and encodes:
        found["image_encoder"] = workdir.open_image_encoder(folder or ".", recipe.teacher)
    found["vae"] = workdir.open_stage(recipe, "vae", folder, own.get("vae"))
    lineage.check_latents(found[role], found["vae"])
    return found, dataclasses.replace(recipe, vae=found["vae"].config)


def _check_window(opened: checkpoints.Checkpoint, causal: CausalConfig) -> None:
    """Compare the recipe's window with what the published ``config.json`` of a causal student says.

    The published ``local_attn_size`` (-1: no limit) counts the sink, ``window`` here does not (0: no limit).
    """
    size, sink = (opened.source.config.get(name) for name in ("local_attn_size", "sink_size"))
    if not (type(size) is int and size > 0):
        return
    sink = sink if type(sink) is int else 0
    require(
        (causal.window, causal.sink) == (size - sink, sink),
        f"{opened.path} was published with local_attn_size {size} and sink_size {sink}, which is causal.window "
        f"{size - sink} and causal.sink {sink}; the recipe has {causal.window} and {causal.sink}",
    )


def _note_settings(opened: checkpoints.Checkpoint, recipe: Recipe) -> None:
    """Log the settings of a published student that the recipe has otherwise."""
    model = published.find(opened.path)
    others = published.differences(model, recipe) if model else []
    if model and others:
        _LOG.warning(
            "%s was published with %s; --config=published:%s has its settings",
            *(opened.path, ", ".join(others), model.name),
        )


def _has_vae(recipe: Recipe, folder: pathlib.Path | None) -> bool:
    try:
        return workdir.find(recipe.name, "vae", folder).exists()
    except ConfigError:
        return False


def with_loras(opened: checkpoints.Checkpoint, loras: Sequence[str]) -> checkpoints.Checkpoint:
    """Return a checkpoint to which ``FILE`` or ``FILE:STRENGTH`` are added while it is read."""
    pairs = [convert.parse_lora(value) for value in loras]
    updates = tuple(checkpoints.open_lora(path, strength, opened.config) for path, strength in pairs)
    return dataclasses.replace(opened, updates=(*opened.updates, *updates))


def load(opened: Opened, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the networks in ``shapes`` on the device, in the types of ``shapes``."""
    return {name: checkpoints.load(opened[name], dtype=types)[0] for name, types in shapes.items()}


def load_student(opened: Opened, recipe: Recipe, *, encodes: bool = False) -> dict[str, Any]:
    """Return the student and its decoder as streams run them, with ``encodes`` also the VAE."""
    shapes = {"student": transformer.inference(recipe.student), **decoder.codec_shapes(recipe, encodes=encodes)}
    return for_stream(load(opened, shapes), recipe, free=True)


def for_stream(params: Mapping[str, Any], recipe: Recipe, *, free: bool = False) -> dict[str, Any]:
    """Return ``params`` with the student in the form that streams fastest (``models.unstacked``).

    ``free`` releases the stacked arrays on the way; they must not be used again.
    """
    return {**params, "student": unstack(params["student"], recipe.student, free=free)}


def checksum(opened: Opened, recipe: Recipe) -> str:
    """Return one checksum of what turns noise into frames: weights of student and decoder, and the sampler's settings.

    ``causal.on_prompt_switch`` is left out, since every change of prompt of a script tells it.
    """
    causal = dataclasses.replace(recipe.causal, on_prompt_switch="keep")
    names = "student", "taehv" if recipe.decoder == "taehv" else "vae"
    parts = [*(opened[name].identity() for name in names), recipe.student.dtype, recipe.student.precision]
    return hashlib.sha256(" ".join(map(str, [*parts, causal, recipe.diffusion])).encode()).hexdigest()


def free(tree: Any) -> None:
    """Release the memory of arrays now, whatever still refers to them."""
    jax.tree.map(lambda leaf: leaf.delete(), tree)
