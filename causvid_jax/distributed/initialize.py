"""Initialize a run of many processes: find the others, connect to them, start ``jax.distributed`` and a watchdog."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping

import jax

from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import reason
from causvid_jax.distributed.handshake import WAIT, Address, handshake
from causvid_jax.distributed.watchdog import Watchdog

SHUTDOWN_SECONDS = 30
"""Seconds that a failed process waits for the others at the end; then JAX ends them."""
LOSS_SECONDS = 5
"""Seconds after a failed collective within which the loss of another process becomes known."""
_JOB_VARIABLES = (
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
)


class Stopped(BaseException):
    """Raised when all processes stop after the same step, with everything saved."""


def discover(
    coordinator: str = "",
    processes: int = 0,
    process_id: int = -1,
    *,
    wait: float = WAIT,
    environment: Mapping[str, str] = os.environ,
) -> Address | None:
    """Return the address of this process, or None for a single process.

    It comes from the arguments, else from ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
    else from JAX's detection of TPU pods, SLURM and Open MPI.

    Args:
        coordinator: ``host:port`` of process 0.
        processes: number of processes.
        process_id: number of this process, 0 to ``processes - 1``.
        wait: seconds until the coordinator's name must resolve (in a Kubernetes cluster this takes a while).
        environment: environment variables.

    Raises:
        ConfigError: values are incomplete or out of range, or the cluster's addresses cannot be read.
    """
    is_set = {"--coordinator": coordinator != "", "--processes": processes != 0, "--process": process_id != -1}
    if not any(is_set.values()):
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        is_set = {name: name in environment for name in names}
        if any(is_set.values()) and all(is_set.values()):
            coordinator = environment[names[0]]
            processes, process_id = (_integer(environment, name) for name in names[1:])
    if any(is_set.values()):
        unset = ", ".join(name for name, exists in is_set.items() if not exists)
        require(not unset, f"{unset} not given; {', '.join(is_set)} go together")
        address: Address | None = Address(coordinator, processes, process_id)
    else:
        address = _detect(wait, environment)
    return address if address is not None and address.processes > 1 else None


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    require(text.strip().isdigit(), f"{name} is {text!r}; it must be a whole number")
    return int(text)


def _detect(wait: float, environment: Mapping[str, str]) -> Address | None:
    """Return the address that JAX detects: TPU pods by their metadata, SLURM and Open MPI by their variables."""
    # A pod outside a job is a single process. JAX's detection would print a warning, or fail without permissions.
    if "KUBERNETES_SERVICE_HOST" in environment and not any(name in environment for name in _JOB_VARIABLES):
        return None
    # JAX has no public name for it, and the handshake needs the addresses before JAX connects.
    from jax._src import clusters

    try:
        coordinator, processes, process_id, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(wait)
        )
    except Exception as error:  # metadata and variables can be wrong in many ways
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"this looks like a cluster, but its addresses cannot be read ({type(error).__name__}: {why}); give "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    if coordinator is None or processes is None or process_id is None:
        return None
    # JAX gives each SLURM task one accelerator; the only task of a node should have all of them.
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    devices = None if local is None or per_node == "1" else tuple(local)
    return Address(str(coordinator), int(processes), int(process_id), devices)


def initialize(address: Address | None, *, wait: float = WAIT) -> Watchdog | None:
    """Connect to the other processes and start ``jax.distributed``. Call this before anything uses a device.

    If the coordinator's port is blocked, the program ends with a message and status 2 after ``wait`` seconds.

    Args:
        address: of :func:`discover`; None: a single process, for which nothing is done.
        wait: seconds to wait for the others.

    Returns:
        The watchdog, which ends this process when another one is lost; None for a single process.

    Raises:
        ConfigError: as :func:`causvid_jax.distributed.handshake.handshake`, or ``jax.distributed`` cannot start.
    """
    if address is None:
        return None
    peers = handshake(address, wait=wait)
    # All processes are running, so a failure now is a blocked port. JAX's client would abort without a message.
    with _deadline(wait, f"no answer from the coordinator at {address.coordinator} within {wait:g} s; check that every "
                         "host can reach this port of process 0"):  # fmt: skip
        try:
            jax.distributed.initialize(
                address.coordinator,
                address.processes,
                address.process_id,
                local_device_ids=address.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(wait) + 60,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            why = reason(error)[:200]
            raise ConfigError(f"the processes cannot be joined at {address.coordinator} ({why})") from error
    return Watchdog(peers, address.processes)


@contextlib.contextmanager
def notify_peers(watchdog: Watchdog | None) -> Iterator[None]:
    """Run the block, then tell the other processes whether it finished, stopped or failed in this process.

    If it failed because another process was lost, the watchdog prints which one and ends this process.
    """
    if watchdog is None:
        yield
        return
    try:
        yield
    except Stopped:
        watchdog.finish()
        raise
    except BaseException as error:
        # The message of a failed collective does not say which process is missing.
        if isinstance(error, jax.errors.JaxRuntimeError) and watchdog.wait_for_loss(LOSS_SECONDS):
            watchdog.abort()
        watchdog.fail()
        raise
    watchdog.finish()


@contextlib.contextmanager
def _deadline(seconds: float, sentence: str) -> Iterator[None]:
    """End the program with ``sentence`` and status 2 unless the block ends in time, even if it blocks in C++."""

    def end() -> None:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
