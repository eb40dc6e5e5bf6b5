"""Write files atomically; format sizes and error messages; return the host's memory. Every room may import this."""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from causvid_jax.config.errors import ConfigError, RunError

_HELD = (errno.EAGAIN, errno.EACCES)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def atomic(target: str | os.PathLike, directory: bool = False) -> Iterator[pathlib.Path]:
    """Do the same as :func:`atomic_write`, but raise a ConfigError that names ``target`` instead of an OSError."""
    try:
        with atomic_write(target, directory) as temporary:
            yield temporary
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def atomic_write(target: str | os.PathLike, directory: bool = False) -> Iterator[pathlib.Path]:
    """Yield a temporary file (or directory) beside ``target`` and rename it to ``target`` when the block succeeds.

    The folder of ``target`` is created. If the block raises, the temporary is removed. The temporary is locked while it
    is written. The next call for the same target removes unlocked temporaries, which killed processes have left. An
    existing target directory must be empty.

    Raises:
        OSError: the folder cannot be written.
    """
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    temporary, descriptor = _locked_temporary(target, directory)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        _remove(temporary)
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool | None:
    """Lock an open file or folder until it is closed; return False if another holds it, None if locks do not exist.

    With ``wait``, wait until no other holds it. The lock (``flock``) belongs to the descriptor, not to the process: it
    also keeps threads of one process apart, and the process may open and close the file a second time.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _locked_temporary(target: pathlib.Path, directory: bool) -> tuple[pathlib.Path, int]:
    """Make a temporary of ``target`` and return it with the open descriptor that holds its lock."""
    while True:
        # The hosts of a cluster may share both the folder and the process number.
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        if directory:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue
        # On file systems without locks no temporary can be recognised as abandoned, so none is removed.
        lock(descriptor, wait=True)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another writer removed it as abandoned before it was locked


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn the failure of a disk (:func:`disk_failure`) into a RunError that names ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = disk_failure(error)
        if not why or isinstance(error, RunError):
            raise
        advice = "make room or repair it, and the same command continues"
        raise RunError(f"{path} cannot be written: {why}; {advice}") from error


def disk_failure(error: BaseException) -> str:
    """Return the message of a full, read-only or broken disk in ``error``; "" for an error of another kind.

    The text is searched because ArrayRecord and Orbax report such failures as errors without a number.
    """
    return next((text for text in map(os.strerror, _DISK) if text in str(error)), "")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically; errors as in :func:`atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_abandoned(target: pathlib.Path) -> None:
    """Remove temporaries of ``target`` that no process has locked."""
    for old in target.parent.glob(f".{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            descriptor = os.open(old, os.O_RDONLY)
            try:
                if lock(descriptor, wait=False):
                    _remove(old)
            finally:
                os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def host_memory() -> int | None:
    """Return the physical memory of this machine in bytes; None if unknown."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else None


def format_bytes(size: int) -> str:
    """Format a number of bytes in decimal units: ``57.15 GB``, ``3.20 MB``, ``640 bytes``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def reason(error: BaseException) -> str:
    """Return an error's message on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
