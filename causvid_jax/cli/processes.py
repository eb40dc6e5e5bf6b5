"""Flags of a program that runs as many processes: ``--coordinator``, ``--processes``, ``--process``, ``--wait``.

None of them is needed on one host, under SLURM, under Open MPI or on a TPU pod (docs/hosts.md).
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

from causvid_jax.cli.options import option
from causvid_jax.config.fields import Bounds, ManyOrZero, check_bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Base of the options of programs that run on many hosts."""

    coordinator: str = option("", "HOST:PORT of process 0, if the processes cannot find each other.")
    processes: ManyOrZero = option(0, "Number of processes, with --coordinator.")
    process: Annotated[int, Bounds(least=-1, most=10**6)] = option(
        -1, "Index of this process, from 0, with --coordinator."
    )
    wait: Annotated[float, Bounds(above=0, most=10**6)] = option(50.0, "Seconds to wait for the other processes.")

    def __post_init__(self) -> None:
        check_bounds(self)


@contextlib.contextmanager
def joined(options: Processes) -> Iterator[bool]:
    """Connect to the other processes before anything uses a device; yield whether there are any.

    Raises:
        ConfigError: see :mod:`causvid_jax.distributed.initialize`.
    """
    from absl import logging

    from causvid_jax.distributed import collectives, initialize

    address = initialize.discover(options.coordinator, options.processes, options.process, wait=options.wait)
    watchdog = initialize.initialize(address, wait=options.wait)
    if address is not None:
        logging.info("Process %d of %d, coordinator %s.", address.process_id, address.processes, address.coordinator)
        if not collectives.is_first():
            logging.set_verbosity(logging.WARNING)
    with initialize.notify_peers(watchdog):
        yield watchdog is not None


def check(arguments: dict[str, Any], workdir: pathlib.Path) -> None:
    """Check that all processes have the same ``arguments`` (JSON values), versions and working directory.

    Raises:
        ConfigError: they differ; the message names the values.
    """
    import jax

    import causvid_jax
    from causvid_jax.distributed import collectives

    versions = {"jax": jax.__version__, "causvid_jax": causvid_jax.__version__}
    collectives.check_same({**arguments, "versions": versions})
    collectives.check_shared(workdir)
