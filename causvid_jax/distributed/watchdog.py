"""Who of the processes of a run is gone, said by name on all the others within seconds.

``jax.distributed`` notices a lost process too, by heartbeats after 100 s, and aborts the others with a C++ trace that
names none. So the connections of the greeting stay open: the kernel closes that of a process that dies, and keepalive
probes find a host that answers no more. JAX's heartbeats stay, for what a connection does not show.
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
"""Of a process that ends because another one is gone."""
GRACE = 10.0
"""Seconds in which a process may still say what stopped it after another one failed; all may have met the same."""
RELAY = 1.0
# Seconds of silence, seconds between probes, probes: a host that lost its power is known after 40 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_BYE, _FAILED, _LOST = "bye", "failed", "lost "


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another process, as the greeting found it.

    Attributes:
      number: of the process.
      host: its name.
      connection: open; lines go both ways.
    """

    number: int
    host: str
    connection: socket.socket


class Watch:
    """Watches the ``peers`` in a thread, and ends this process, status 1, when one of them is gone.

    Process 0 has all others for peers and hands on what it sees; the others have process 0.

    Args:
        peers: with their connections.
        processes: of the run.
        end: called with the status, for tests.
    """

    def __init__(self, peers: Sequence[Peer], processes: int, end: Callable[[int], None] = os._exit):
        self._peers = {peer.number: peer for peer in peers}
        self._processes, self._end = processes, end
        self._lock = threading.Lock()
        self._done = False
        self.lost: str | None = None
        """The sentence on the process that is gone."""
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            _keep_alive(peer.connection)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def bye(self) -> None:
        """Tell the others that this process has done all there was to do; from now on it misses no one."""
        self._done = True
        self._say(_BYE)

    def failed(self) -> None:
        """Tell the others that this process has met an error; it is about to end by itself.

        Where its end waits for theirs, as JAX's farewell does (80 s, and then a C++ trace), it is ended when they have
        had :data:`GRACE` and :data:`RELAY`.
        """
        self._done = True
        self._say(_FAILED)
        self._later(GRACE + RELAY, lambda: self._end(STATUS))

    def wait(self, seconds: float) -> str | None:
        """:attr:`lost`, given time to become known: a collective may fail a moment before."""
        end = time.monotonic() + seconds
        while self.lost is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.lost

    def _say(self, line: str) -> None:
        with self._lock:
            for peer in self._peers.values():
                _send(peer, line)

    def _run(self) -> None:
        heard: dict[int, str] = {}
        while self._peers:
            for key, _ in self._selector.select():
                peer: Peer = key.data
                try:
                    piece = peer.connection.recv(4096)
                except OSError:
                    piece = b""
                heard[peer.number] = heard.get(peer.number, "") + piece.decode(errors="replace")
                *lines, heard[peer.number] = heard[peer.number].split("\n")
                for line in lines:
                    self._hear(peer, line)
                if not piece and peer.number in self._peers:
                    self._drop(peer)
                    self._stop(self._gone(peer, "is gone: it was killed, or its host does not answer"))

    def _hear(self, peer: Peer, line: str) -> None:
        if line == _BYE:
            self._drop(peer)
        elif line == _FAILED:
            self._drop(peer)
            self.lost = self.lost or self._gone(peer, "has failed: its own log says why")
            self._later(GRACE, self.end)
        elif line.startswith(_LOST):
            self._drop(peer)
            self._stop(line.removeprefix(_LOST))

    def _gone(self, peer: Peer, how: str) -> str:
        return (
            f"process {peer.number} of {self._processes} on {peer.host} {how}; this one ends too, and when all are "
            "started again the run goes on from its last whole checkpoint"
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
            self.end()

    def end(self) -> None:
        """End this process, saying which one is :attr:`lost`; unless it has done all there was to do."""
        with self._lock:
            if self._done:
                return
            self._done = True
        print(f"error: {self.lost}", file=sys.stderr, flush=True)
        self._say(f"{_LOST}{self.lost}")
        # What was sent must leave before the connections close.
        time.sleep(RELAY if self._peers else 0.0)
        self._end(STATUS)


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(peer: Peer, line: str) -> None:
    with contextlib.suppress(OSError):  # it is gone itself, which its connection tells too
        peer.connection.sendall(f"{line}\n".encode())
