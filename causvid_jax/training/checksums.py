"""Checksums of a checkpoint's files. They detect changed bits, which Orbax does not, before training continues.

``checksums.P-of-N.json`` in the checkpoint holds the SHA-256 of every chunk of 64 MiB that process P of N read:
every N-th chunk. One core takes about a second per GB, in the background after each save and once when a run starts.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

from causvid_jax.config.files import atomic_write

PIECE = 1 << 26
THREADS = 4


def _files(folder: pathlib.Path) -> dict[str, int]:
    """Return name and size of all files of a checkpoint except the checksums."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("checksums.", ".checksums."))
    }


def _pieces(sizes: dict[str, int], process: int, processes: int) -> list[tuple[str, int]]:
    """Return the chunks ``(file, number)`` that this process reads."""
    every = [(name, i) for name in sorted(sizes) for i in range(max(1, -(-sizes[name] // PIECE)))]
    return every[process::processes]


def _digest(path: pathlib.Path, piece: int) -> str:
    with open(path, "rb") as file:
        file.seek(piece * PIECE)
        remaining, digest = PIECE, hashlib.sha256()
        while remaining and (data := file.read(min(remaining, 1 << 20))):
            digest.update(data)
            remaining -= len(data)
    return digest.hexdigest()


def _digests(folder: pathlib.Path, pieces: list[tuple[str, int]]) -> Iterator[str]:
    # hashlib releases the interpreter lock, so the threads run in parallel.
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda piece: _digest(folder / piece[0], piece[1]), pieces)


def write(folder: str | os.PathLike, process: int = 0, processes: int = 1) -> None:
    """Write this process's part of the checksums of a finished checkpoint, atomically.

    Raises:
        OSError: the disk is full or fails.
    """
    folder = pathlib.Path(folder)
    sizes = _files(folder)
    pieces = _pieces(sizes, process, processes)
    entries = [[name, i, digest] for (name, i), digest in zip(pieces, _digests(folder, pieces), strict=True)]
    target = folder / f"checksums.{process}-of-{processes}.json"
    with atomic_write(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump({"piece": PIECE, "sizes": sizes, "sha256": entries}, file)
        file.flush()
        os.fsync(file.fileno())


def present(folder: str | os.PathLike) -> bool:
    """Return whether the checksums of a checkpoint are complete: every process that saved it wrote its part."""
    parts = sorted(pathlib.Path(folder).glob("checksums.*-of-*.json"))
    return bool(parts) and any(len(parts) == int(part.stem.rsplit("-", 1)[1]) for part in parts)


def problem(folder: str | os.PathLike, process: int = 0, processes: int = 1) -> str | None:
    """Describe the damage in the chunks of a checkpoint that this process reads, or return None.

    The sentence names the file: "state/d/0f1e is 100 bytes instead of 4096", "... is missing", "... has changed".
    """
    folder = pathlib.Path(folder)
    sizes: dict[str, int] = {}
    expected: dict[tuple[str, int], str] = {}
    for part in sorted(folder.glob("checksums.*-of-*.json")):
        try:
            manifest = json.loads(part.read_text(encoding="utf-8"))
            if manifest["piece"] != PIECE:
                raise ValueError
            sizes |= manifest["sizes"]
            expected |= {(name, i): digest for name, i, digest in manifest["sha256"]}
        except (ValueError, KeyError, TypeError):
            return f"{part.name} is not readable"
    have = _files(folder)
    for name, size in sizes.items():
        if name not in have:
            return f"{name} is missing"
        if have[name] != size:
            return f"{name} is {have[name]} bytes instead of {size}"
    # Check that a damaged name or number in the manifest does not exclude a chunk.
    if set(expected) != set(_pieces(sizes, 0, 1)):
        return "the checksums do not cover every file"
    pieces = _pieces(sizes, process, processes)
    for (name, i), digest in zip(pieces, _digests(folder, pieces), strict=True):
        if digest != expected[name, i]:
            return f"{name} has changed"
    return None
