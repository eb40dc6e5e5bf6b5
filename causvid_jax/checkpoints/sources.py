"""Checkpoints as published: a file or a folder becomes names and lazy tensors, without the wrappers' prefixes.

| what | read as |
|---|---|
| ``x.safetensors`` | one file |
| ``x.pt``, ``.pth``, ``.bin``, ``.ckpt`` | a PyTorch pickle (``causvid_jax.checkpoints.pickles``), one of its parts |
| a folder with ``*.index.json`` | its shards |
| a folder with one weights file | that file |
| an original Wan folder, a diffusers pipeline | :func:`components` says which component lies where |

CausVid, Self-Forcing, Causal-Forcing and LongLive publish dicts of parts (``generator``, ``generator_ema``, ``critic``)
with the wrapper's attribute ``model.`` before each name, Krea a flat file; FSDP and ``torch.compile`` leave prefixes of
their own anywhere in a name.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from causvid_jax.checkpoints import files, pickles
from causvid_jax.checkpoints.files import Tensor
from causvid_jax.config import ConfigError, require

ANYWHERE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
LEADING = ("module.", "model.", "diffusion_model.")
PARTS = ("generator_ema", "generator", "ema", "state_dict", "model", "module")
"""Parts that are taken unasked, the best first; any other must be named."""
LORA_PARTS = ("generator_lora", "lora", "state_dict")

_SUFFIXES = (".safetensors", *pickles.SUFFIXES)
# By component: the folders it may lie in (of our own working directories the last stage), or its files' names.
_FOLDERS = {
    "transformer": ("transformer", "distill", "init", "teacher"),
    "vae": ("vae",),
    "text_encoder": ("text_encoder",),
    "image_encoder": ("image_encoder",),
    "taehv": ("taehv",),
}
_FILES = {
    "vae": ("Wan2.1_VAE.*",),
    "text_encoder": ("models_t5_*",),
    "image_encoder": ("models_clip_*",),
    "taehv": ("taew2_1*", "taehv*"),
}
TOKENIZERS = ("text_encoder", "tokenizer", "google/umt5-xxl", ".")
"""Where a folder may have the text encoder's tokenizer, ours first."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    ``tensors``: names without wrappers' prefixes. ``part`` of ``parts``: the dict of a pickle that was chosen ("" for
    the top level). ``prefixes``: what was taken off the names. ``metadata``: of a safetensors file. ``config``: the
    ``config.json`` beside the weights. Where a network is known that the file is of (:func:`layouts.adapted`):
    ``twins``, second copies of tensors under the names of the first ones, and ``unread``, how many tensors are left
    out because no network of ours reads them.
    """

    path: pathlib.Path
    tensors: Mapping[str, Tensor]
    part: str = ""
    parts: tuple[str, ...] = ("",)
    prefixes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    twins: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    unread: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def components(path: str | os.PathLike) -> dict[str, pathlib.Path]:
    """The components (transformer, vae, text_encoder, image_encoder, taehv) of a folder of several.

    That is an original Wan folder, a diffusers pipeline, or a working directory of ours. Empty for anything else: a
    file, or the folder of one component.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return {}
    found: dict[str, pathlib.Path] = {}
    for name, places in _FOLDERS.items():
        place = next((folder / inner for inner in places if _weights(folder / inner)), None)
        if place is not None:
            found[name] = place
    named = {}
    for name, patterns in _FILES.items():
        matches = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.suffix in _SUFFIXES)
        if matches:
            # Both kinds beside each other are the same weights twice; one needs no PyTorch.
            named[name] = min(matches, key=lambda file: _SUFFIXES.index(file.suffix))
    if named and "transformer" not in found and any(file not in named.values() for file in _weights(folder)):
        found["transformer"] = folder
    found = {**named, **found}
    return {name: found[name] for name in ("transformer", *_FILES) if name in found}


def tokenizer_files(path: str | os.PathLike) -> dict[str, pathlib.Path]:
    """The text encoder's tokenizer in a published folder, or one of ours: names to files; ``tokenizer.json`` is the
    one that is needed. Empty if there is none."""
    for inner in TOKENIZERS:
        found = {name: pathlib.Path(path) / inner / name for name in _TOKENIZER_FILES}
        found = {name: file for name, file in found.items() if file.is_file()}
        if "tokenizer.json" in found:
            return found
    return {}


def open_source(path: str | os.PathLike, part: str | None = None, preferred: Sequence[str] = PARTS) -> Source:
    """Open a checkpoint: a file, or the folder of one component.

    Args:
        path: see the table above.
        part: the part of a checkpoint that has several; None takes the first of ``preferred`` that is there.
        preferred: last names of parts, the best first.

    Raises:
        ConfigError: nothing readable there, a part that does not exist or must be chosen, or two names that are one
            without their prefixes.
    """
    place = pathlib.Path(path)
    require(place.exists(), f"{place} does not exist")
    index = _index(place)
    if index:
        folder, parts, metadata = place, {"": _open_shards(index)}, dict[str, str]()
    else:
        place = _only_file(place) if place.is_dir() else place
        folder, (parts, metadata) = place.parent, _open_file(place)
    # The config.json of an original folder is the transformer's, and its other files are named.
    named = any(place.match(pattern) for patterns in _FILES.values() for pattern in patterns)
    config = {} if named else read_json(folder / "config.json", missing={})
    chosen = _choose(place, parts, part, preferred)
    tensors, prefixes = {}, dict[str, None]()
    for full, tensor in parts[chosen].items():
        name, removed = strip(full)
        require(name not in tensors, f"{place} holds {name!r} twice, once as {full!r}")
        tensors[name] = tensor
        prefixes |= dict.fromkeys(removed)
    return Source(place, tensors, chosen, tuple(parts), tuple(prefixes), metadata, config)


def strip(name: str) -> tuple[str, list[str]]:
    """``name`` without the prefixes of wrappers, and those prefixes."""
    removed = []
    for inner in ANYWHERE:
        if inner in name:
            name = name.replace(inner, "")
            removed.append(inner)
    while outer := next((p for p in LEADING if name.startswith(p)), None):
        name = name.removeprefix(outer)
        removed.append(outer)
    return name, removed


Parts = dict[str, dict[str, Tensor]]


def _open_file(path: pathlib.Path) -> tuple[Parts, dict[str, str]]:
    if path.suffix in pickles.SUFFIXES:
        return pickles.open_pickle(path), {}
    require(path.suffix == ".safetensors", f"{path} is no weights file; accepted: {', '.join(_SUFFIXES)}, or a folder")
    tensors, metadata = files.open_safetensors(path)
    require(tensors, f"{path} holds no tensors")
    parts: Parts = {}
    for name, tensor in tensors.items():
        # A dict of parts that was flattened to become a safetensors file.
        first, _, rest = name.partition(".")
        part = first if first in ("generator", "generator_ema", "critic", "generator_lora") else ""
        parts.setdefault(part, {})[rest if part else name] = tensor
    return parts, metadata


def _index(place: pathlib.Path) -> pathlib.Path | None:
    """The index of a folder of shards, the one of safetensors if there are two."""
    if place.name.endswith(".index.json"):
        return place
    found = sorted(place.glob("*.index.json"), key=lambda file: ".safetensors." not in file.name)
    return found[0] if found else None


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    weights, inside = _weights(folder), components(folder)
    require(
        len(weights) == 1,
        f"folder {folder} holds {len(weights)} weights files"
        + (f" ({', '.join(file.name for file in weights[:4])})" if weights else "")
        + (f" and the components {', '.join(inside)}" if inside else "")
        + "; accepted: one, or shards with an index",
    )
    return weights[0]


def _open_shards(index: pathlib.Path) -> dict[str, Tensor]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{index} has no weight_map")
    shards: dict[str, dict[str, Tensor]] = {}
    for shard in sorted(set(map(str, listed.values()))):
        file = index.parent / shard
        require(pathlib.PurePath(shard).name == shard, f"{index} lists {shard!r}, outside of its folder")
        require(file.is_file(), f"{index} lists {shard}, which does not exist")
        parts = _open_file(file)[0]
        require(len(parts) == 1, f"shard {file} holds several parts ({', '.join(parts)}); accepted: one")
        shards[shard] = next(iter(parts.values()))
    absent = [f"{name} in {shard}" for name, shard in listed.items() if name not in shards[str(shard)]]
    require(not absent, f"{index} lists {len(absent)} tensor(s) that are not there, first {', '.join(absent[:3])}")
    return {name: shards[str(shard)][name] for name, shard in listed.items()}


def _choose(path: pathlib.Path, parts: Parts, part: str | None, preferred: Sequence[str]) -> str:
    listing = ", ".join(repr(name) for name in parts)
    if part is not None:
        require(part in parts, f"{path} has no part {part!r}; accepted: {listing}")
        return part
    if len(parts) == 1:
        return next(iter(parts))
    for name in (*preferred, ""):
        found = [p for p in parts if p.split(".")[-1] == name]
        if len(found) == 1:
            return found[0]
        require(not found, f"{path} has several parts {name!r} ({listing}); choose one with --part")
    raise ConfigError(f"{path} has the parts {listing}; choose one with --part")


def _weights(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weights files of a folder, in one format: safetensors if there are any."""
    if not folder.is_dir():
        return []
    found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith("."))
    safe = [file for file in found if file.suffix == ".safetensors"]
    named = {file for patterns in _FILES.values() for pattern in patterns for file in folder.glob(pattern)}
    alone = [file for file in safe or found if file not in named]
    return alone or safe or found


def read_json(path: pathlib.Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; ``missing`` if that is given and there is no file; ConfigError if unreadable."""
    if missing is not None and not path.is_file():
        return missing
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {files.reason(error)}") from error
    require(isinstance(content, dict), f"{path} is not a JSON object")
    return content
