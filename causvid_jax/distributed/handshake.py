"""Connect all processes of a run before ``jax.distributed`` starts, and name missing or misnumbered processes.

``jax.distributed.initialize`` ends a process without a readable message if its peers are missing. Every process
therefore connects to process 0 over TCP first, at another port than the coordinator's (one above it; 4096 below it from
61440 on). An error is one sentence in every process.
"""

import contextlib
import dataclasses
import json
import socket
import time

from causvid_jax.config import ConfigError, require
from causvid_jax.distributed.watchdog import Peer

WAIT = 50
"""Seconds to wait for the other processes. An error then appears within a minute."""
_FIRST_SLURM_PORT = 61440  # JAX assigns coordinator ports from here on to SLURM jobs, by their numbers


@dataclasses.dataclass(frozen=True)
class Address:
    """Address of process 0, and the number of this process.

    Attributes:
        coordinator: ``host:port`` of process 0.
        processes: number of processes.
        process_id: number of this process.
        local_devices: numbers of this process's accelerators; None: all of its host.

    Raises:
        ConfigError: the coordinator is no ``HOST:PORT``, or the number of this process is out of range.
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
    def handshake_address(self) -> tuple[str, int]:
        """Host and port at which process 0 accepts the others before ``jax.distributed`` starts."""
        host, _, text = self.coordinator.rpartition(":")
        port = int(text)
        return host.strip("[]"), port - 4096 if port >= _FIRST_SLURM_PORT else port + 1


def handshake(address: Address, *, wait: float = WAIT) -> list[Peer]:
    """Wait about ``wait`` seconds until every process has connected to process 0; return the peers.

    Their connections stay open. The peers of process 0 are all others; the peer of every other process is process 0.
    Each process sends the line ``{"process": i, "processes": n, "host": name}``. Process 0 answers with one line, which
    holds the error or is empty.

    Raises:
        ConfigError: in every process, if a process is missing, two have the same number, or their numbers of processes
            differ; in process 0 also if it cannot listen on its port.
    """
    error, peers = _accept(address, wait) if address.process_id == 0 else _connect(address, wait)
    require(not error, error)
    return peers


def _accept(address: Address, wait: float) -> tuple[str, list[Peer]]:
    """Accept and answer all other processes, in process 0; return the error or "", and the peers."""
    host, port = address.handshake_address
    try:
        server = _listen(port, backlog=max(16, address.processes))
    except OSError as problem:
        raise ConfigError(
            f"process 0 cannot listen on port {port}, beside that of the coordinator {address.coordinator} "
            f"({problem.strerror}); choose another --coordinator port"
        ) from problem
    hosts: dict[int, str] = {}  # by process number
    peers: list[Peer] = []
    error, end = "", time.monotonic() + wait
    with server, contextlib.ExitStack() as connections:
        while len(hosts) < address.processes - 1 and not error:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                absent = [i for i in range(1, address.processes) if i not in hosts]
                error = (
                    f"process(es) {join_numbers(absent)} of {address.processes} did not connect within {wait:g} s; "
                    f"start all of them, and check that they can reach process 0 at {host}, ports {port} and "
                    f"{address.coordinator.rpartition(':')[2]}"
                )
                break
            try:
                message = json.loads(_read_line(connection, 5.0))
                number, count, name = int(message["process"]), int(message["processes"]), str(message["host"])
            except (OSError, ValueError, KeyError, TypeError):  # a port scan or a health check
                continue
            if count != address.processes:
                error = (
                    f"process {number} on {name} was started with {count} processes, process 0 with "
                    f"{address.processes}; give all of them the same number"
                )
            elif number in hosts or number == 0:
                other = hosts[number] if number else socket.gethostname()
                error = f"{other} and {name} both have the process number {number}; number them 0 to {count - 1}"
            hosts[number] = name
            peers.append(Peer(number, name, connection))
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.connection.sendall(f"{error}\n".encode())
        if error:
            return error, []
        connections.pop_all()
    return error, peers


def _listen(port: int, backlog: int) -> socket.socket:
    """Return a server socket for IPv4 and, if the host has it, IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # the kernel supports IPv6, the host has none
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _connect(address: Address, wait: float) -> tuple[str, list[Peer]]:
    """Connect to process 0 as soon as it listens; return its error or "", and process 0 as peer."""
    host, port = address.handshake_address
    start, reason = time.monotonic(), "no answer"
    message = {"process": address.process_id, "processes": address.processes, "host": socket.gethostname()}
    while (remaining := start + wait - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as connections:
                connection = connections.enter_context(
                    socket.create_connection((host, port), timeout=min(5.0, remaining))
                )
                connection.sendall(f"{json.dumps(message)}\n".encode())
                # Process 0 may have started to wait after this process did.
                error = _read_line(connection, wait + 5.0)
                if not error:
                    connections.pop_all()
                return error, [Peer(0, host, connection)]
        except OSError as problem:
            reason = problem.strerror or str(problem)
            time.sleep(min(0.25, max(0.0, remaining)))
    return (
        f"process 0 of {address.processes} did not answer within {wait:g} s: process {address.process_id} cannot reach "
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


def join_numbers(numbers: list[int]) -> str:
    """Return the numbers as text, at most eight of them: "1, 2, 3, 4, 5, 6, 7, 8 and 4 more"."""
    rest = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return ", ".join(map(str, numbers[:8])) + rest
