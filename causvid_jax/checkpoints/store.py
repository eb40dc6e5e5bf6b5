"""Read and write our own files: a parameter tree under flat names, with a checksum, in one safetensors file."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints import safetensors_io
from causvid_jax.checkpoints.safetensors_io import CHECKSUM, Tensor
from causvid_jax.config import ConfigError, require

STORAGE: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": jnp.dtype(jnp.bfloat16),
}


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
    """Return a nested dict of leaves as ``{"a/b/c": leaf}``, sorted by name at every level.

    Raises:
        ConfigError: a name that is empty, no text, or contains "/".
    """
    return dict(_walk(tree))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of ``{"a/b/c": leaf}``; the inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            require(isinstance(node, dict), f"parameter name {name!r} lies below another parameter")
        node[last] = value
    return tree


def checksum(flat: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Return the checksum of a file with these tensors and metadata (:class:`safetensors_io.Digest`)."""
    digest = safetensors_io.Digest(metadata)
    for name in sorted(flat):
        array = flat[name]
        digest.begin(name, array.dtype, array.shape)
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def verify(path: str | os.PathLike) -> None:
    """Compare the content of a file of :func:`save_params` with its checksum, one buffer of 16 MiB at a time.

    Raises:
        ConfigError: the file is unreadable, has no checksum of ours, or was changed.
    """
    tensors, expected, metadata = open_own(path)
    digest = safetensors_io.Digest(metadata)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.begin(name, tensor.dtype, tensor.shape)
        step = safetensors_io.BUFFER // tensor.dtype.itemsize
        for start in range(0, int(np.prod(tensor.shape, dtype=np.int64)), step):
            with tensor.view() as array:
                digest.update(array.reshape(-1)[start : start + step])
    require(expected == digest.hexdigest(), f"weights file {path} is corrupt: its checksum does not match")


def open_own(path: str | os.PathLike) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """Return (tensors, checksum, the other metadata) of our own file.

    Raises:
        ConfigError: the file is unreadable or has no checksum of ours.
    """
    tensors, metadata = safetensors_io.open_safetensors(path)
    file_checksum = metadata.pop(CHECKSUM, None)
    if file_checksum is None:
        raise ConfigError(f"weights file {path} has no checksum; it was not written by causvid_jax")
    return tensors, file_checksum, metadata


def cast(name: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Return ``array`` as ``dtype`` if its type is floating and ``dtype`` is not None, else unchanged.

    Raises:
        ConfigError: a finite value beyond the range of ``dtype``. ``name`` is the parameter's name in the message.
    """
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if array.dtype.itemsize >= dtype.itemsize and not np.isfinite(narrow).all():
        finite = np.abs(array[np.isfinite(array)].astype(np.float64))
        require(
            np.isfinite(narrow[np.isfinite(array)]).all(),
            f"parameter {name} holds {finite.max() if finite.size else 0:g}, beyond the largest {dtype.name} "
            f"({float(jnp.finfo(dtype).max):g}); store it as float32 or bfloat16",
        )
    return narrow


def storage_type(dtype: str | None) -> np.dtype | None:
    """Return the type of the name ``dtype``, None for None; raise a ConfigError if it is not in :data:`STORAGE`."""
    require(dtype is None or dtype in STORAGE, f"storage type is {dtype!r}; accepted: {', '.join(STORAGE)}")
    return STORAGE[dtype] if dtype is not None else None


def save_params(
    path: str | os.PathLike,
    params: Mapping[str, Any],
    metadata: Mapping[str, str],
    dtype: str | None = None,
) -> None:
    """Write a nested dict of arrays as one safetensors file with a checksum, atomically.

    Args:
        path: the file; its folder is created.
        params: nested dict with text keys; leaves are arrays of any rank.
        metadata: text to text, stored in the file's header and covered by the checksum.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` for floating leaves; None keeps their own types.

    Raises:
        ConfigError: ``dtype`` is unknown or cannot hold a value, or the path cannot be written.
    """
    storage = storage_type(dtype)
    flat = {name: cast(name, np.asarray(jax.device_get(leaf)), storage) for name, leaf in flatten(params).items()}
    layout = {name: (array.shape, array.dtype) for name, array in flat.items()}
    safetensors_io.write_safetensors(path, layout, lambda name: (flat[name],), metadata, checksum=True)


def load_params(path: str | os.PathLike, dtype: Any = np.float32) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a file of :func:`save_params` into host memory.

    Args:
        path: the safetensors file.
        dtype: type of floating leaves; None keeps the stored types.

    Returns:
        (nested dict of NumPy arrays, metadata).

    Raises:
        ConfigError: the file is unreadable, has no checksum of ours or was changed, or a tensor holds a NaN or an
            infinity.
    """
    verify(path)
    tensors, _, metadata = open_own(path)
    flat = {}
    for name, tensor in tensors.items():
        floating = jnp.issubdtype(tensor.dtype, jnp.floating)
        with tensor.view() as array:
            flat[name] = np.array(array, dtype if floating else None)
        finite = not floating or np.isfinite(flat[name]).all()
        require(bool(finite), f"tensor {name} of {path} holds a NaN or an infinity; the file is unusable")
    return unflatten(flat), metadata


def misfit(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]) -> str:
    """Return a text with missing and unexpected names and other shapes in ``have``, up to three of each; "" for none.

    Both arguments map names to shapes.
    """
    problems, most = [], 3
    for kind, names in (
        ("missing", [n for n in want if n not in have]),
        ("unexpected", [n for n in have if n not in want]),
        ("misshapen", [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and have[n] != want[n]]),
    ):
        if names:
            rest = f" and {len(names) - most} more" if len(names) > most else ""
            problems.append(f"{kind}: {', '.join(names[:most])}{rest}")
    return "; ".join(problems)
