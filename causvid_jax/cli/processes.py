"""The flags by which a program becomes one of many: ``--coordinator``, ``--processes``, ``--process``, ``--wait``.

None is needed on one host, under SLURM, under Open MPI or on a TPU pod (docs/hosts.md).
"""

import contextlib
import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags, logging

from causvid_jax.config import require
from causvid_jax.distributed import collectives, initialize


def define_flags() -> None:
    """Define them; :func:`joined` reads them."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, if the processes cannot find each other.")
    flags.DEFINE_integer("processes", 0, "How many processes there are, with --coordinator.")
    flags.DEFINE_integer("process", -1, "The number of this one, from 0, with --coordinator.")
    flags.DEFINE_float("wait", initialize.WAIT, "Seconds for which the other processes are waited for.")


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Join the other processes, before anything touches a device, for what is done together; whether there are any.

    Raises:
        ConfigError: see :mod:`causvid_jax.distributed.initialize`.
    """
    given = flags.FLAGS
    require(given.wait > 0, f"--wait is {given.wait:g} seconds; it must be positive")
    address = initialize.find(given.coordinator, given.processes, given.process, wait=given.wait)
    watch = initialize.join(address, wait=given.wait)
    if address is not None:
        logging.info("Process %d of %d, coordinator %s.", address.process_id, address.processes, address.coordinator)
        if not collectives.first():
            logging.set_verbosity(logging.WARNING)
    with initialize.together(watch):
        yield watch is not None


def check(arguments: dict[str, Any], workdir: pathlib.Path) -> None:
    """Refuse to go on unless all processes have the same arguments, versions and working directory.

    Raises:
        ConfigError: naming what differs.
    """
    versions = {"jax": jax.__version__, "causvid_jax": _version()}
    initialize.check_same({**arguments, "versions": versions})
    initialize.check_shared(workdir)


def _version() -> str:
    try:
        return importlib.metadata.version("causvid_jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"
