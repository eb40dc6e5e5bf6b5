"""Shared by the tests of the server: a tiny recipe's programs, compiled once, and an engine with a clock of its own."""

import io
import json
import struct
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from causvid_jax.config.recipes import load_recipe
from causvid_jax.serve import server
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.programs import open_programs
from causvid_jax.serve.settings import Settings
from tests.tiny import tiny_recipe, tiny_workdir

RECIPE = tiny_recipe(causal={"window": 2})


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Return the programs of a tiny recipe with random weights."""
    return open_programs(RECIPE, str(tiny_workdir(tmp_path_factory.mktemp("weights"), RECIPE)))


@pytest.fixture(scope="session")
def digits():
    """Return the programs of the digits recipe with the weights of the package."""
    return open_programs(load_recipe("digits"))


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine(programs, tmp_path):
    """Return an engine without a thread: tests call ``step``."""
    settings = Settings(sessions=2, queue=1, recordings=str(tmp_path / "recordings"))
    made = Engine(RECIPE, lambda: programs, settings, clock=Clock())
    made.load()
    yield made
    made.stop()


def run(engine: Engine, most: int = 200) -> int:
    """Step until there is nothing to do; return the number of steps."""
    for count in range(most):
        if not engine.step():
            return count
    raise AssertionError("the engine never comes to rest")


def events(session, kind: str) -> list[dict]:
    """Return the events of a kind that wait for the viewer."""
    return [event for event in session.events if event["type"] == kind]


def png(color=(255, 0, 0)) -> bytes:
    """Return a picture of 16 x 16 pixels of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(file, "PNG")
    return file.getvalue()


def frames_of(session) -> np.ndarray:
    """Return the frames of all chunks that are kept."""
    return np.concatenate([chunk.frames for chunk in session.chunks])


class Server:
    """A server of the tiny recipe on a free port of loopback, in a thread of this process."""

    def __init__(self, programs, folder, **settings):
        self.settings = Settings(port=0, recordings=str(folder), **{"requests_per_minute": 10**6, **settings})
        self.engine = Engine(programs.recipe, lambda: programs, self.settings)
        self.listener = server.listen(self.settings)
        self.port = self.listener.getsockname()[1]
        self.uvicorn = uvicorn.Server(server.configuration(self.engine))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        assert self.engine.ready.wait(60)
        while not self.uvicorn.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)

    def connect(self, **options) -> "Viewer":
        options = {"origin": self.url, "subprotocols": ["causvid.v1"], "compression": None, **options}
        return Viewer(connect(f"ws://127.0.0.1:{self.port}/v1/stream", **options))


def take_up(old: "Viewer", new: "Viewer", **start) -> None:
    """Start a film with ``old``, show its first block there, and continue its session with ``new``."""
    old.send("start", **start)
    token = old.until("session")["token"]
    old.pull(1)
    new.send("resume", token=token, received=1)
    assert new.until("session")["resumed"]


class Viewer:
    """A client of ``/v1/stream``."""

    def __init__(self, opening):
        self._opening, self.socket = opening, opening.__enter__()
        self.events, self.chunks, self._passed = [], [], []

    def send(self, kind, payload=None, **values):
        text = json.dumps({"type": kind, **values})
        self.socket.send(text if payload is None else struct.pack(">I", len(text)) + text.encode() + payload)

    def receive(self):
        """Return the next message: an event, or a chunk with the key ``data``."""
        message = self.socket.recv(timeout=20)
        if isinstance(message, str):
            self.events.append(json.loads(message))
            return self.events[-1]
        size = int.from_bytes(message[:4], "big")
        self.chunks.append({**json.loads(message[4 : 4 + size]), "data": message[4 + size :]})
        return self.chunks[-1]

    def until(self, kind):
        """Return the next message of a kind; chunks that come before it are for the next ``until("chunk")``."""
        if kind == "chunk" and self._passed:
            return self._passed.pop(0)
        while (message := self.receive())["type"] != kind:
            if message["type"] == "chunk":
                self._passed.append(message)
        return message

    def pull(self, count):
        """Return the frames of ``count`` further chunks, uint8 ``[n, 16, 16, 3]``."""
        parts = []
        for _ in range(count):
            chunk = self.until("chunk")
            self.send("pull", upto=chunk["index"] + 1, received=chunk["index"] + 1)
            with Image.open(io.BytesIO(chunk["data"])) as image:
                parts.append(np.asarray(image.convert("RGB")).reshape(chunk["count"], 16, 16, 3))
        return np.concatenate(parts)

    def closed(self):
        """Return code and reason of the close, after all that comes before it."""
        try:
            while True:
                self.receive()
        except ConnectionClosed as error:
            return error.rcvd.code, error.rcvd.reason

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._opening.__exit__(None, None, None)


@pytest.fixture
def live(programs, tmp_path):
    """Return a running server."""
    with Server(programs, tmp_path / "recordings") as running:
        yield running
