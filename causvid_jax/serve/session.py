"""One viewer's film on the server: the viewer's commands, and the output that is not sent yet.

The engine's lock guards all fields.
"""

import collections
import dataclasses
import secrets
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from causvid_jax.config import require
from causvid_jax.sampling import schedule
from causvid_jax.sampling.script import Script
from causvid_jax.serve.film import Film, Replay
from causvid_jax.serve.fragments import Recording

MOST_COMMANDS = 32
MOST_EVENTS = 128
Status = Literal["queued", "running", "ended"]


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a film: a prompt, a script to replay, or the id of a snapshot to continue.

    A film with a prompt may start from ``picture``, uint8 ``[H, W, 3]``, or follow ``video``, uint8 ``[T, H, W, 3]``,
    to its end at ``strength`` (up to 1).
    """

    prompt: str = ""
    seed: int = 0
    script: Script | None = None
    snapshot: str | None = None
    picture: np.ndarray | None = None
    video: np.ndarray | None = None
    strength: float = schedule.DEFAULT_STRENGTH


@dataclasses.dataclass(frozen=True)
class Change:
    """A switch of the prompt.

    Attributes:
        prompt: the new prompt.
        context: keep, recompute or reset the cache.
        blend: number of blocks over which the embeddings change; 0: at once.
        id: the client's number of the message.
    """

    prompt: str
    context: str
    blend: int = 0
    id: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The frames of a block.

    Attributes:
        index: of the chunk in the session; a reconnecting client names the next chunk that it needs.
        take: number of the film in the session; each start has a new one.
        block: of the film.
        frame: index in the film of the chunk's first pixel frame.
        start: number of frames of this take before the chunk, where a player puts it.
        frames: uint8 ``[n, H, W, 3]``.
        prompt: of these frames.
        knows: ``id`` of the latest change that affects these frames.
        seconds: that the device took for the block.
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
        """Return the header of the chunk for a client that gets it as ``format``."""
        names = ("index", "take", "block", "frame", "start", "prompt", "knows")
        header: dict[str, Any] = {"type": "chunk", **{name: getattr(self, name) for name in names}}
        return header | {"format": format, "count": len(self.frames), "seconds": round(self.seconds, 4)}


class Session:
    """A film, the commands for it, and the chunks and events that its viewer has not confirmed.

    Attributes:
        id: name of the session in logs; it is not secret.
        token: secret for resuming a lost connection.
        ahead: the maximum number of unconfirmed chunks that are kept for a client.
        keeps: whether chunks are kept until they are confirmed; False for jobs.
        take: number of the film in the session.
        starts: number of films that the client asked for so far.
        begun: index of the film's first chunk.
        made: number of chunks so far.
        shown: number of frames of this take so far.
        knows: ``id`` of the latest change that affects the film.
        credit: chunks with an index below it may be made; the client sets it.
        confirmed: chunks below this index have arrived.
        seen: time of the client's last message, in seconds of the engine's clock, as all times here.
        lost: time when the connection was lost; None while the connection exists.
        on_output: called when there is an event or a chunk to send.
        on_frames: called with the uint8 frames ``[n, H, W, 3]`` of every block.
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
        self.starts = self.begun = 0
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
        """Queue ``command``, which the worker runs before the next block.

        Raises:
            ConfigError: too many commands are waiting.
        """
        require(len(self.commands) < MOST_COMMANDS, "too many commands at once; wait for their answers")
        self.commands.append(command)

    def has_film(self) -> Film:
        """Return the film.

        Raises:
            ConfigError: none has begun, because its start was refused.
        """
        require(self.film is not None, "no film has begun; send start")
        assert self.film is not None
        return self.film

    def is_idle(self, now: float, seconds: float) -> bool:
        """Whether a connected client has sent nothing for ``seconds``. In the queue there is nothing to send."""
        return self.status == "running" and self.lost is None and now - self.seen > seconds

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
        """Remove the chunks below ``received``."""
        self.confirmed = max(self.confirmed, min(received, self.made))
        while self.chunks and self.chunks[0].index < self.confirmed:
            self.chunks.popleft()

    def emit(self, type: str, **values: Any) -> None:
        """Queue an event for the client; if there are too many, drop the oldest."""
        self.events.append({"type": type, **values})
        self.on_output()
