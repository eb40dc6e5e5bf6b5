"""Write files atomically; put sizes and errors in words. Every room may import this module."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from causvid_jax.config.errors import ConfigError


@contextlib.contextmanager
def atomic(target: str | os.PathLike, directory: bool = False) -> Iterator[pathlib.Path]:
    """Yield a temporary file (or directory) beside ``target`` and rename it to ``target`` when the block succeeds.

    If the block raises, the temporary is removed. It is locked while it is written, so the next call can tell and
    remove the temporary of a killed process. An existing target directory must be empty.

    Raises:
        ConfigError: the folder cannot be written.
    """
    target = pathlib.Path(target)
    # The hosts of a cluster may share both the folder and the process number.
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
            # On file systems without locks no temporary can be recognised as abandoned, so none is removed.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
            os.replace(temporary, target)
        finally:
            _remove(temporary)
            os.close(lock)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {reason(error)}") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file that appears complete or not at all; errors as of :func:`atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _remove_abandoned(target: pathlib.Path) -> None:
    """Remove temporaries of ``target`` that no process has locked."""
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


def format_bytes(size: int) -> str:
    """Return a number of bytes for people: 57.15 GB, 3.2 MB, 640 bytes."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def reason(error: BaseException) -> str:
    """Return an error's message on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
