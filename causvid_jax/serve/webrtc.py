"""Films over WebRTC: a peer receives the frames of one session as a video track; the WebSocket steers the session.

The session's WebSocket starts with the format ``webrtc``. The client then posts an offer with the session's token and
gets the answer (RFC 8829). The track plays at the recipe's rate, and requests each block shortly before it needs it.
"""

import asyncio
import collections
import contextlib
import ipaddress
import logging
import secrets
from fractions import Fraction
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from causvid_jax.config import ConfigError, require
from causvid_jax.media.writer import enlarge
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.session import Chunk, Session
from causvid_jax.serve.settings import Settings

_LOG = logging.getLogger(__name__)
CONNECT_SECONDS = 20.0
"""Time from the answer until the peer is connected."""
LEAST_LEAD = 0.12
"""Minimum seconds of film that are left when the next block is requested."""
_CLOCK = 90_000


class FilmTrack(MediaStreamTrack):
    """A video track with the frames of a session, each at its time.

    Chunks are confirmed when their last frame is sent, so at most ``--ahead`` blocks wait, and no block is lost.
    """

    kind = "video"

    def __init__(self, engine: Engine, session: Session):
        super().__init__()
        self._engine, self._session = engine, session
        self._event_loop = asyncio.get_running_loop()
        self._made = asyncio.Event()
        self._frames: collections.deque[tuple[Chunk, int]] = collections.deque()  # that wait, as chunk and position
        self._next = session.confirmed  # index of the chunk to fetch next
        self._asked: float | None = None
        self._delays: collections.deque[float] = collections.deque([0.2], maxlen=5)  # from the request to the block
        self._first = self._due = 0.0
        session.on_frames = self._wake

    def _wake(self, _: np.ndarray) -> None:
        """Notify the track of a new block; the worker calls it."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._event_loop.call_soon_threadsafe(self._made.set)

    def stop(self) -> None:
        """End the track; it requests no further blocks."""
        if self._session.on_frames == self._wake:
            self._session.on_frames = lambda frames: None
        super().stop()

    async def recv(self) -> av.VideoFrame:
        """Return the next frame at its time. If it is late, all later frames move by the delay.

        Raises:
            MediaStreamError: the track has ended.
        """
        chunk, position = await self._take()
        self._session.seen = self._engine.clock()
        now = self._event_loop.time()
        if now > self._due + 1 / self._engine.fps:  # the first frame, or one that is late
            self._due = now
            self._first = self._first or now
        await asyncio.sleep(self._due - now)
        if position == 0:
            self._session.emit(**chunk.header("webrtc"))
        picture = enlarge(chunk.frames[position : position + 1], self._engine.pixel_size)[0]
        frame = av.VideoFrame.from_ndarray(picture, "rgb24")
        frame.time_base, frame.pts = Fraction(1, _CLOCK), round((self._due - self._first) * _CLOCK)
        self._due += 1 / self._engine.fps
        return frame

    async def _take(self) -> tuple[Chunk, int]:
        """Return the next frame as its chunk and its position there."""
        while True:
            if self.readyState != "live":
                raise MediaStreamError
            self._made.clear()
            self._fetch()
            frame = self._frames.popleft() if self._frames else None
            self._pull()
            if frame is not None:
                return frame
            await self._made.wait()

    def _fetch(self) -> None:
        """Queue the frames of new chunks, and drop those of an earlier take."""
        for chunk in self._engine.chunks(self._session, self._next):
            self._frames.extend((chunk, position) for position in range(len(chunk.frames)))
            self._next = chunk.index + 1
            if self._asked is not None:
                self._delays.append(min(self._event_loop.time() - self._asked, 1.0))  # it may have been paused
                self._asked = None
        while self._frames and self._frames[0][0].take != self._session.take:
            self._frames.popleft()

    def _pull(self) -> None:
        """Confirm sent chunks; request a block when the remaining film is 1.5 times the recent delay."""
        received = self._frames[0][0].index if self._frames else self._next
        lead = max(LEAST_LEAD, 1.5 * max(self._delays))
        asks = self._asked is None and len(self._frames) / self._engine.fps <= lead
        if asks:
            self._asked = self._event_loop.time()
        if asks or received > self._session.confirmed:
            self._engine.pull(self._session, self._next if asks else self._next - 1, received)


class Peers:
    """The sessions whose WebSocket chose WebRTC, each with at most one peer."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._peers: dict[Session, RTCPeerConnection | None] = {}
        self._ends: set[asyncio.Future[None]] = set()
        self._lock = asyncio.Lock()  # one offer at a time

    def admit(self, session: Session) -> None:
        """Allow a peer to receive the session."""
        self._peers.setdefault(session, None)

    async def drop(self, session: Session) -> None:
        """Close the session's peer and admit no other."""
        peer = self._peers.pop(session, None)
        if peer is not None:
            await _close(peer)

    async def close(self) -> None:
        """Drop all sessions."""
        for session in list(self._peers):
            await self.drop(session)

    async def answer(self, token: str, offer: str) -> str:
        """Return the SDP answer to a client's offer. The new peer replaces an existing one.

        Raises:
            ConfigError: the offer asks for anything but one video, or no session of this token chose WebRTC.
        """
        offer = _without_candidates(offer)
        async with self._lock:
            session = next((s for s in self._peers if secrets.compare_digest(s.token.encode(), token.encode())), None)
            if session is None:
                raise ConfigError("no session of this token waits for WebRTC; start it with the format webrtc")
            old, self._peers[session] = self._peers[session], None
            if old is not None:
                await _close(old)
            peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
            try:
                answer = await self._negotiate(peer, session, offer)
                require(session in self._peers, "the session has ended")
            except BaseException:
                await _close(peer)
                raise
            self._peers[session] = peer
            self._watch(peer, session)
            return answer

    async def _negotiate(self, peer: RTCPeerConnection, session: Session, offer: str) -> str:
        transceiver = peer.addTransceiver(FilmTrack(self._engine, session), direction="sendonly")
        try:
            await peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            answer = await peer.createAnswer()
        except Exception as error:  # the parser fails in many ways
            _LOG.info("an offer was refused: %s", repr(error))  # a log that kept the error would keep the peer
            raise ConfigError("the offer is no SDP that can be answered") from error
        _listen_at(transceiver, addresses(self._engine.settings))
        await peer.setLocalDescription(answer)
        require(transceiver.currentDirection == "sendonly", "the offer receives no video")
        return str(peer.localDescription.sdp)

    def _watch(self, peer: RTCPeerConnection, session: Session) -> None:
        """Close the peer when its connection ends or is not established in time."""

        async def end() -> None:
            if self._peers.get(session) is peer:
                self._peers[session] = None
                await _close(peer)

        async def changed() -> None:
            if peer.connectionState in ("connected", "failed", "closed"):
                timer.cancel()
            if peer.connectionState in ("failed", "closed"):
                await end()

        def expire() -> None:
            session.emit("error", message=f"WebRTC did not connect within {CONNECT_SECONDS:.0f} s")
            task = asyncio.ensure_future(end())
            self._ends.add(task)
            task.add_done_callback(self._ends.discard)

        timer = asyncio.get_running_loop().call_later(CONNECT_SECONDS, expire)
        peer.on("connectionstatechange", changed)


async def _close(peer: RTCPeerConnection) -> None:
    for sender in peer.getSenders():
        if sender.track is not None:
            sender.track.stop()
    await peer.close()


def addresses(settings: Settings) -> list[str] | None:
    """Return the addresses that are offered to peers; None: all of the machine except loopback."""
    if settings.host == "localhost":
        return ["127.0.0.1"]
    try:
        return None if ipaddress.ip_address(settings.host).is_unspecified else [settings.host]
    except ValueError:
        return None


def _listen_at(transceiver: Any, hosts: list[str] | None) -> None:
    """Restrict the peer to these addresses; by default aiortc uses all except loopback."""
    connection = transceiver.sender.transport.transport.iceGatherer._connection
    gather = connection.get_component_candidates

    def only(component: int, addresses: list[str], **options: Any) -> Any:
        return gather(component=component, addresses=addresses if hosts is None else hosts, **options)

    connection.get_component_candidates = only


def _without_candidates(offer: str) -> str:
    """Return the offer without the client's addresses.

    The server uses only an address from which a check with the answer's password arrives, so a client cannot make it
    send to others.

    Raises:
        ConfigError: the offer has other media than one video.
    """
    lines = offer.splitlines()
    media = [line for line in lines if line.startswith("m=")]
    require(len(media) == 1 and media[0].startswith("m=video "), "the offer must have one video and nothing else")
    result = [line for line in lines if not line.startswith(("a=candidate:", "a=end-of-candidates"))]
    return "\r\n".join(result) + "\r\n"
