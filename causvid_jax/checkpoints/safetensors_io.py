"""Read safetensors files lazily and write them tensor by tensor.

``safetensors.safe_open`` validates a file. Its tensors are then memory-mapped one by one: the library's NumPy slices
lack bfloat16, and its single map of the whole file keeps every page that was read. A process with a few hundred MiB of
memory can thus convert a file of 57 GB.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
import safetensors

from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import atomic, reason

CHECKSUM = "sha256"
BUFFER = 1 << 24
_LARGEST_HEADER = 100_000_000

# Element types by their names in safetensors files.
TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in TYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: of the array.
        dtype: of the array.
        view: returns a context manager that yields the array. Only the slices that are used are read from the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    view: Callable[[], contextlib.AbstractContextManager[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def reshape(self, shape: tuple[int, ...]) -> "Tensor":
        """Return the same elements in another shape."""

        @contextlib.contextmanager
        def view() -> Iterator[np.ndarray]:
            with self.view() as array:
                yield array.reshape(shape)

        return Tensor(shape, self.dtype, view)


def array_tensor(array: np.ndarray) -> Tensor:
    """Wrap an array in memory as a :class:`Tensor`."""
    return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: contextlib.nullcontext(array))


def sample_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of every tensor's name, shape, type, and first and last 4 KiB, in name order.

    Large files are not read completely.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype.name}".encode())
        with tensor.view() as array:
            flat, size = array.reshape(-1), 4096 // tensor.dtype.itemsize
            digest.update(flat[:size].tobytes() + flat[-size:].tobytes())
    return digest.hexdigest()


class _Descriptor:
    """An open file, closed after the last tensor that reads it. A file that replaces it is not read."""

    def __init__(self, path: pathlib.Path):
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


def _mapped(opened: _Descriptor, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    @contextlib.contextmanager
    def view() -> Iterator[np.ndarray]:
        if 0 in shape:
            yield np.zeros(shape, dtype)
        else:
            # One map per view, so that its pages leave the process's memory with it.
            with os.fdopen(os.dup(opened.number), "rb") as file:
                array = np.memmap(file, dtype, "r", offset, shape or (1,)).reshape(shape)
            yield array
            del array

    return Tensor(shape, dtype, view)


def open_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Only its header is read.

    Raises:
        ConfigError: there is no such file, it is truncated or malformed, or its element type is not in :data:`TYPES`.
    """
    source = pathlib.Path(path)
    require(source.exists(), f"weights file {source} does not exist")
    require(source.is_file(), f"weights file {source} is not a file")
    try:
        # The library checks that the header is sound and that the tensors fill the file exactly.
        with safetensors.safe_open(str(source), framework="np"):
            pass
        opened = _Descriptor(source)
        (length,) = struct.unpack("<Q", os.pread(opened.number, 8, 0))
        header = json.loads(os.pread(opened.number, min(length, _LARGEST_HEADER), 8))
        metadata = header.pop("__metadata__", None) or {}
        entries = [
            (name, entry["dtype"], tuple(map(int, entry["shape"])), int(entry["data_offsets"][0]))
            for name, entry in header.items()
        ]
    except (OSError, safetensors.SafetensorError, ValueError, struct.error, RecursionError) as error:
        raise ConfigError(f"weights file {source} is not a readable safetensors file: {reason(error)}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"weights file {source} is not a readable safetensors file: malformed header") from error
    tensors = {}
    for name, code, shape, offset in entries:
        require(code in TYPES, f"tensor {name} of {source} is of type {code}; accepted: {', '.join(TYPES)}")
        tensors[name] = _mapped(opened, 8 + length + offset, shape, TYPES[code])
    return tensors, metadata


class Digest:
    """SHA-256 over the metadata and, in name order, every tensor's name, type, shape and bytes."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        content = {key: value for key, value in metadata.items() if key != CHECKSUM}
        self._hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode())

    def begin(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """Start the next tensor; its bytes follow by :meth:`update`."""
        self._hash.update(f"{name} {dtype.name} {shape}".encode())

    def update(self, piece: np.ndarray) -> None:
        """Add a contiguous piece of the tensor."""
        self._hash.update(_raw(piece))

    def hexdigest(self) -> str:
        """Return the checksum, which files store as the metadata :data:`CHECKSUM`."""
        return self._hash.hexdigest()


def write_safetensors(
    path: str | os.PathLike,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    pieces: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str],
    checksum: bool,
) -> None:
    """Write a safetensors file tensor by tensor, atomically.

    Args:
        path: the file; it is replaced when the new one is complete.
        layout: name to (shape, type) of every tensor.
        pieces: returns the elements of the tensor of a name in row-major order, in any number of arrays. It is called
            in name order.
        metadata: text to text, stored in the header.
        checksum: whether to add the :class:`Digest` of the content to the metadata.

    Raises:
        ConfigError: the file cannot be written.
        TypeError, ValueError: ``pieces`` gives another type or number of elements than ``layout``.
    """
    # Wide types first, so that every tensor is aligned to its element.
    offsets, end = {}, 0
    for name in sorted(layout, key=lambda n: (-layout[n][1].itemsize, n)):
        shape, dtype = layout[name]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        offsets[name], end = (end, end + size), end + size

    def header(digest: str) -> bytes:
        content = {**metadata, CHECKSUM: digest} if checksum else dict(metadata)
        entries = {
            name: {"dtype": _CODES[layout[name][1]], "shape": list(layout[name][0]), "data_offsets": list(span)}
            for name, span in offsets.items()
        }
        text = json.dumps({"__metadata__": content, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    # The digest is computed last but stored first, so write a placeholder of its length.
    start, digest = len(header("0" * 64)), Digest(metadata)
    with atomic(path) as temporary, open(temporary, "r+b") as file:
        file.truncate(start + end)
        for name in sorted(layout):
            first, last = offsets[name]
            file.seek(start + first)
            digest.begin(name, layout[name][1], layout[name][0])
            for piece in pieces(name):
                if piece.dtype != layout[name][1]:
                    raise TypeError(f"a piece of {name} is {piece.dtype}, declared {layout[name][1]}")
                piece = np.ascontiguousarray(piece)
                file.write(_raw(piece))
                if checksum:
                    digest.update(piece)
            if file.tell() != start + last:
                raise ValueError(f"{name} came to {file.tell() - start - first} bytes, declared {last - first}")
        file.seek(0)
        file.write(header(digest.hexdigest()))
        file.flush()
        os.fsync(file.fileno())


def _raw(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
