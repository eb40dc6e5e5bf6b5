"""Find and load the weights that a sampler needs, from our files or from published ones."""

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from causvid_jax import checkpoints
from causvid_jax.checkpoints import convert, lineage, workdir
from causvid_jax.config import CausalConfig, CLIPConfig, ConfigError, Recipe, TransformerConfig, published, require
from causvid_jax.models import decoder, experts, transformer
from causvid_jax.models.unstacked import unstack

_LOG = logging.getLogger("absl")
Opened = dict[str, checkpoints.Checkpoint]  # network to checkpoint, of which only headers are read
STAGES = {"student": "distill"}
"""Role to the stage that writes its weights, if the names differ."""


def find(
    recipe: Recipe,
    role: str,
    checkpoint: str | None = None,
    *,
    encodes: bool | None = False,
    files: Mapping[str, str | os.PathLike | None] | None = None,
) -> tuple[Opened, Recipe]:
    """Open the checkpoints of ``role`` and of its codecs; return them and the recipe with the VAE's latent statistics.

    A teacher of two experts is opened as ``"high_noise"`` and ``"low_noise"``.

    Args:
        recipe: gives the sizes of the networks and the decoder.
        role: ``"student"`` or ``"teacher"``.
        checkpoint: a folder, also a published one, or one weights file of the role; None: the weights of the package.
        encodes: whether pixels are encoded, which needs the VAE (for a teacher also CLIP). None: if there is a VAE.
        files: network to a weights file or folder that replaces that of ``checkpoint``; None does not.

    Raises:
        ConfigError: a file that is missing or does not fit the recipe.
    """
    path = pathlib.Path(checkpoint) if checkpoint else None
    require(path is None or path.exists(), f"--checkpoint {checkpoint} does not exist")
    folder = path if path and path.is_dir() else None
    own = {name: pathlib.Path(file) for name, file in (files or {}).items() if file}
    for name, file in own.items():
        require(file.exists(), f"{name} weights {file} do not exist")
    single = path if path and not folder else None
    if folder:
        workdir.check_known(folder)
    opened = _open_role(recipe, role, folder, own.get(role) or single)
    first = next(iter(opened.values()))
    require(
        not (folder and workdir.is_packaged(first.path)),
        f"--checkpoint {checkpoint} holds no {role}; give a folder that has one"
        + (", or the file by --student" if role == "student" else ""),
    )
    if role == "student":
        _check_window(first, recipe.causal)
        _note_settings(first, recipe)
    if recipe.decoder == "taehv":
        opened["taehv"] = workdir.open_stage(recipe, "taehv", folder, own.get("taehv"))
        lineage.check_latents(first, opened["taehv"])
        if not (encodes or (encodes is None and ("vae" in own or _has_vae(recipe, folder)))):
            return opened, recipe
    if getattr(recipe, role).image_dim and encodes:
        opened["image_encoder"] = workdir.open_image_encoder(folder or ".", getattr(recipe, role))
    opened["vae"] = workdir.open_stage(recipe, "vae", folder, own.get("vae"))
    lineage.check_latents(first, opened["vae"])
    return opened, dataclasses.replace(recipe, vae=opened["vae"].config)


def networks(recipe: Recipe, role: str) -> tuple[str, ...]:
    """Return the names under which the weights of a role are opened: its own, or those of the teacher's experts."""
    return experts.NAMES if role == "teacher" and recipe.experts.boundary else (role,)


def _open_role(recipe: Recipe, role: str, folder: pathlib.Path | None, path: pathlib.Path | None) -> Opened:
    names = networks(recipe, role)
    if len(names) == 1:
        return {role: workdir.open_stage(recipe, STAGES.get(role, role), folder, path)}
    require(
        path is None or path.is_dir(),
        f"{path} is one file; a teacher of two experts (experts.boundary {recipe.experts.boundary:g}) is a folder with "
        "both",
    )
    return {name: workdir.open_stage(recipe, name, path or folder) for name in names}


def shapes(recipe: Recipe, role: str) -> dict[str, Any]:
    """Return the shapes and types in which a role's weights are read, under the names of :func:`networks`."""
    return dict.fromkeys(networks(recipe, role), transformer.read_shapes(getattr(recipe, role)))


def opened_shapes(opened: Opened, recipe: Recipe, role: str) -> dict[str, Any]:
    """Return the shapes and types in which all networks of ``opened`` are read: those of ``role`` and its codecs."""
    every = {**shapes(recipe, role), **decoder.codec_shapes(recipe, encodes=True)}
    if (clip := clip_of(opened)) is not None:
        every["image_encoder"] = decoder.image_encoder_shapes(clip)
    return {name: shape for name, shape in every.items() if name in opened}


def clip_of(opened: Opened) -> CLIPConfig | None:
    """Return the sizes of the image encoder; None if it is not opened."""
    return opened["image_encoder"].config if "image_encoder" in opened else None


def _check_window(opened: checkpoints.Checkpoint, causal: CausalConfig) -> None:
    """Compare the recipe's window with that in the published ``config.json`` of a causal student.

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
    """Log the settings in which the recipe differs from a published student."""
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
    """Return the checkpoint with LoRAs (``FILE`` or ``FILE:STRENGTH``) that are added to the weights as they are read.

    Raises:
        ConfigError: a file that is missing or does not fit the network.
    """
    pairs = [convert.parse_lora(value) for value in loras]
    updates = tuple(checkpoints.open_lora(path, strength, opened.config) for path, strength in pairs)
    return dataclasses.replace(opened, updates=(*opened.updates, *updates))


def load(opened: Opened, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the networks in ``shapes`` on the device, in the types of ``shapes``.

    The weights of two experts become one entry, ``"teacher"``. With ``linear="int8"`` each kernel of a transformer is
    rounded before the next kernel is read, so that the device holds one stacked array in the compute type at a time.
    """
    params = {name: _load(opened[name], types) for name, types in shapes.items()}
    if experts.HIGH_NOISE in params:
        params["teacher"] = {name: params.pop(name) for name in experts.NAMES}
    return params


def _load(opened: checkpoints.Checkpoint, types: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if isinstance(opened.config, TransformerConfig) and opened.config.linear == "int8":
        options["convert"] = functools.partial(transformer.round_parameter, config=opened.config)
    return checkpoints.load(opened, dtype=types, **options)[0]


def load_student(opened: Opened, recipe: Recipe, *, encodes: bool = False) -> dict[str, Any]:
    """Load the student in the form of a stream (:func:`for_stream`) and its decoder; with ``encodes`` the whole VAE."""
    read = {**shapes(recipe, "student"), **decoder.codec_shapes(recipe, encodes=encodes)}
    return for_stream(load(opened, read), recipe, free=True)


def stream_shapes(recipe: Recipe, *, encodes: bool = False) -> dict[str, Any]:
    """Return shapes and types of the result of :func:`load_student`. They do not depend on the files."""
    student = transformer.inference(recipe.student, unstacked=True)
    return {"student": student, **decoder.codec_shapes(recipe, encodes=encodes)}


def for_stream(params: Mapping[str, Any], recipe: Recipe, *, free: bool = False) -> dict[str, Any]:
    """Return ``params`` with the student in the form that streams fastest (``models.unstacked``).

    Kernels that are not rounded yet are rounded if ``student.linear`` is ``"int8"``. ``free`` releases each stacked
    array after its use; the arrays must not be used again.
    """
    student = transformer.round_params(params["student"], recipe.student)
    return {**params, "student": unstack(student, recipe.student, free=free)}


def checksum(opened: Opened, recipe: Recipe) -> str:
    """Return one SHA-256 of all that determines the frames of given noise: weights of student and decoder, settings.

    ``causal.on_prompt_switch`` is left out, because every prompt switch of a script has its own value.
    """
    causal = dataclasses.replace(recipe.causal, on_prompt_switch="keep")
    names = "student", "taehv" if recipe.decoder == "taehv" else "vae"
    net = recipe.student
    parts = [*(opened[name].identity() for name in names), net.dtype, net.precision]
    parts += [f"{name} int8" for name in ("attention", "kv_cache", "linear") if getattr(net, name) == "int8"]
    return hashlib.sha256(" ".join(map(str, [*parts, causal, recipe.diffusion])).encode()).hexdigest()


def free(tree: Any) -> None:
    """Release the memory of arrays immediately, even if they are still referenced."""
    jax.tree.map(lambda leaf: leaf.delete(), tree)
