"""The WebSocket ``/v1/stream``: one connection of one session."""

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import reason
from causvid_jax.sampling import schedule, script
from causvid_jax.serve import fragments, protocol, uploads
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.session import Change, Chunk, Session, Start
from causvid_jax.serve.settings import Settings

if TYPE_CHECKING:
    from causvid_jax.serve.webrtc import Peers

_LOG = logging.getLogger(__name__)
FIRST_MESSAGE_SECONDS = 10.0
SEND_SECONDS = 20.0
"""Time after which a client that accepts no data is disconnected; its session can be resumed."""
BURST, RATE = 2000, 200
"""Messages that a client may send at once, and per second on average."""
REFUSED, SLOW, TOO_MANY, ENDED = 4400, 4408, 4429, 4410
GOING_AWAY = 1001
"""Close code of a browser that leaves the page. A lost connection has no close code, so its session waits."""


class Refused(Exception):
    """Close the connection with a code and one sentence."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


class Connection:
    """A connected client: a task that reads its messages, and one that sends events and chunks."""

    def __init__(self, socket: WebSocket, engine: Engine, peers: "Peers | None" = None):
        self.socket, self.engine, self.peers = socket, engine, peers
        self.settings: Settings = engine.settings
        self.session: Session | None = None
        self.format: protocol.Format = "webp" if engine.recipe.video.height < 256 else "mp4"
        self._output = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._next = 0  # index of the chunk to send next
        self._tokens, self._refilled = float(BURST), time.monotonic()

    async def run(self) -> None:
        """Serve the client until it leaves or is refused."""
        code, reason = 1000, ""
        try:
            await self._hello()
            tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # both may have failed
            for task in sorted(done, key=tasks.index):  # the reader has the reason for which the client left
                task.result()
        except Refused as refusal:
            code, reason = refusal.code, refusal.reason
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            code = 0  # the client has disconnected
            if self.session is not None and getattr(error, "code", 0) == GOING_AWAY and self._is_current(self.session):
                await asyncio.to_thread(self.engine.close, self.session, "the page was left")
        finally:
            if self.session is not None and self.engine.lose(self.session, self._wake) and self.peers is not None:
                await self.peers.drop(self.session)
        if code and self.socket.client_state is WebSocketState.CONNECTED:
            await self._close(code, reason)

    async def _close(self, code: int, reason: str) -> None:
        short = reason.encode()[:120].decode(errors="ignore")
        try:
            await asyncio.wait_for(self.socket.close(code, short), 5)
        except (TimeoutError, RuntimeError, OSError, WebSocketDisconnect):
            _LOG.info("a connection was cut off: %s", reason)

    def _wake(self) -> None:
        """Wake the writing task because there is something to send; any thread may call it."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._output.set)

    # ---- reading ----

    async def _hello(self) -> None:
        """Accept, describe the server, and open or resume a session by the first message."""
        offered = self.socket.scope.get("subprotocols", [])
        await self.socket.accept(protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None)
        if not self.engine.ready.is_set():
            raise Refused(REFUSED, self.engine.failure or "the server is still starting; try again in a moment")
        await self.socket.send_json({"type": "hello", **describe(self.engine)})
        try:
            message, payload = await asyncio.wait_for(self._receive(), FIRST_MESSAGE_SECONDS)
        except TimeoutError:
            raise Refused(REFUSED, f"no message came within {FIRST_MESSAGE_SECONDS:.0f} s") from None
        if not isinstance(message, protocol.Start | protocol.Resume):
            raise Refused(REFUSED, "the first message must be start or resume")
        try:
            self._choose(message.format)
        except ConfigError as error:
            raise Refused(REFUSED, str(error)) from error
        if isinstance(message, protocol.Resume):
            received = None if self.format == "webrtc" else message.received  # the peer's track confirms
            self.session = self.engine.attach(message.token, received, self._wake)
            if self.session is None:
                raise Refused(ENDED, "this session has ended and cannot be resumed")
            self._next = self.session.confirmed
        else:
            address = self.socket.client.host if self.socket.client else ""
            try:
                self.session = self.engine.open(await self._start(message, payload), address)
            except ConfigError as error:
                raise Refused(REFUSED, str(error)) from error
            self.session.on_output = self._wake
        await self._use_peers(self.session)
        opened = {"type": "session", "token": self.session.token, "id": self.session.id}
        await self.socket.send_json(opened | {"resumed": isinstance(message, protocol.Resume)})
        self._output.set()

    async def _receive(self) -> tuple[Any, bytes]:
        """Return the next message.

        Raises:
            Refused: it is malformed, or there are too many.
        """
        now = time.monotonic()
        self._tokens = min(BURST, self._tokens + RATE * (now - self._refilled)) - 1
        self._refilled = now
        if self._tokens < 0:
            raise Refused(TOO_MANY, f"more than {RATE} messages a second")
        raw = await self.socket.receive()
        if raw["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(raw.get("code", 1005))
        data = raw.get("text")
        try:
            return protocol.read(raw.get("bytes") or b"" if data is None else data)
        except ConfigError as error:
            raise Refused(REFUSED, str(error)) from error

    async def _read(self) -> None:
        session = self.session
        assert session is not None
        while session.status != "ended":
            message, payload = await self._receive()
            self._check_current(session)
            session.seen = self.engine.clock()
            try:
                await self._obey(session, message, payload)
            except ConfigError as error:
                session.emit("error", message=reason(error))
        await asyncio.sleep(3600)  # the writer sends the reason and closes

    def _is_current(self, session: Session) -> bool:
        return session.on_output == self._wake

    def _check_current(self, session: Session) -> None:
        if not self._is_current(session):
            raise Refused(ENDED, "another connection has taken up this session")

    async def _obey(self, session: Session, message: Any, payload: bytes) -> None:
        engine = self.engine
        match message:
            case protocol.Pull():
                engine.pull(session, message.upto, message.received)
            case protocol.Prompt():
                self.settings.check_prompt(message.prompt)
                engine.change(session, Change(message.prompt, message.context, message.blend, message.id))
            case protocol.Pause():
                engine.pause(session, message.paused)
            case protocol.Input():
                require(engine.follows_videos, "this server cannot follow a video")
                given = message.strength
                require(
                    bool(payload) or given is None,
                    f"strength is {given} without a picture; an input without a picture ends the video",
                )
                strength = schedule.DEFAULT_STRENGTH if given is None else given
                if payload:
                    schedule.strength_step(engine.recipe.diffusion, strength)  # refuses what is out of bounds
                engine.follow(session, await self._picture(payload) if payload else None, strength)
            case protocol.Snapshot():
                engine.snapshot(session, message.name)
            case protocol.TellScript():
                engine.script(session)
            case protocol.Record():
                engine.record(session, message.on)
            case protocol.Start():
                engine.restart(session, await self._start(message, payload))
                await self._use_peers(session)
            case protocol.Stop():
                await asyncio.to_thread(engine.close, session, "the client ended it")
            case _:
                raise ConfigError("a session can be resumed by the first message only")

    def _choose(self, format: protocol.Format | None) -> None:
        offers = format != "webrtc" or self.peers is not None
        require(offers, "this server has no WebRTC; it is started with --webrtc")
        self.format = format or self.format

    async def _use_peers(self, session: Session) -> None:
        """Let a peer receive the session if the client chose WebRTC, and none otherwise."""
        if self.peers is not None and self.format == "webrtc":
            self.peers.admit(session)
        elif self.peers is not None:
            await self.peers.drop(session)

    async def _start(self, message: protocol.Start, payload: bytes) -> Start:
        self._choose(message.format)
        given = [name for name in ("script", "snapshot") if getattr(message, name) is not None]
        if given:
            given += [name for name in ("prompt", "seed") if getattr(message, name)]
            given += ["a picture"] if payload else []
            require(len(given) == 1, f"start has {' and '.join(given)}; a script or a snapshot is given alone")
        else:
            self.settings.check_prompt(message.prompt)
        return Start(
            prompt=message.prompt,
            seed=message.seed,
            script=None if message.script is None else script.from_json(message.script),
            snapshot=message.snapshot,
            picture=await self._picture(payload) if payload else None,
        )

    async def _picture(self, payload: bytes) -> Any:
        video = self.engine.recipe.video
        most = self.settings.picture_pixels
        return await asyncio.to_thread(uploads.decode_picture, payload, video.height, video.width, most)

    # ---- writing ----

    async def _write(self) -> None:
        session = self.session
        assert session is not None
        while True:
            await self._output.wait()
            self._output.clear()
            self._check_current(session)
            while session.events:
                event = session.events.popleft()
                try:
                    await self._send(self.socket.send_json(event))
                except BaseException:
                    session.events.appendleft(event)  # for the connection that takes up the session
                    raise
                if event["type"] == "ended":
                    raise Refused(ENDED if event["reason"] != "the client ended it" else 1000, event["reason"])
            for chunk in self.engine.chunks(session, self._next) if self.format != "webrtc" else ():
                message = await asyncio.to_thread(self._encode, chunk)
                await self._send(self.socket.send_bytes(message))
                self._next = chunk.index + 1

    async def _send(self, sending: Any) -> None:
        try:
            await asyncio.wait_for(sending, SEND_SECONDS)
        except TimeoutError:
            raise Refused(SLOW, f"the client took nothing for {SEND_SECONDS:.0f} s") from None

    def _encode(self, chunk: Chunk) -> bytes:
        header = chunk.header(self.format)
        if self.format == "webp":
            return protocol.write(header, fragments.encode_strip(chunk.frames))
        engine = self.engine
        begin, data = fragments.encode_block(chunk.frames, chunk.start, chunk.index, engine.fps, engine.pixel_size)
        header["init"] = len(begin)
        return protocol.write(header, begin + data)


def describe(engine: Engine) -> dict[str, Any]:
    """Return what a client must know of the server: sizes, rate, formats, vocabulary, accepted inputs and limits."""
    recipe, settings = engine.recipe, engine.settings
    return {
        "version": protocol.SUBPROTOCOL,
        "recipe": recipe.name,
        "width": recipe.video.width,
        "height": recipe.video.height,
        "fps": engine.fps,
        "format": "webp" if recipe.video.height < 256 else "mp4",
        "codec": fragments.CODEC,
        "webrtc": settings.webrtc,
        "vocabulary": list(recipe.text.vocabulary) if recipe.text.kind == "words" else None,
        "pictures": engine.has_encoder,
        "videos": engine.follows_videos,
        "needs_picture": engine.has_branch,
        "prompt_characters": settings.prompt_characters,
        "message_bytes": settings.message_bytes,
        "resume_seconds": settings.resume_seconds,
    }
