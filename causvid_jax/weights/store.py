"""Parameter trees as safetensors files: flat names, storage types, a checksum, one-sentence errors."""

import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from causvid_jax.config import ConfigError, require

CHECKSUM = "sha256"
STORAGE = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": jnp.dtype(jnp.bfloat16)}


def _walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(tree):
        require(
            isinstance(key, str) and key != "" and "/" not in key,
            f"parameter name {key!r} under {prefix!r} must be text without '/'",
        )
        value = tree[key]
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict of leaves as ``{"a/b/c": leaf}``, sorted by name at every level."""
    return dict(_walk(tree))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of :func:`flatten`'s names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def checksum(flat: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata and, in name order, every tensor's name, type, shape and bytes."""
    described = {key: value for key, value in metadata.items() if key != CHECKSUM}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(flat):
        array = flat[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _store(name: str, value: Any, dtype: np.dtype | None) -> np.ndarray:
    """``value`` on the host, contiguous, floating types cast to ``dtype``; refuses what the cast would overflow."""
    array = np.asarray(jax.device_get(value))
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != dtype:
        largest = float(jnp.finfo(dtype).max)
        finite = np.abs(array[np.isfinite(array)].astype(np.float64))
        require(
            finite.size == 0 or float(finite.max()) <= largest,
            f"parameter {name} holds {finite.max() if finite.size else 0:g}, beyond the largest {dtype.name} "
            f"({largest:g}); store it as float32 or bfloat16",
        )
        array = array.astype(dtype)
    return np.ascontiguousarray(array).reshape(array.shape)


def save_params(
    path: str | os.PathLike,
    params: Mapping[str, Any],
    metadata: Mapping[str, str],
    dtype: str | None = None,
) -> None:
    """Write a nested dict of arrays as one safetensors file with a checksum.

    Args:
        path: the file; parent directories are made. It appears whole or not at all (temporary name, then rename).
        params: nested dict with text keys; leaves are arrays of any rank.
        metadata: text to text, kept in the file's header and covered by the checksum.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to store floating leaves as; None keeps their own type.

    Raises:
        ConfigError: an unknown ``dtype``, a value that it cannot hold, or a path that cannot be written.
    """
    require(dtype is None or dtype in STORAGE, f"storage type is {dtype!r}; accepted: {', '.join(STORAGE)}")
    kept = STORAGE[dtype] if dtype is not None else None
    flat = {name: _store(name, value, kept) for name, value in flatten(params).items()}
    header = {**metadata, CHECKSUM: checksum(flat, metadata)}
    target = pathlib.Path(path)
    # Hosts of a cluster may share the folder and the process number.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            safetensors.numpy.save_file(flat, temporary, metadata=header)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"weights cannot be written to {target}: {_reason(error)}") from error


def load_params(path: str | os.PathLike, dtype: Any = np.float32) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what :func:`save_params` wrote: ``(nested dict of numpy arrays, metadata)``.

    Args:
        path: the safetensors file.
        dtype: type of floating leaves after loading; None keeps the stored one.

    Raises:
        ConfigError: no such file, a truncated or changed one, or one that carries no checksum of ours.
    """
    source = pathlib.Path(path)
    require(source.exists(), f"weights file {source} does not exist")
    require(source.is_file(), f"weights file {source} is not a file")
    try:
        with safetensors.safe_open(str(source), framework="np") as file:
            header = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise ConfigError(f"weights file {source} is not a readable safetensors file: {_reason(error)}") from error
    stored = header.pop(CHECKSUM, None)
    require(stored is not None, f"weights file {source} carries no checksum; it was not written by causvid_jax")
    require(stored == checksum(flat, header), f"weights file {source} is corrupt: its checksum does not match")
    if dtype is not None:
        flat = {n: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for n, a in flat.items()}
    return unflatten(flat), header


def check_tree(params: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Refuse ``params`` unless its names and shapes are those of ``expected`` (leaves with a ``shape``).

    ``what`` names the owner in the message, for example ``"student weights out.safetensors"``.
    """
    have = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    want = {name: tuple(leaf.shape) for name, leaf in flatten(expected).items()}
    problems = []
    for kind, names in (
        ("missing", [n for n in want if n not in have]),
        ("unexpected", [n for n in have if n not in want]),
        ("misshapen", [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and have[n] != want[n]]),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{kind}: {', '.join(names[:3])}{rest}")
    require(not problems, f"{what} do not fit the configuration ({'; '.join(problems)})")


def _reason(error: Exception) -> str:
    """The error in a few words on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
