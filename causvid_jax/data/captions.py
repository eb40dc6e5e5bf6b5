"""Read lists of prompts, and list the videos of a folder with their captions."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from causvid_jax.config import ConfigError, require

VIDEO_SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip


TABLES, JSON = (".csv", ".tsv"), (".json", ".jsonl", ".ndjson")
PROMPT_KEYS = ("prompt", "prompt_en", "caption", "text")
CAPTION_KEYS = ("caption", "text", "prompt")
FILE_KEYS = ("file", "file_name", "video", "path")


@dataclasses.dataclass(frozen=True)
class Video:
    """A video: ``file`` relative to the folder of videos, ``caption`` ("": none), ``size`` in bytes (-1: no file)."""

    file: str
    caption: str
    size: int


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Return the prompts of a list.

    =========================  ====================================================================================
    ``.json``, ``.jsonl``      strings, or objects with a ``prompt`` (:data:`PROMPT_KEYS`): a list, or one per line,
    or ``.ndjson``             or a list under the name ``prompts`` of an object
    ``.csv``, ``.tsv``         a table with a header and a column ``prompt`` (:data:`PROMPT_KEYS`)
    ``.txt``                   one prompt per line
    anything else              JSON if its content is JSON, else one prompt per line
    =========================  ====================================================================================

    The text is UTF-8. Suffixes may be in any case. Order and repetitions are kept. White space around a prompt and
    empty lines are removed.

    Raises:
        ConfigError: no such file, a line that cannot be read, a control character, or no prompt at all.
    """
    path = _file(path, "prompt file")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        rows: Iterator[tuple[int, Any]] = _table(path, PROMPT_KEYS)
    elif suffix in JSON or (_is_json(path) and suffix != ".txt"):
        rows = _json(path)
    else:
        rows = iter(enumerate(_text(path).split("\n"), 1))
    prompts = []
    for line, value in rows:
        text = _first(value, PROMPT_KEYS) if isinstance(value, dict) else value
        _check_characters(text, f"{path}, line {line}")
        require(isinstance(text, str), f'{path}, line {line}: accepted: a JSON string or {{"prompt": "..."}}')
        prompts.append(str(text).strip())
    prompts = [prompt for prompt in prompts if prompt]
    require(bool(prompts), f"prompt file {path} holds no prompt; accepted: one per line, json, jsonl, csv or tsv")
    return prompts


def read_captions(path: str | os.PathLike) -> dict[str, str]:
    """Return the captions of a captions file by file name; "" for a missing caption.

    Every row of a table (``.csv``, ``.tsv``, with a header) or object of a JSON file (``.json``, ``.jsonl``,
    ``.ndjson``) has a ``file`` (:data:`FILE_KEYS`) and a ``caption`` (:data:`CAPTION_KEYS`). A JSON object may also map
    file names to captions.

    Raises:
        ConfigError: another kind of file, an entry without a file or with a caption that is no text, a table without
            one of the columns, a file that is named twice, or no entry.
    """
    path = _file(path, "captions file")
    suffix = path.suffix.lower()
    require(
        suffix in (*TABLES, *JSON),
        f"captions file {path} is of no accepted kind; accepted: {', '.join((*TABLES, *JSON))}",
    )
    captions: dict[str, str] = {}
    for line, row in _table(path, FILE_KEYS, CAPTION_KEYS) if suffix in TABLES else _json(path, pairs=True):
        name = _first(row, FILE_KEYS) if isinstance(row, dict) else None
        require(
            isinstance(name, str) and name.strip(),
            f"{path}, line {line}: no file is named; every entry has a file and a caption",
        )
        name, caption = str(name).strip(), _first(row, CAPTION_KEYS)
        _check_characters(name, f"{path}, line {line}")
        _check_characters(caption, f"{path}, line {line}")
        require(
            caption is None or isinstance(caption, str), f"{path}, line {line}: the caption is {caption!r}, no text"
        )
        require(name not in captions, f"{path}, line {line}: {name!r} is named twice; a video has one caption")
        captions[name] = (caption or "").strip()
    require(bool(captions), f"captions file {path} names no video")
    return captions


def list_videos(folder: str | os.PathLike, captions: str | os.PathLike | None = None) -> list[Video]:
    """Return the videos below ``folder`` and those that ``captions`` names, in the order of their names.

    Args:
        folder: searched recursively; a video is recognised by its suffix (:data:`VIDEO_SUFFIXES`).
        captions: a file for :func:`read_captions`, whose names are relative to ``folder`` (with ``/`` or ``\\``, in
            any Unicode form); None takes the text file beside each video (``a/b.mp4``: ``a/b.txt``).

    Raises:
        ConfigError: no such folder, no video, a captions file that cannot be read, or a name or a symbolic link that
            leaves the folder.
    """
    folder = pathlib.Path(folder)
    require(folder.is_dir(), f"video folder {folder} does not exist")
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    }
    if captions is None:
        caption_of = {name: _sidecar(folder / name) for name in files}
    else:
        caption_of = {}
        spelled = {unicodedata.normalize("NFC", name): name for name in files}
        for name, caption in read_captions(captions).items():
            file = _resolve(name, spelled)
            require(file not in caption_of, f"{captions}: {name!r} is named twice; a video has one caption")
            caption_of[file] = caption
    names = sorted(files | caption_of.keys())
    require(bool(names), f"video folder {folder} holds no video; accepted: files {', '.join(VIDEO_SUFFIXES)}")
    root = folder.resolve()
    for name in names:
        require(
            not os.path.isabs(name) and (folder / name).resolve().is_relative_to(root),
            f"video {name!r} is outside of the video folder {folder}; accepted: files below it",
        )
    return [Video(name, caption_of.get(name, ""), _size(folder / name)) for name in names]


def digest(values: Sequence[Any]) -> str:
    """Return 16 digits of the SHA-256 of JSON values, for the identity of a dataset."""
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


def _first(row: dict[str, Any], keys: Sequence[str]) -> Any:
    """Return the value of the first of ``keys`` that ``row`` has."""
    return next((row[key] for key in keys if key in row), None)


def _resolve(name: str, spelled: dict[str, str]) -> str:
    """Return the file on disk for ``name`` of a captions file; ``spelled`` maps normalised names to those on disk."""
    for spelling in (name, name.replace("\\", "/")):
        plain = os.path.normpath(spelling)
        file = spelled.get(unicodedata.normalize("NFC", plain))
        if file is not None:
            return file
    return os.path.normpath(name)


def _check_characters(text: Any, where: str) -> None:
    """Refuse text with a control character or half of a surrogate pair, which no tokenizer and no file name has."""
    letters = text if isinstance(text, str) else ""
    bad = [c for c in letters if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"]
    require(not bad, f"{where} has the character {bad and bad[0]!r}; accepted: text without control characters")


def _object(path: pathlib.Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, whose names must differ."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    require(twice is None, f"{path}: an object names {twice!r} twice; accepted: different names")
    return dict(pairs)


def _is_json(path: pathlib.Path) -> bool:
    text = _text(path).lstrip()
    if not text.startswith(("[", "{")):
        return False
    try:
        json.loads(text.split("\n")[0] if text.startswith("{") else text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _json(path: pathlib.Path, pairs: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a JSON list or of JSON lines; with ``pairs`` also of an object of file to caption."""
    text = _text(path)
    try:
        whole = json.loads(text, object_pairs_hook=functools.partial(_object, path))
    except (json.JSONDecodeError, RecursionError):
        yield from _json_lines(path, text)
        return
    if isinstance(whole, dict) and isinstance(whole.get("prompts"), list):
        whole = whole["prompts"]
    if pairs and isinstance(whole, dict) and not any(key in whole for key in FILE_KEYS):
        whole = [{"file": name, "caption": caption} for name, caption in whole.items()]
    yield from ((i, value) for i, value in enumerate(whole if isinstance(whole, list) else [whole], 1))


def _json_lines(path: pathlib.Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=functools.partial(_object, path))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {getattr(error, 'msg', error)}") from error


def _table(path: pathlib.Path, *columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a table; of every group in ``columns`` it must have one."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if not header:
                header = [name.strip().lower() for name in row]
                twice = {name for name in header if header.count(name) > 1}
                require(not twice, f"{path} has the columns {header}; a column may be named once")
                for group in columns:
                    require(set(group) & set(header), f"{path} has the columns {header}; it needs {' or '.join(group)}")
            elif row:
                require(
                    len(row) == len(header),
                    f"{path}, line {line} has {len(row)} fields and the header {len(header)}; a text with "
                    f"{delimiter!r} or quotes is put in double quotes",
                )
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}, line {line} is not a table row: {error}") from error
    require(bool(header), f"{path} is an empty table")
