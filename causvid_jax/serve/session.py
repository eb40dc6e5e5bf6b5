"""One viewer's film on the server: what the viewer asks for, and what waits to be sent.

The engine's lock guards all of it.
"""

import collections
import dataclasses
import secrets
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from causvid_jax.config import require
from causvid_jax.sampling.script import Script
from causvid_jax.serve.film import Film, Replay
from causvid_jax.serve.fragments import Recording

MOST_COMMANDS = 32
MOST_EVENTS = 128
Status = Literal["queued", "running", "ended"]


@dataclasses.dataclass(frozen=True)
class Start:
    """What a film starts from: a prompt, or a script to replay, or a snapshot to go on from.

    A film of a prompt may start from a picture, or follow a video to its end at a strength.
    """

    prompt: str = ""
    seed: int = 0
    script: Script | None = None
    snapshot: str | None = None
    picture: np.ndarray | None = None
    video: np.ndarray | None = None
    strength: float = 0.5


@dataclasses.dataclass(frozen=True)
class Change:
    """Another prompt; ``id`` is the client's number of the message."""

    prompt: str
    context: str
    blend: int = 0
    id: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The frames of a block.

    Attributes:
        index: of the chunk in the session; a reconnecting client names the next one that it wants.
        take: counts the films of the session: each start is a new one.
        block: of the film.
        frame: of the film, the first of the chunk.
        start: frames of this take before the chunk, where a player puts it.
        frames: uint8 ``[n, H, W, 3]``.
        prompt: that holds.
        knows: ``id`` of the latest change that the frames know of.
        seconds: the device's time for it.
    """

    index: int
    take: int
    block: int
    frame: int
    start: int
    frames: np.ndarray
    prompt: str
    knows: int
    seconds: float

    def header(self, format: str) -> dict[str, Any]:
        """Return what a client is told of the chunk."""
        names = ("index", "take", "block", "frame", "start", "prompt", "knows")
        header: dict[str, Any] = {"type": "chunk", **{name: getattr(self, name) for name in names}}
        return header | {"format": format, "count": len(self.frames), "seconds": round(self.seconds, 4)}


class Session:
    """A film, the commands for it, and the chunks and events that its viewer has not confirmed.

    Attributes:
        id: names the session in logs; it is no secret.
        token: lets a lost connection be taken up again.
        credit: the client's permission: chunks with an index below it may be made.
        confirmed: chunks below this index have arrived.
        seen: when the client last said something.
        lost: when its connection broke; None while it has one.
    """

    def __init__(self, address: str, now: float, *, ahead: int, keeps: bool = True):
        self.id, self.token = secrets.token_hex(4), secrets.token_urlsafe(24)
        self.address, self.ahead, self.keeps = address, ahead, keeps
        self.status: Status = "queued"
        self.film: Film | None = None
        self.playing: Replay | None = None
        self.commands: collections.deque[Callable[[], None]] = collections.deque()
        self.change: Change | None = None
        self.chunks: collections.deque[Chunk] = collections.deque()
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=MOST_EVENTS)
        self.take = self.shown = self.knows = 0
        self.made = self.confirmed = self.credit = 0
        self.paused = False
        self.input: collections.deque[np.ndarray] = collections.deque(maxlen=64)
        self.strength: float | None = None
        self.picture: np.ndarray | None = None
        self.video: np.ndarray | None = None
        self.recording: Recording | None = None
        self.recorded_from = 0
        self.opened = self.seen = self.asked = now
        self.lost: float | None = None
        self.play_end: float | None = None
        self.last_chunk: float | None = None
        self.on_output: Callable[[], None] = lambda: None
        self.on_frames: Callable[[np.ndarray], None] = lambda frames: None

    def post(self, command: Callable[[], None]) -> None:
        """Let the worker run ``command`` before the next block.

        Raises:
            ConfigError: too many wait already.
        """
        require(len(self.commands) < MOST_COMMANDS, "too many commands at once; wait for their answers")
        self.commands.append(command)

    def wants_device(self) -> bool:
        """Whether the worker has something to do for the session."""
        return self.status == "running" and (bool(self.commands) or self.change is not None or self.may_generate())

    def may_generate(self) -> bool:
        """Whether a block may be made: the client allows it, and few enough are not confirmed."""
        return (
            self.film is not None
            and not self.paused
            and self.made < self.credit
            and self.made - self.confirmed < self.ahead
        )

    def confirm(self, received: int) -> None:
        """Forget chunks below ``received``."""
        self.confirmed = max(self.confirmed, min(received, self.made))
        while self.chunks and self.chunks[0].index < self.confirmed:
            self.chunks.popleft()

    def emit(self, type: str, **values: Any) -> None:
        """Queue an event for the client; of too many the oldest are dropped."""
        self.events.append({"type": type, **values})
        self.on_output()
