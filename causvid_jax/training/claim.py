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
from collections.abc import Iterator

from causvid_jax.config import ConfigError
from causvid_jax.parallel import hosts

NAME = "run.lock"
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_LOG = logging.getLogger("absl")


@contextlib.contextmanager
def claimed(folder: pathlib.Path) -> Iterator[None]:
    """Hold ``folder`` for this run: the first of its processes locks ``folder/run.lock``, the others hear of it.

    The lock is the operating system's (POSIX record lock, over NFS and Lustre too): it ends with the process that holds
    it, however that ends, and the file that stays says nothing. On a file system without locks a warning is logged.

    Raises:
        ConfigError: another run holds it; the sentence names its process and host.
    """
    with contextlib.ExitStack() as held:
        hosts.ask_first(lambda: held.enter_context(_locked(folder)))
        yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    with (folder / NAME).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"{folder} is in use: {holder} is training there; let it end, or use another --workdir"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning("no locks where %s lies (%s): see to it that no second run uses it", folder, error.strerror)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
