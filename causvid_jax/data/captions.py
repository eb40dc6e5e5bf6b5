"""Lists that people write: prompts, one per line or jsonl, and the captions of a folder of videos."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from causvid_jax.config import ConfigError, require

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")


@dataclasses.dataclass(frozen=True)
class Video:
    """A video to read: ``file`` relative to its folder, its caption ("" if it has none), its size (-1: no file)."""

    file: str
    caption: str
    size: int


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a list: one per line, or in a ``.jsonl`` file one JSON string or ``{"prompt": ...}`` per line.

    White space around a prompt and empty lines mean nothing; order and repetitions are kept.

    Raises:
        ConfigError: no such file, a line that cannot be read, or no prompt at all.
    """
    path = _file(path, "prompt file")
    if path.suffix == ".jsonl":
        prompts = []
        for line, value in _json_lines(path):
            text = value.get("prompt") if isinstance(value, dict) else value
            require(isinstance(text, str), f'{path}, line {line}: accepted: a JSON string or {{"prompt": "..."}}')
            prompts.append(str(text))
    else:
        prompts = _text(path).split("\n")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    require(bool(prompts), f"prompt file {path} holds no prompt; accepted: one per line, or jsonl")
    return prompts


def read_captions(path: str | os.PathLike) -> dict[str, str]:
    """File name to caption, of a ``.csv`` with a header or a ``.jsonl``; both have ``file`` and ``caption``.

    Raises:
        ConfigError: another kind of file, one of the two missing, or a file that is named twice.
    """
    path = _file(path, "captions file")
    require(path.suffix in (".csv", ".jsonl"), f"captions file {path} is neither of the accepted kinds: .csv, .jsonl")
    captions: dict[str, str] = {}
    for line, row in _csv_rows(path) if path.suffix == ".csv" else _json_lines(path):
        given = isinstance(row, dict) and isinstance(row.get("file"), str) and row["file"].strip()
        require(given, f"{path}, line {line}: no file is named; every line has a file and a caption")
        name, caption = row["file"].strip(), row.get("caption")
        require(
            caption is None or isinstance(caption, str), f"{path}, line {line}: the caption is {caption!r}, no text"
        )
        require(name not in captions, f"{path}, line {line}: {name!r} comes a second time; a video has one caption")
        captions[name] = (caption or "").strip()
    require(bool(captions), f"captions file {path} names no video")
    return captions


def list_videos(folder: str | os.PathLike, captions: str | os.PathLike | None = None) -> list[Video]:
    """The videos below ``folder`` and those that ``captions`` names, by name.

    Args:
        folder: searched to the bottom; a video is known by its suffix (:data:`VIDEO_SUFFIXES`).
        captions: a file for :func:`read_captions`, its names relative to ``folder``; None takes the text file beside
            each video (``a/b.mp4``: ``a/b.txt``).

    Raises:
        ConfigError: no such folder, no video, or a captions file that cannot be read.
    """
    folder = pathlib.Path(folder)
    require(folder.is_dir(), f"video folder {folder} does not exist")
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    }
    if captions is None:
        given = {name: _sidecar(folder / name) for name in found}
    else:
        given = {os.path.normpath(name): caption for name, caption in read_captions(captions).items()}
    names = sorted(found | given.keys())
    require(bool(names), f"video folder {folder} holds no video; accepted: files {', '.join(VIDEO_SUFFIXES)}")
    return [Video(name, given.get(name, ""), _size(folder / name)) for name in names]


def digest(values: Sequence[Any]) -> str:
    """A short digest of JSON values, for a dataset's identity."""
    state = hashlib.sha256()
    for value in values:
        state.update(json.dumps(value).encode() + b"\n")
    return state.hexdigest()[:16]


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _sidecar(video: pathlib.Path) -> str:
    path = video.with_suffix(".txt")
    return " ".join(_text(path).split()) if path.is_file() else ""


def _file(path: str | os.PathLike, what: str) -> pathlib.Path:
    path = pathlib.Path(path)
    require(path.is_file(), f"{what} {path} does not exist")
    return path


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _json_lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {error.msg}") from error


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    columns = reader.fieldnames or []
    require({"file", "caption"} <= set(columns), f"{path} has the columns {list(columns)}; it needs file and caption")
    for row in reader:
        yield reader.line_num, row
