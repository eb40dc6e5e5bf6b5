"""End a run within seconds when one of its processes is lost, and name that process on all others.

``jax.distributed`` detects a lost process by heartbeats, after 100 s, and aborts the others with a C++ trace that does
not name it. The connections of the handshake therefore stay open. The kernel closes the connection of a process that
dies, and TCP keepalive detects a host that does not answer within 40 s. JAX's heartbeats stay on, because some failures
do not close a connection.
"""

import contextlib
import dataclasses
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

STATUS = 1
"""Exit status of a process that ends because another one is lost."""
GRACE = 10.0
"""Seconds that a process may continue after another one failed, to report its own error."""
RELAY = 1.0
"""Seconds to wait for messages to be sent before the connections are closed."""
# Seconds of silence, seconds between probes, probes: a host that lost its power is known after 40 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_FINISHED, _FAILED, _LOST = "finished", "failed", "lost "


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another process.

    Attributes:
        number: of the process.
        host: name of its host.
        connection: an open socket; both sides send lines.
    """

    number: int
    host: str
    connection: socket.socket


class Watchdog:
    """Monitor ``peers`` in a thread, and end this process with status 1 when one of them is lost.

    Process 0 monitors all others and relays losses to them. Each of the others monitors process 0.

    Args:
        peers: of the handshake.
        processes: number of processes of the run.
        end: called with the status; tests replace it.
    """

    def __init__(self, peers: Sequence[Peer], processes: int, end: Callable[[int], None] = os._exit):
        self._peers = {peer.number: peer for peer in peers}
        self._processes, self._end = processes, end
        self._lock = threading.Lock()
        self._done = False
        self.lost: str | None = None
        """Error message that names the lost process; None while all are running."""
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            _keep_alive(peer.connection)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Tell the others that this process has finished. A loss of another process then no longer ends it."""
        self._done = True
        self._send_all(_FINISHED)

    def fail(self) -> None:
        """Tell the others that this process has failed, and end it after :data:`GRACE` + :data:`RELAY` seconds.

        Without that end, JAX's shutdown may wait for the others (80 s, and then a C++ trace).
        """
        self._done = True
        self._send_all(_FAILED)
        self._later(GRACE + RELAY, lambda: self._end(STATUS))

    def wait_for_loss(self, seconds: float) -> str | None:
        """Wait up to ``seconds`` for a loss; return :attr:`lost`. A collective may fail before the loss is known."""
        end = time.monotonic() + seconds
        while self.lost is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.lost

    def _send_all(self, line: str) -> None:
        with self._lock:
            for peer in self._peers.values():
                _send(peer, line)

    def _run(self) -> None:
        received: dict[int, str] = {}
        while self._peers:
            for key, _ in self._selector.select():
                peer: Peer = key.data
                try:
                    piece = peer.connection.recv(4096)
                except OSError:
                    piece = b""
                received[peer.number] = received.get(peer.number, "") + piece.decode(errors="replace")
                *lines, received[peer.number] = received[peer.number].split("\n")
                for line in lines:
                    self._receive(peer, line)
                if not piece and peer.number in self._peers:
                    self._drop(peer)
                    self._stop(self._lost_sentence(peer, "was lost: it was killed, or its host does not answer"))

    def _receive(self, peer: Peer, line: str) -> None:
        if line == _FINISHED:
            self._drop(peer)
        elif line == _FAILED:
            self._drop(peer)
            self.lost = self.lost or self._lost_sentence(peer, "has failed: see its own log")
            self._later(GRACE, self.abort)
        elif line.startswith(_LOST):
            self._drop(peer)
            self._stop(line.removeprefix(_LOST))

    def _lost_sentence(self, peer: Peer, how: str) -> str:
        return (
            f"process {peer.number} of {self._processes} on {peer.host} {how}; this process ends too. Start all "
            "processes again to continue from the last complete checkpoint"
        )

    def _drop(self, peer: Peer) -> None:
        with self._lock:
            if self._peers.pop(peer.number, None) is not None:
                self._selector.unregister(peer.connection)

    @staticmethod
    def _later(seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()

    def _stop(self, sentence: str) -> None:
        if not self._done:
            self.lost = self.lost or sentence
            self.abort()

    def abort(self) -> None:
        """Print :attr:`lost`, relay it and end this process, unless it has finished."""
        with self._lock:
            if self._done:
                return
            self._done = True
        print(f"error: {self.lost}", file=sys.stderr, flush=True)
        self._send_all(f"{_LOST}{self.lost}")
        time.sleep(RELAY if self._peers else 0.0)
        self._end(STATUS)


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(peer: Peer, line: str) -> None:
    with contextlib.suppress(OSError):  # the peer is lost too; its connection shows that
        peer.connection.sendall(f"{line}\n".encode())
