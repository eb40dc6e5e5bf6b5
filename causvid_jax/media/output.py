"""Check that an output file can be written, and lock it so that one program at a time writes it."""

import contextlib
import os
import pathlib
import shutil

from causvid_jax.config import ConfigError, files, require

SUFFIXES = (".mp4", ".gif")
"""Suffixes of the videos that can be written."""
SPACE = 2**20
"""Free bytes of the disk that a new video needs."""
FRAME_SPACE = 64
"""Additional free bytes for each frame."""


def check_output(path: str | pathlib.Path, frames: int = 0) -> pathlib.Path:
    """Create the folder of an output path, check that a video can be written there, and return the path.

    Args:
        path: of the video.
        frames: number of pixel frames that will be written; the disk must have room for them.

    Raises:
        ConfigError: a suffix other than .mp4 or .gif, a directory, a path that cannot be written, a full disk, or a
            file that another program is writing.
    """
    path = pathlib.Path(path)
    require(path.suffix.lower() in SUFFIXES, f"output {str(path)!r} is no known kind of video; accepted: .mp4, .gif")
    require(not path.is_dir(), f"output {str(path)!r} is a directory; give the name of a file")
    part = partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Lock(path).release()
        part.touch()
        part.unlink()
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise ConfigError(f"cannot write output {str(path)!r}: {error.strerror}") from error
    needed = SPACE + FRAME_SPACE * frames
    require(
        free >= needed,
        f"output {str(path)!r}: its disk has {free / 1e6:.2f} MB left, and the video needs at least "
        f"{needed / 1e6:.2f} MB; make room or write elsewhere",
    )
    return path


class Lock:
    """Reserve an output path for one writer by a locked file ``.NAME.lock`` beside it; :meth:`release` removes it.

    The operating system ends the lock when the process ends, also if it is killed. On a file system without locks the
    path is not reserved.

    Raises:
        ConfigError: another writer holds the path.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: pathlib.Path):
        self._file = path.with_name(f".{path.name}.lock")
        self._descriptor: int | None = None
        while self._descriptor is None:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            locked = files.lock(descriptor, wait=False)
            if not locked:
                os.close(descriptor)
                require(
                    locked is None,
                    f"output {str(path)!r} is being written by another program; let it end, or choose another name",
                )
                return
            # The previous holder may have removed the file after it was opened here; this lock is then useless.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self._file)):
                    self._descriptor = descriptor
                    return
            os.close(descriptor)

    def release(self) -> None:
        """Release the path; a second call does nothing."""
        if self._descriptor is not None:
            self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def remove_abandoned(folder: pathlib.Path) -> None:
    """Remove the unfinished files and locks of killed writers from ``folder``, but no video."""
    for file in folder.glob(".*.lock"):
        path = file.with_name(file.name.removeprefix(".").removesuffix(".lock"))
        if path.suffix.lower() not in SUFFIXES:  # the lock of another program
            continue
        with contextlib.suppress(ConfigError, OSError):
            lock = Lock(path)  # ConfigError: another program is writing it
            partial(path).unlink(missing_ok=True)
            files.remove_abandoned(path)
            lock.release()


def partial(path: pathlib.Path) -> pathlib.Path:
    """Return the temporary name of a file that is being written."""
    return path.with_name(f".{path.name}.partial")
