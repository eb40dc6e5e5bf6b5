"""Measure a server from its viewers' side: start, first frame, delay of a prompt switch, films in real time."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from causvid_jax.config import RunError
from causvid_jax.serve.settings import TOKEN

LEAD = 0.2
"""Seconds of film that a viewer has buffered when it requests the next block."""
PROMPTS = ("a green 7 moving up", "a red 3 moving left")


class Viewer(threading.Thread):
    """Plays a film for ``seconds``, and changes the prompt every ``every`` seconds (0: never).

    Attributes:
        first: seconds from the message ``start`` to the first frame.
        delays: seconds from each prompt switch to the first frame with the new prompt.
        intervals: seconds between chunks.
        stalls: number of times without a frame to show.
        stalled: total seconds without a frame to show.
        error: the error that ended the viewer; None without an error.
    """

    def __init__(self, address: str, seconds: float, every: float = 0.0):
        super().__init__()
        self.address, self.seconds, self.every = address, seconds, every
        self.first, self.stalls, self.stalled = 0.0, 0, 0.0
        self.delays: list[float] = []
        self.intervals: list[float] = []
        self.error: Exception | None = None

    def run(self) -> None:
        """Connect and play."""
        try:
            with connect(self.address, subprotocols=["causvid.v1"], compression=None) as socket:  # type: ignore[list-item]
                self._play(socket)
        except Exception as error:
            self.error = error

    def _play(self, socket: ClientConnection) -> None:
        fps = json.loads(socket.recv())["fps"]
        start = time.perf_counter()
        socket.send(json.dumps({"type": "start", "prompt": PROMPTS[1]}))
        pressed: dict[int, float] = {}
        end, last, next_press, presses = None, None, start + 1.37, 0
        while time.perf_counter() - start < self.seconds:
            chunk = _chunk(socket)
            now = time.perf_counter()
            shows = now if end is None else max(end, now)
            if end is None:
                self.first = now - start
            elif now > end + 1 / fps:
                self.stalls += 1
                self.stalled += now - end
            self.delays += [shows - pressed.pop(key) for key in list(pressed) if key <= chunk["knows"]]
            self.intervals += [] if last is None else [now - last]
            end, last = shows + chunk["count"] / fps, now
            while time.perf_counter() < end - LEAD:
                if self.every and time.perf_counter() >= next_press:
                    presses += 1
                    pressed[presses] = time.perf_counter()
                    socket.send(json.dumps({"type": "prompt", "prompt": PROMPTS[presses % 2 - 1], "id": presses}))
                    next_press += self.every
                time.sleep(0.002)
            index = chunk["index"] + 1
            socket.send(json.dumps({"type": "pull", "upto": index, "received": index}))
        socket.send(json.dumps({"type": "stop"}))


def _chunk(socket: ClientConnection) -> dict[str, Any]:
    while True:
        message = socket.recv(timeout=60)
        if isinstance(message, bytes):
            return json.loads(message[4 : 4 + int.from_bytes(message[:4], "big")])
        event = json.loads(message)
        if event["type"] in ("error", "ended"):
            raise RunError(f"the server says: {event.get('message') or event.get('reason')}")


class _Process:
    """A server in a separate process."""

    def __init__(self, flags: tuple[str, ...]):
        begin = time.perf_counter()
        program = "from causvid_jax.cli import main; main('serve')"
        command = [sys.executable, "-c", program, "--port=0", "--requests_per_minute=100000", *flags]
        # These viewers have no token, so the server needs to run without one.
        environment = {name: value for name, value in os.environ.items() if name != TOKEN}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://\S+", line)
        if match is None:
            raise RunError(f"the server did not start: {line.strip() or 'it printed nothing'}")
        self.address = match[0]
        self.listens = time.perf_counter() - begin
        while not self._ready():
            if self.process.poll() is not None:
                raise RunError("the server ended while it was starting")
            time.sleep(0.05)
        self.ready = time.perf_counter() - begin

    def _ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}readyz", timeout=5).status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)


def _view(server: _Process, count: int, seconds: float, every: float = 0.0) -> list[Viewer]:
    address = server.address.replace("http:", "ws:") + "v1/stream"
    viewers = [Viewer(address, seconds, every) for _ in range(count)]
    for viewer in viewers:
        viewer.start()
    for viewer in viewers:
        viewer.join()
        if viewer.error is not None:
            raise viewer.error
    return viewers


def _summary(values: list[float]) -> dict[str, float]:
    quantiles = {f"p{100 * q:.0f}": round(float(np.quantile(values, q)), 4) for q in (0.5, 0.95, 0.99)}
    return {**quantiles, "most": round(max(values), 4), "count": len(values)}


def measure(flags: tuple[str, ...], seconds: float = 12.0, most: int = 4) -> dict[str, Any]:
    """Return the figures of a server that is started with ``flags`` of ``causvid serve``, in seconds.

    Args:
        flags: such as ``--config=digits``.
        seconds: length of the films.
        most: the maximum number of films at once.

    Returns:
        ``listens`` and ``ready`` (start of the server), ``first_frame``, ``change_to_shown`` (delay of a prompt
        switch), ``films`` (for each number of viewers: stalls, first frame, intervals between chunks), and the server's
        own ``real_time_factor`` and ``deadline_misses_total``.

    Raises:
        RunError: the server did not start, ended, or refused a viewer.
    """
    with _Process((*flags, f"--sessions={most}")) as server:
        report: dict[str, Any] = {"listens": round(server.listens, 2), "ready": round(server.ready, 2)}
        report["first_frame"] = _summary([_view(server, 1, 0.01)[0].first for _ in range(10)])
        steered = _view(server, 1, 2.5 * seconds, every=1.07)[0]
        report["change_to_shown"] = {**_summary(steered.delays), "lead": LEAD}
        report["films"] = []
        for count in sorted({1, 2, most}):
            viewers = _view(server, count, seconds)
            report["films"].append(
                {
                    "count": count,
                    "stalls": sum(viewer.stalls for viewer in viewers),
                    "stalled_seconds": round(sum(viewer.stalled for viewer in viewers), 3),
                    "first_frame": round(max(viewer.first for viewer in viewers), 4),
                    "chunk_interval": _summary([value for viewer in viewers for value in viewer.intervals]),
                }
            )
        text = urllib.request.urlopen(f"{server.address}metrics").read().decode()
        for name in ("real_time_factor", "deadline_misses_total"):
            match = re.search(rf"^causvid_{name}\{{.*\}} (\S+)$", text, re.M)
            report[name] = float(match[1]) if match else None
    return report
