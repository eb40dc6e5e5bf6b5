"""Allow one run at a time in a folder. Two runs would delete each other's unfinished checkpoints."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import TextIO

from causvid_jax.config import ConfigError
from causvid_jax.distributed import collectives

NAME = "run.lock"
WAIT_SECONDS = 30.0  # a run that was stopped and is started again at once may still be saving
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_LOG = logging.getLogger("absl")


@contextlib.contextmanager
def claimed(folder: pathlib.Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Lock ``folder`` for this run in the block: process 0 locks ``folder/run.lock``.

    It is a POSIX record lock, which works over NFS and Lustre, unlike ``config.files.lock``: the hosts of a run share
    the folder, and one process per host locks it once. The operating system releases it when the process ends
    for any reason; a file without a lock has no meaning. On a file system without locks there is a warning instead.

    Raises:
        ConfigError: another run still holds the lock after ``wait`` seconds; the message names its process and host.
    """
    with contextlib.ExitStack() as stack:
        collectives.check_on_first(lambda: stack.enter_context(_locked(folder, wait)))
        yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path, wait: float) -> Iterator[None]:
    with (folder / NAME).open("a+") as file:
        try:
            _wait_for(file, folder, wait)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning("%s has no file locks (%s): do not start a second run there", folder, error.strerror)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _wait_for(file: TextIO, folder: pathlib.Path, wait: float) -> None:
    """Take the lock; warn if it is held, and refuse after ``wait`` seconds."""
    deadline, warned = time.monotonic() + wait, False
    while not _take(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        if time.monotonic() >= deadline:
            raise ConfigError(f"{folder} is in use: {holder} is training there; let it end, or use another --workdir")
        if not warned:
            _LOG.warning("%s is training in %s; waiting up to %g s for its end", holder, folder, wait)
            warned = True
        time.sleep(0.2)


def _take(file: TextIO) -> bool:
    """Return whether the lock could be taken now."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True
