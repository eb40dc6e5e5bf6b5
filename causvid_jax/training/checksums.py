"""Checksums of a checkpoint's files: what Orbax does not notice, a flipped bit, is found before it is trained on.

SHA-256 of every piece of 64 MiB, in ``checksums.P-of-N.json`` inside the checkpoint: process P of N reads every N-th
piece, so that a checkpoint of many hosts costs each its share. On one core this takes about a second per GB; a run pays
for it in the background after each save, and once when it starts.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

PIECE = 1 << 26
THREADS = 4


def _files(folder: pathlib.Path) -> dict[str, int]:
    """Name and size of all files of a checkpoint but the checksums."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("checksums.", ".checksums."))
    }


def _pieces(sizes: dict[str, int], process: int, processes: int) -> list[tuple[str, int]]:
    """The pieces ``(file, number)`` that fall to this process."""
    every = [(name, i) for name in sorted(sizes) for i in range(max(1, -(-sizes[name] // PIECE)))]
    return every[process::processes]


def _digest(path: pathlib.Path, piece: int) -> str:
    with open(path, "rb") as file:
        file.seek(piece * PIECE)
        left, digest = PIECE, hashlib.sha256()
        while left and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _digests(folder: pathlib.Path, pieces: list[tuple[str, int]]) -> Iterator[str]:
    # hashlib lets go of the interpreter, so threads do run side by side.
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda piece: _digest(folder / piece[0], piece[1]), pieces)


def write(folder: str | os.PathLike, process: int = 0, processes: int = 1) -> None:
    """Write this process's part of the checksums of a finished checkpoint; it appears whole or not at all."""
    folder = pathlib.Path(folder)
    sizes = _files(folder)
    pieces = _pieces(sizes, process, processes)
    found = [[name, i, digest] for (name, i), digest in zip(pieces, _digests(folder, pieces), strict=True)]
    target = folder / f"checksums.{process}-of-{processes}.json"
    temporary = folder / f".{target.name}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"piece": PIECE, "sizes": sizes, "sha256": found}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def present(folder: str | os.PathLike) -> bool:
    """Whether the checksums of a checkpoint are complete: all processes that saved it wrote their part."""
    parts = sorted(pathlib.Path(folder).glob("checksums.*-of-*.json"))
    return bool(parts) and any(len(parts) == int(part.stem.rsplit("-", 1)[1]) for part in parts)


def problem(folder: str | os.PathLike, process: int = 0, processes: int = 1) -> str | None:
    """What is wrong with a checkpoint, as far as this process's share of its pieces shows; None if nothing is.

    The answer names the file: "state/d/0f1e is 100 bytes instead of 4096", "... is missing", "... has changed".
    """
    folder = pathlib.Path(folder)
    sizes: dict[str, int] = {}
    expected: dict[tuple[str, int], str] = {}
    for part in sorted(folder.glob("checksums.*-of-*.json")):
        try:
            given = json.loads(part.read_text(encoding="utf-8"))
            if given["piece"] != PIECE:
                raise ValueError
            sizes |= given["sizes"]
            expected |= {(name, i): digest for name, i, digest in given["sha256"]}
        except (ValueError, KeyError, TypeError):
            return f"{part.name} is not readable"
    have = _files(folder)
    for name, size in sizes.items():
        if name not in have:
            return f"{name} is missing"
        if have[name] != size:
            return f"{name} is {have[name]} bytes instead of {size}"
    # A damaged name or number in the manifest must not leave a piece unchecked.
    if set(expected) != set(_pieces(sizes, 0, 1)):
        return "the checksums do not cover every file"
    pieces = _pieces(sizes, process, processes)
    for (name, i), digest in zip(pieces, _digests(folder, pieces), strict=True):
        if digest != expected[name, i]:
            return f"{name} has changed"
    return None
