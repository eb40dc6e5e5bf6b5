"""Start-up on many hosts: find the others, see that all are there and were given the same, then ``jax.distributed``.

``jax.distributed.initialize`` ends a process whose peers do not come without a word that a user could act on. So the
processes greet one another first, over a TCP connection to process 0 beside the coordinator's port: who is missing, is
there twice or counts otherwise is named in one sentence, on every host that is there, while a person still watches.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from causvid_jax.config import ConfigError, require
from causvid_jax.distributed.watchdog import Peer, Watch

WAIT = 50
"""Seconds for which the others are waited for, so that the answer is there within a minute."""
SHUTDOWN_SECONDS = 30
LOSS_SECONDS = 5
"""How long after a failure it may become known that another process is gone."""
_JOBS = (
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
)
_PORTS_OF_SLURM = 61440  # jax gives SLURM jobs the ports from here on, neighbours to neighbouring jobs


class Stopped(BaseException):
    """An end that all processes take after the same step, everything saved."""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where this process stands among all.

    Attributes:
      coordinator: ``host:port`` of process 0.
      processes: how many there are.
      process_id: of this one.
      local_devices: the accelerators of this process, None for all of its host.
    """

    coordinator: str
    processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        require(
            host and port.isdigit() and 0 < int(port) < 65536,
            f"the coordinator is {self.coordinator!r}; it must be HOST:PORT of process 0",
        )
        require(self.processes >= 1, f"the number of processes is {self.processes}; it must be at least 1")
        require(
            0 <= self.process_id < self.processes,
            f"this is process {self.process_id} of {self.processes}; accepted: 0 to {self.processes - 1}",
        )

    @property
    def greeting(self) -> tuple[str, int]:
        """Host and port at which process 0 hears the others before ``jax.distributed`` starts."""
        host, _, text = self.coordinator.rpartition(":")
        port = int(text)
        return host.strip("[]"), port - 4096 if port >= _PORTS_OF_SLURM else port + 1


def find(
    coordinator: str = "",
    processes: int = 0,
    process_id: int = -1,
    *,
    wait: float = WAIT,
    environment: Mapping[str, str] = os.environ,
) -> Address | None:
    """This process among the others: from the arguments, else ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``, else what JAX itself reads of a TPU pod, SLURM or Open MPI. None for a process that is alone.

    Args:
        coordinator: ``host:port`` of process 0.
        processes: how many there are.
        process_id: of this one, 0 to ``processes - 1``.
        wait: seconds for a coordinator's name to become known, as in a Kubernetes cluster.
        environment: the variables.

    Raises:
        ConfigError: values that are incomplete, or that do not go together.
    """
    given = {"--coordinator": coordinator != "", "--processes": processes != 0, "--process": process_id != -1}
    if not any(given.values()):
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        given = {name: name in environment for name in names}
        if any(given.values()) and all(given.values()):
            coordinator = environment[names[0]]
            processes, process_id = (_whole(environment, name) for name in names[1:])
    if any(given.values()):
        missing = ", ".join(name for name, there in given.items() if not there)
        require(not missing, f"{missing} not given; {', '.join(given)} go together")
        address = Address(coordinator, processes, process_id)
    else:
        found = _detect(wait, environment)
        if found is None:
            return None
        address = found
    return address if address.processes > 1 else None


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    require(text.strip().isdigit(), f"{name} is {text!r}; it must be a whole number")
    return int(text)


def _detect(wait: float, environment: Mapping[str, str]) -> Address | None:
    """What JAX's own detection finds: TPU pods by their metadata, SLURM and Open MPI by their variables."""
    # A pod that is no part of a job is alone; asked about it, JAX would warn, or fail for want of permissions.
    if "KUBERNETES_SERVICE_HOST" in environment and not any(name in environment for name in _JOBS):
        return None
    # JAX has no public name for it, and the addresses are needed before it is asked to connect.
    from jax._src import clusters

    try:
        coordinator, processes, process_id, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(wait)
        )
    except Exception as error:  # whatever a cluster's metadata or variables can do wrong
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"this looks like a cluster, but its addresses cannot be read ({type(error).__name__}: {reason}); give "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    if coordinator is None or processes is None or process_id is None:
        return None
    # JAX gives each SLURM task one accelerator; the only task of a node should have all of them.
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    devices = None if local is None or per_node == "1" else tuple(local)
    return Address(str(coordinator), int(processes), int(process_id), devices)


def join(address: Address | None, *, wait: float = WAIT) -> Watch | None:
    """Join the other processes, before anything else touches a device; nothing to do for None.

    From then on this process ends when another one is gone; the returned watch is there to say that it ends itself.

    Args:
        address: of :func:`find`.
        wait: seconds for which the others are waited for.

    Raises:
        ConfigError: a process that is missing, twice there, or told of another number; on all that are there.
    """
    if address is None:
        return None
    peers = greet(address, wait=wait)
    # All are there, so what fails now is a blocked port. The C++ client would abort without a sentence: be first.
    with _deadline(wait, f"no answer from the coordinator at {address.coordinator} within {wait:g} s; see that every "
                         "host can reach this port of process 0"):  # fmt: skip
        try:
            jax.distributed.initialize(
                address.coordinator,
                address.processes,
                address.process_id,
                local_device_ids=address.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(wait) + 60,
                # A process that fails waits so long for the others to leave too, then takes them down.
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"the processes cannot be joined at {address.coordinator} ({reason})") from error
    return Watch(peers, address.processes)


@contextlib.contextmanager
def together(watch: Watch | None) -> Iterator[None]:
    """What the joined processes do together: the others are told how it ended here.

    A failure that another process caused by being gone is left to the watch, which names it and ends this one.
    """
    if watch is None:
        yield
        return
    try:
        yield
    except Stopped:
        watch.bye()
        raise
    except BaseException as error:
        # What a collective says when a process is missing is no use to anyone.
        if isinstance(error, jax.errors.JaxRuntimeError) and watch.wait(LOSS_SECONDS):
            watch.end()
        watch.failed()
        raise
    watch.bye()


@contextlib.contextmanager
def _deadline(seconds: float, sentence: str) -> Iterator[None]:
    """Ends the program with ``sentence`` and status 2 unless the block ends in time, whatever blocks it."""

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


# ---- greeting -------------------------------------------------------------------------------------------------------


def greet(address: Address, *, wait: float = WAIT) -> list[Peer]:
    """Return when every process of the run has said hello to process 0: the peers, their connections open.

    Process 0 has all others for peers, they have process 0.

    A hello is a line ``{"process": i, "processes": n, "host": name}``; the answer, to all at once, is a line that holds
    the sentence on what is wrong, or nothing.

    Raises:
        ConfigError: that sentence.
    """
    verdict, peers = _hear(address, wait) if address.process_id == 0 else _say(address, wait)
    require(not verdict, verdict)
    return peers


def _hear(address: Address, wait: float) -> tuple[str, list[Peer]]:
    """Process 0: collect the hellos, answer them all; the verdict, and the others if it is good."""
    host, port = address.greeting
    try:
        server = _listen(port, backlog=max(16, address.processes))
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on port {port}, beside that of the coordinator {address.coordinator} "
            f"({error.strerror}); choose another --coordinator port"
        ) from error
    there: dict[int, str] = {}  # process to host
    heard: list[Peer] = []
    verdict, end = "", time.monotonic() + wait
    with server, contextlib.ExitStack() as connections:
        while len(there) < address.processes - 1 and not verdict:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [i for i in range(1, address.processes) if i not in there]
                verdict = (
                    f"process(es) {_list(missing)} of {address.processes} did not come within {wait:g} s; start "
                    f"all of them, and see that they can reach process 0 at {host}, ports {port} and "
                    f"{address.coordinator.rpartition(':')[2]}"
                )
                break
            try:
                hello = json.loads(_read_line(connection, 5.0))
                number, count, name = int(hello["process"]), int(hello["processes"]), str(hello["host"])
            except (OSError, ValueError, KeyError, TypeError):  # not one of us: a port scan, a health check
                continue
            if count != address.processes:
                verdict = (
                    f"process {number} on {name} was told of {count} processes, process 0 of {address.processes}; "
                    "give all of them the same number"
                )
            elif number in there or number == 0:
                other = there[number] if number else socket.gethostname()
                verdict = f"both {other} and {name} say that they are process {number}; number them 0 to {count - 1}"
            there[number] = name
            heard.append(Peer(number, name, connection))
        for peer in heard:
            with contextlib.suppress(OSError):
                peer.connection.sendall(f"{verdict}\n".encode())
        if verdict:
            return verdict, []
        connections.pop_all()
    return verdict, heard


def _listen(port: int, backlog: int) -> socket.socket:
    """A server for IPv4 and, where the host has it, IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a kernel that knows IPv6 on a host without it
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _say(address: Address, wait: float) -> tuple[str, list[Peer]]:
    """Any other process: say hello as soon as process 0 listens; its verdict, and process 0 if it is good."""
    host, port = address.greeting
    start, reason = time.monotonic(), "no answer"
    hello = {"process": address.process_id, "processes": address.processes, "host": socket.gethostname()}
    while (left := start + wait - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as connections:
                connection = connections.enter_context(socket.create_connection((host, port), timeout=min(5.0, left)))
                connection.sendall(f"{json.dumps(hello)}\n".encode())
                # Process 0 may have begun to wait later than this one.
                verdict = _read_line(connection, wait + 5.0)
                if not verdict:
                    connections.pop_all()
                return verdict, [Peer(0, host, connection)]
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.25, max(0.0, left)))
    return (
        f"process 0 of {address.processes} did not come within {wait:g} s: process {address.process_id} cannot reach "
        f"it at {host}, port {port} ({reason})",
        [],
    )


def _read_line(connection: socket.socket, timeout: float) -> str:
    connection.settimeout(timeout)
    with connection.makefile("r", encoding="utf-8") as lines:
        line = lines.readline(4096)
    if not line.endswith("\n"):
        raise ConnectionError("the connection was closed")
    return line.strip()


def _list(numbers: list[int], most: int = 8) -> str:
    rest = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + rest


# ---- what all must share --------------------------------------------------------------------------------------------


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse to go on where processes were given different ``values``: nested dicts of JSON values.

    Raises:
        ConfigError: on every process, naming the fields that differ and their values.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values, sort_keys=True).encode()
    mark = np.frombuffer(hashlib.sha256(text).digest()[:12] + len(text).to_bytes(4, "big"), np.uint8)
    marks = _from_all(mark)
    if all(np.array_equal(mark, marks[0]) for mark in marks):
        return
    longest = max(int.from_bytes(mark[12:].tobytes(), "big") for mark in marks)
    rows = _from_all(np.frombuffer(text.ljust(longest), np.uint8))
    everyone = [_leaves(json.loads(row.tobytes())) for row in rows]
    problems = []
    for i, other in enumerate(everyone):
        fields = sorted(k for k in {*everyone[0], *other} if everyone[0].get(k) != other.get(k))
        problems += [f"{k} is {everyone[0].get(k)!r} on process 0 and {other.get(k)!r} on process {i}" for k in fields]
    rest = f"; and {len(problems) - 3} more differences" if len(problems) > 3 else ""
    raise ConfigError(f"{'; '.join(problems[:3])}{rest}; start all processes with the same arguments")


def check_shared(folder: str | os.PathLike) -> None:
    """Refuse a working directory that is not the same one on every host.

    Raises:
        ConfigError: on every process, naming those that do not see what process 0 writes.
    """
    if jax.process_count() == 1:
        return
    token = np.frombuffer(secrets.token_bytes(8), np.uint8)
    name = _from_all(token)[0].tobytes().hex()  # process 0's
    mark = pathlib.Path(folder) / f".shared-{name}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("mark written")
    seen = _from_all(np.asarray([mark.exists()], np.uint8))[:, 0]
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    blind = [i for i, there in enumerate(seen) if not there]
    require(
        not blind,
        f"process(es) {_list(blind)} do not see in {folder} what process 0 writes there; --workdir must lie on a file "
        "system that all hosts share",
    )


def _from_all(row: np.ndarray) -> np.ndarray:
    """``[processes, ...]``: every process's ``row``, all of one shape."""
    return np.asarray(multihost_utils.process_allgather(row)).reshape(jax.process_count(), *row.shape)


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, sub in tree.items() for k, v in _leaves(sub, f"{path}.{name}" if path else name).items()}
