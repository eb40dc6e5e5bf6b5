"""Weight files piece by piece: tensors that are read when looked at, files that are written as they are computed.

A file of 57 GB passes through a process of a few hundred MiB: the safetensors header says where every tensor lies, a
tensor is a memory map of its own bytes, and a new file's header follows from shapes alone. What is being written stands
under a temporary name, locked; a process that is killed leaves only that, and the next one removes it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
import safetensors

from causvid_jax.config import ConfigError, require

CHECKSUM = "sha256"
BUFFER = 1 << 24

# safetensors' own names of types.
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
    """A tensor in a file: its shape and type are known, its bytes are read while a :meth:`view` is looked at."""

    shape: tuple[int, ...]
    dtype: np.dtype
    _open: Callable[[], contextlib.AbstractContextManager[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self) -> contextlib.AbstractContextManager[np.ndarray]:
        """``with tensor.view() as array``: the array, of which only what is used is read, and given up at the end."""
        return self._open()


def _mapped(path: pathlib.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    @contextlib.contextmanager
    def view() -> Iterator[np.ndarray]:
        if 0 in shape:
            yield np.zeros(shape, dtype)
        else:
            # One map per look: what was read leaves this process's memory with it.
            yield np.memmap(path, dtype, "r", offset, shape or (1,)).reshape(shape)

    return Tensor(shape, dtype, view)


def open_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; nothing but its header is read.

    Raises:
        ConfigError: no such file, a truncated or malformed one, or a type of element that NumPy cannot hold.
    """
    source = pathlib.Path(path)
    require(source.exists(), f"weights file {source} does not exist")
    require(source.is_file(), f"weights file {source} is not a file")
    try:
        # The library checks that the header is sound and that its tensors fill the file exactly.
        with safetensors.safe_open(str(source), framework="np"):
            pass
        with open(source, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, safetensors.SafetensorError, UnicodeDecodeError, ValueError, struct.error) as error:
        raise ConfigError(f"weights file {source} is not a readable safetensors file: {reason(error)}") from error
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        code = entry["dtype"]
        require(code in TYPES, f"tensor {name} of {source} is of type {code}; accepted: {', '.join(TYPES)}")
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = _mapped(source, offset, tuple(entry["shape"]), TYPES[code])
    return tensors, metadata


class Digest:
    """SHA-256 over the metadata and, in name order, every tensor's name, type, shape and bytes."""

    def __init__(self, metadata: Mapping[str, str]):
        described = {key: value for key, value in metadata.items() if key != CHECKSUM}
        self._hash = hashlib.sha256(json.dumps(described, sort_keys=True).encode())

    def begin(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """The next tensor; its bytes follow by :meth:`update`."""
        self._hash.update(f"{name} {dtype.name} {shape}".encode())

    def update(self, piece: np.ndarray) -> None:
        """Some more of the tensor, contiguous."""
        self._hash.update(_raw(piece))

    def hexdigest(self) -> str:
        """What is stored under ``sha256``."""
        return self._hash.hexdigest()


def write_safetensors(
    path: str | os.PathLike,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    pieces: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str],
    checksum: bool,
) -> None:
    """Write a safetensors file tensor by tensor, whole or not at all.

    Args:
        path: the file, replaced when the new one is complete.
        layout: shape and type of every tensor.
        pieces: of a name, the tensor's elements in row-major order, in as many arrays as is convenient. Asked in name
            order, one tensor after the other.
        metadata: text to text, kept in the header.
        checksum: whether to add the :class:`Digest` of the content.

    Raises:
        ConfigError: the place cannot be written.
    """
    # Wide types first, so that every tensor is aligned to its element.
    offsets, end = {}, 0
    for name in sorted(layout, key=lambda n: (-layout[n][1].itemsize, n)):
        shape, dtype = layout[name]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        offsets[name], end = (end, end + size), end + size

    def header(digest: str) -> bytes:
        described = {**metadata, CHECKSUM: digest} if checksum else dict(metadata)
        entries = {
            name: {"dtype": _CODES[layout[name][1]], "shape": list(layout[name][0]), "data_offsets": list(span)}
            for name, span in offsets.items()
        }
        text = json.dumps({"__metadata__": described, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    # The digest is known last but stands first: hold its place.
    start, digest = len(header("0" * 64)), Digest(metadata)
    with staged(path) as temporary, open(temporary, "r+b") as file:
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


@contextlib.contextmanager
def staged(target: str | os.PathLike, directory: bool = False) -> Iterator[pathlib.Path]:
    """A temporary file (or directory) beside ``target`` that becomes it when the block ends well, and goes otherwise.

    It is locked while it is written, so that the temporaries of a process that was killed can be told from those of one
    that runs; the former are removed here. A target directory must be absent or empty.

    Raises:
        ConfigError: the place cannot be written.
    """
    target = pathlib.Path(target)
    # Hosts of a cluster may share the folder and the process number.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        if directory:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        lock = os.open(temporary, os.O_RDONLY)
        try:
            # Where files cannot be locked none can be told to be abandoned, and none is removed.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
            os.replace(temporary, target)
        finally:
            _remove(temporary)
            os.close(lock)
    except OSError as error:
        raise ConfigError(f"weights cannot be written to {target}: {reason(error)}") from error


def _remove_abandoned(target: pathlib.Path) -> None:
    for old in target.parent.glob(f".{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            lock = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(old)
            finally:
                os.close(lock)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _raw(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def in_words(size: int) -> str:
    """A number of bytes for people: 57.15 GB, 3.2 MB, 640 bytes."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def reason(error: BaseException) -> str:
    """An error in a few words on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
