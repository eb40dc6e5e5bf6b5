"""Open a file or folder of weights as names and lazy tensors; remove the prefixes of the code that saved it.

| path | opened as |
|---|---|
| ``x.safetensors`` | one file |
| ``x.pt``, ``.pth``, ``.bin``, ``.ckpt`` | a PyTorch pickle (``causvid_jax.checkpoints.pickles``) |
| a folder with ``*.index.json`` | its shards |
| a folder with one weights file | that file |

A checkpoint may have several *parts*: nested dicts of a pickle, or first words of flattened names (``generator_ema.``).
CausVid, Self-Forcing, Causal-Forcing and LongLive publish ``generator``, ``generator_ema`` and ``critic``. EMA weights
are preferred. Weights of 8 bits with scales are read as the product of both, in float32.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from causvid_jax.checkpoints import pickles
from causvid_jax.checkpoints.safetensors_io import Tensor, open_safetensors
from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import reason

SUFFIXES = (".safetensors", *pickles.SUFFIXES)
_ANYWHERE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_WRAPPERS = frozenset(("module", "model", "diffusion_model", "base_model", "net", "pipe", "dit", "transformer"))
AVERAGES = ("generator_ema", "student_ema", "model_ema", "ema_model", "ema")
PREFERRED = (*AVERAGES, "generator", "student", "state_dict", "model", "module")
"""Parts that are chosen by default, the best first. Any other part must be named."""
LORA_PREFERRED = ("generator_lora", "lora", "state_dict")
_FLATTENED_PARTS = frozenset(
    (*AVERAGES, "generator", "student", "critic", "generator_lora", "fake_score", "real_score")
)

_SCALES = (".scale_weight", ".weight_scale")
_COMPANIONS = (".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: the file or folder.
        tensors: tensors by name, without prefixes.
        part: the part that was chosen, "" for the top level.
        parts: names of all parts of the checkpoint.
        prefixes: prefixes that were removed from the names.
        metadata: metadata of a safetensors file.
        config: content of the ``config.json`` beside the weights.
        dequantised: number of 8-bit tensors that are multiplied by their scales.
    """

    path: pathlib.Path
    tensors: Mapping[str, Tensor]
    part: str = ""
    parts: tuple[str, ...] = ("",)
    prefixes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dequantised: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def of_parts(self) -> str:
        """Text that names the chosen part and all parts; "" for a checkpoint without parts."""
        if len(self.parts) > 1:
            return f"part {self.part!r} of {', '.join(map(repr, self.parts))}"
        return f"part {self.part!r}" if self.part else ""


def open_source(
    path: str | os.PathLike, part: str | None = None, preferred: Sequence[str] = PREFERRED, config: bool = True
) -> Source:
    """Open a checkpoint: a file, or the folder of one network.

    Args:
        path: a file or folder of the table in this module's docstring.
        part: the part of a checkpoint that has several; None chooses the first of ``preferred`` that exists.
        preferred: last words of the names of parts, the best first.
        config: whether to read a ``config.json`` beside the weights.

    Raises:
        ConfigError: there is no readable checkpoint, a part does not exist or must be named, two names are equal
            without their prefixes, or a scale does not fit its weight.
    """
    path = pathlib.Path(path)
    require(path.exists(), f"{path} does not exist")
    index = _index(path)
    if index:
        folder, (nested, metadata) = index.parent, ({"": _open_shards(index)}, dict[str, str]())
    else:
        path = _only_file(path) if path.is_dir() else path
        folder, (nested, metadata) = path.parent, _open_file(path)
    described = read_json(folder / "config.json", default={}) if config else {}
    parts, prefixes = split_parts(nested, path)
    chosen = _choose(path, parts, part, preferred)
    tensors, dequantised = _dequantise(parts[chosen], path)
    return Source(path, tensors, chosen, tuple(parts), prefixes, metadata, described, dequantised)


Parts = dict[str, dict[str, Tensor]]


def split_parts(nested: Parts, path: pathlib.Path) -> tuple[Parts, tuple[str, ...]]:
    """Return the tensors by part under their names without prefixes, and the removed prefixes.

    Raises:
        ConfigError: two names of a part are equal without their prefixes; ``path`` is named in the message.
    """
    parts: Parts = {}
    prefixes: dict[str, None] = {}
    for outer, tensors in nested.items():
        for full, tensor in tensors.items():
            flattened, name, removed = split_name(full)
            part = ".".join(filter(None, (outer, flattened)))
            inside = parts.setdefault(part, {})
            require(name not in inside, f"{path} holds {name!r} twice, once as {full!r}")
            inside[name] = tensor
            prefixes |= dict.fromkeys(f"{word}." for word in removed)
    return parts, tuple(prefixes)


def split_name(full: str) -> tuple[str, str, list[str]]:
    """Return (part, name, removed words) of a tensor's full name.

    ``generator_ema.model.blocks.0.ffn.0.bias`` is ``("generator_ema", "blocks.0.ffn.0.bias", ["model"])``.
    """
    words = full.split(".")
    removed = [word for word in words if word in _ANYWHERE]
    words = [word for word in words if word not in _ANYWHERE]
    part: list[str] = []
    while len(words) > 1 and (words[0] in _WRAPPERS or words[0] in _FLATTENED_PARTS):
        (part if words[0] in _FLATTENED_PARTS else removed).append(words.pop(0))
    return ".".join(part), ".".join(words), removed


def _choose(path: pathlib.Path, parts: Parts, part: str | None, preferred: Sequence[str]) -> str:
    listing = ", ".join(map(repr, parts))
    if part is not None:
        require(part in parts, f"{path} has no part {part!r}; accepted: {listing}")
        return part
    if len(parts) == 1:
        return next(iter(parts))
    for name in (*preferred, ""):
        matches = [p for p in parts if p.split(".")[-1] == name]
        if len(matches) == 1:
            return matches[0]
        require(not matches, f"{path} has several parts {name!r} ({listing}); choose one with --part")
    raise ConfigError(f"{path} has the parts {listing}; choose one with --part")


# ---- 8 bits with scales ---------------------------------------------------------------------------------------------


def _dequantise(tensors: dict[str, Tensor], path: pathlib.Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors with scales multiplied into their weights, without companions; and the number of scales."""
    plain = {
        name: tensor
        for name, tensor in tensors.items()
        if name != _MARKER and not name.endswith((*_SCALES, *_COMPANIONS))
    }
    count = 0
    for name, scale in tensors.items():
        if not name.endswith(_SCALES):
            continue
        weight = name.rpartition(".")[0] + ".weight"
        if weight not in plain:
            raise ConfigError(f"{path} holds the scale {name}, but no {weight}")
        shape, size = plain[weight].shape, int(np.prod(scale.shape))
        per_row = size == (shape[0] if shape else 1)
        require(
            size == 1 or per_row,
            f"scale {name} of {path} has shape {scale.shape}; accepted: one number, or one per row of {shape}",
        )
        plain[weight] = _scaled(plain[weight], scale)
        count += 1
    return plain, count


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    @contextlib.contextmanager
    def view() -> Iterator[np.ndarray]:
        with weight.view() as quantised, scale.view() as factor:
            rows = np.asarray(factor, np.float32).reshape(-1, *(1,) * (len(weight.shape) - 1))
            yield quantised.astype(np.float32) * rows

    return Tensor(weight.shape, np.dtype(np.float32), view)


# ---- files ----------------------------------------------------------------------------------------------------------


def _open_file(path: pathlib.Path) -> tuple[Parts, dict[str, str]]:
    refuse_foreign(path)
    if path.suffix in pickles.SUFFIXES:
        return pickles.open_pickle(path), {}
    require(path.suffix == ".safetensors", f"{path} is no weights file; accepted: {', '.join(SUFFIXES)}, or a folder")
    tensors, metadata = open_safetensors(path)
    require(tensors, f"{path} holds no tensors")
    return {"": tensors}, metadata


def refuse_foreign(path: pathlib.Path) -> None:
    """Raise a ConfigError with advice for files that are easily mistaken for weights.

    These are a Git LFS pointer, GGUF, a distributed checkpoint of PyTorch and an LMDB.
    """
    if path.is_dir():
        require(
            not (path / ".metadata").is_file() or not any(path.glob("*.distcp")),
            f"{path} is a distributed checkpoint of PyTorch (DCP); make one file of it with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt",
        )
        require(not (path / "data.mdb").is_file(), f"{path} is an LMDB, a data set; accepted: weights")
        return
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ConfigError(f"weights file {path} cannot be read: {reason(error)}") from error
    require(
        not start.startswith(b"version https://git-lfs"),
        f"{path} is a Git LFS pointer: the weights were not downloaded; run git lfs pull in its folder",
    )
    require(
        not start.startswith(b"GGUF") and path.suffix != ".gguf",
        f"{path} is a GGUF file, whose quantised weights are not read; give the unquantised .safetensors file",
    )


def _index(path: pathlib.Path) -> pathlib.Path | None:
    """Return the index of a folder of shards; that of safetensors if there are two."""
    if path.name.endswith(".index.json"):
        return path
    indices = sorted(path.glob("*.index.json"), key=lambda file: ".safetensors." not in file.name)
    return indices[0] if indices else None


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    refuse_foreign(folder)
    files = weights_files(folder)
    listing = f" ({', '.join(file.name for file in files[:4])})" if files else ""
    inside = [inner.name for inner in sorted(folder.iterdir()) if inner.is_dir() and weights_files(inner)]
    more = f" and weights in {', '.join(inside[:5])}" if inside else ""
    require(
        len(files) == 1,
        f"folder {folder} holds {len(files)} weights files{listing}{more}; accepted: one, or shards with an index",
    )
    return files[0]


def weights_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the weights files of a folder, sorted: the safetensors files, or all weights files if there are none."""
    if not folder.is_dir():
        return []
    files = sorted(f for f in folder.iterdir() if f.suffix in (*SUFFIXES, ".gguf") and not f.name.startswith("."))
    return [file for file in files if file.suffix == ".safetensors"] or files


def _open_shards(index: pathlib.Path) -> dict[str, Tensor]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{index} has no weight_map")
    shards: dict[str, dict[str, Tensor]] = {}
    for shard in sorted(set(map(str, listed.values()))):
        file = index.parent / shard
        require(pathlib.PurePath(shard).name == shard, f"{index} lists {shard!r}, outside of its folder")
        require(file.is_file(), f"{index} lists {shard}, which does not exist")
        nested = _open_file(file)[0]
        require(len(nested) == 1, f"shard {file} holds several dicts ({', '.join(nested)}); accepted: one")
        shards[shard] = next(iter(nested.values()))
    absent = [f"{name} in {shard}" for name, shard in listed.items() if name not in shards[str(shard)]]
    require(not absent, f"{index} lists {len(absent)} tensor(s) that are not there, first {', '.join(absent[:3])}")
    return {name: shards[str(shard)][name] for name, shard in listed.items()}


def read_json(path: pathlib.Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file, or ``default`` if that is set and there is no file.

    Raises:
        ConfigError: the file is unreadable, or not an object.
    """
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON: {reason(error)}") from error
    require(isinstance(content, dict), f"{path} is not a JSON object")
    return content
