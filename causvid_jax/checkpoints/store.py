"""Parameter trees as safetensors files: flat names, storage types, a checksum, one-sentence errors."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from causvid_jax.checkpoints import files
from causvid_jax.checkpoints.files import CHECKSUM
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
    digest = files.Digest(metadata)
    for name in sorted(flat):
        array = flat[name]
        digest.begin(name, array.dtype, array.shape)
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def verify(path: str | os.PathLike) -> None:
    """Compare a file of :func:`save_params` with its checksum, in the memory of one buffer.

    Raises:
        ConfigError: an unreadable or changed file, or one that carries no checksum of ours.
    """
    tensors, metadata = files.open_safetensors(path)
    stored, digest = metadata.get(CHECKSUM), files.Digest(metadata)
    require(stored is not None, f"weights file {path} carries no checksum; it was not written by causvid_jax")
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.begin(name, tensor.dtype, tensor.shape)
        step = files.BUFFER // tensor.dtype.itemsize
        for start in range(0, int(np.prod(tensor.shape, dtype=np.int64)), step):
            with tensor.view() as array:
                digest.update(array.reshape(-1)[start : start + step])
    require(stored == digest.hexdigest(), f"weights file {path} is corrupt: its checksum does not match")


def cast(name: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """``array``, floating types cast to ``dtype``; refuses what the cast would overflow."""
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
    """The type that ``dtype`` names, None for None; ConfigError if it is none of :data:`STORAGE`."""
    require(dtype is None or dtype in STORAGE, f"storage type is {dtype!r}; accepted: {', '.join(STORAGE)}")
    return STORAGE[dtype] if dtype is not None else None


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
    kept = storage_type(dtype)
    flat = {name: cast(name, np.asarray(jax.device_get(leaf)), kept) for name, leaf in flatten(params).items()}
    layout = {name: (array.shape, array.dtype) for name, array in flat.items()}
    files.write_safetensors(path, layout, lambda name: (flat[name],), metadata, checksum=True)


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
        raise ConfigError(f"weights file {source} is not a readable safetensors file: {files.reason(error)}") from error
    stored = header.pop(CHECKSUM, None)
    require(stored is not None, f"weights file {source} carries no checksum; it was not written by causvid_jax")
    require(stored == checksum(flat, header), f"weights file {source} is corrupt: its checksum does not match")
    if dtype is not None:
        flat = {n: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a for n, a in flat.items()}
    return unflatten(flat), header


def stored_checksum(path: str | os.PathLike) -> str:
    """The checksum that a file of :func:`save_params` carries, as it stands there: who the weights are.

    Raises:
        ConfigError: an unreadable file, or one that carries no checksum of ours.
    """
    return _open_own(path)[1]


def check_file(path: str | os.PathLike, expected: Mapping[str, Any], what: str) -> dict[str, str]:
    """Refuse a file of :func:`save_params` whose names and shapes are not those of ``expected``; its metadata.

    Nothing but the header is read. ``what`` as in :func:`check_tree`.
    """
    tensors, _, metadata = _open_own(path)
    check_tree(unflatten(tensors), expected, what)
    return metadata


def load_arrays(
    path: str | os.PathLike, expected: Mapping[str, Any], what: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what :func:`save_params` wrote straight onto the default device, in the types asked for.

    The host holds one array at a time, so that a tree of 11 GB needs 11 GB in all.

    Args:
        path: the safetensors file.
        expected: nested dict of leaves with ``shape`` and ``dtype``: what the file must hold, and what floating arrays
            become.
        what: as in :func:`check_tree`.

    Returns:
        (nested dict of ``jax.Array``, metadata).

    Raises:
        ConfigError: an unreadable or changed file, one of other names or shapes, or a value beyond its type.
    """
    tensors, stored, metadata = _open_own(path)
    check_tree(unflatten(tensors), expected, what)
    want, digest, flat = flatten(expected), files.Digest(metadata), {}
    for name in sorted(tensors):
        digest.begin(name, tensors[name].dtype, tensors[name].shape)
        flat[name] = jax.device_put(_read(name, tensors[name], want[name].dtype, digest))
        flat[name].block_until_ready()
    require(stored == digest.hexdigest(), f"weights file {path} is corrupt: its checksum does not match")
    return unflatten(flat), metadata


def load_sharded(
    path: str | os.PathLike, expected: Mapping[str, Any], shardings: Mapping[str, Any], what: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what :func:`save_params` wrote onto a mesh: each process the parts of its own devices, array by array.

    A part is looked at through a memory map, once, however many devices of the process hold it. What is split along its
    last axis lies scattered in the file, so all pages of it pass, but none stays. The checksum is that of the whole
    file: :func:`verify` it first, in one process.

    Args:
        path: the safetensors file.
        expected: as in :func:`load_arrays`.
        shardings: nested dict of a ``jax.sharding.Sharding`` for each of them.
        what: as in :func:`check_tree`.

    Returns:
        (nested dict of global ``jax.Array``, metadata).

    Raises:
        ConfigError: an unreadable file, one of other names or shapes, or a value beyond its type.
    """
    tensors, _, metadata = _open_own(path)
    check_tree(unflatten(tensors), expected, what)
    want, places = flatten(expected), flatten(shardings)

    def place(name: str) -> jax.Array:
        seen: dict[str, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            if str(index) not in seen:
                seen[str(index)] = _read_part(name, tensors[name], index, want[name].dtype)
            return seen[str(index)]

        return jax.make_array_from_callback(tensors[name].shape, places[name], part).block_until_ready()

    return unflatten({name: place(name) for name in sorted(tensors)}), metadata


def _read_part(name: str, tensor: files.Tensor, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    with tensor.view() as array:
        return np.array(cast(name, array[index], np.dtype(dtype)))


def _open_own(path: str | os.PathLike) -> tuple[dict[str, files.Tensor], str, dict[str, str]]:
    """(tensors, checksum, the other metadata) of a file of ours."""
    tensors, metadata = files.open_safetensors(path)
    stored = metadata.pop(CHECKSUM, None)
    if stored is None:
        raise ConfigError(f"weights file {path} carries no checksum; it was not written by causvid_jax")
    return tensors, stored, metadata


def _read(name: str, tensor: files.Tensor, dtype: Any, digest: files.Digest) -> np.ndarray:
    """The tensor as ``dtype``, piece by piece through the digest."""
    out = np.empty(tensor.shape, dtype)
    flat, step = out.reshape(-1), files.BUFFER // tensor.dtype.itemsize
    with tensor.view() as array:
        raw = array.reshape(-1)
        for start in range(0, raw.size, step):
            piece = raw[start : start + step]
            digest.update(piece)
            flat[start : start + step] = cast(name, piece, out.dtype)
    return out


def check_tree(params: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Refuse ``params`` unless its names and shapes are those of ``expected`` (leaves with a ``shape``).

    ``what`` names the owner in the message, for example ``"student weights out.safetensors"``.
    """
    have = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    want = {name: tuple(leaf.shape) for name, leaf in flatten(expected).items()}
    problems = misfit(have, want)
    require(not problems, f"{what} do not fit the configuration ({problems})")


def misfit(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], most: int = 3) -> str:
    """What is missing, unexpected or misshapen in ``have``, up to ``most`` names of each; empty if nothing is."""
    problems = []
    for kind, names in (
        ("missing", [n for n in want if n not in have]),
        ("unexpected", [n for n in have if n not in want]),
        ("misshapen", [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and have[n] != want[n]]),
    ):
        if names:
            rest = f" and {len(names) - most} more" if len(names) > most else ""
            problems.append(f"{kind}: {', '.join(names[:most])}{rest}")
    return "; ".join(problems)
