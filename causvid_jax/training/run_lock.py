"""One run at a time in a folder.

A second one would take the checkpoint that the first is writing for one that a dead run has left, and remove it.
"""

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
WAIT_SECONDS = 30.0  # a run that was told to stop, and is started again at once, may still be saving
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_LOG = logging.getLogger("absl")


@contextlib.contextmanager
def claimed(folder: pathlib.Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold ``folder`` for this run: the first of its processes locks ``folder/run.lock``, the others hear of it.

    The lock is the operating system's (POSIX record lock, over NFS and Lustre too): it ends with the process that holds
    it, however that ends, and the file that stays says nothing. On a file system without locks a warning is logged.

    Raises:
        ConfigError: another run still holds it after ``wait`` seconds; the sentence names its process and host.
    """
    with contextlib.ExitStack() as held:
        collectives.ask_first(lambda: held.enter_context(_locked(folder, wait)))
        yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path, wait: float) -> Iterator[None]:
    with (folder / NAME).open("a+") as file:
        try:
            until, told = time.monotonic() + wait, False
            while not _take(file):
                file.seek(0)
                holder = file.read().strip() or "another process"
                if time.monotonic() >= until:
                    raise ConfigError(
                        f"{folder} is in use: {holder} is training there; let it end, or use another --workdir"
                    )
                if not told:
                    _LOG.warning("%s is training in %s; waiting up to %g s for its end", holder, folder, wait)
                    told = True
                time.sleep(0.2)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning("no locks where %s lies (%s): see to it that no second run uses it", folder, error.strerror)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        raise
    return True
