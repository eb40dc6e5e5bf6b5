"""The worker of the device: it generates the blocks of all sessions in turn, and no other thread uses the device.

Any thread may call the public methods; they only change the sessions under a lock. :meth:`Engine.run` is the worker
thread. Tests call :meth:`Engine.step` instead, with their own clock.
"""

import collections
import logging
import pathlib
import secrets
import threading
import time
from collections.abc import Callable

import numpy as np

from causvid_jax.config import ConfigError, Recipe, RunError, require
from causvid_jax.config.files import reason as sentence
from causvid_jax.media.output import remove_abandoned
from causvid_jax.models.image_branch import has_branch
from causvid_jax.sampling import schedule
from causvid_jax.serve.film import Film, Replay
from causvid_jax.serve.fragments import Recording, remove_old
from causvid_jax.serve.metrics import Metrics
from causvid_jax.serve.programs import Programs
from causvid_jax.serve.session import Change, Chunk, Session, Start
from causvid_jax.serve.settings import Settings
from causvid_jax.serve.snapshots import Snapshots

_LOG = logging.getLogger(__name__)


class Engine:
    """Sessions of one recipe on one device or mesh.

    Args:
        recipe: that is served.
        load: returns its programs; the worker calls it.
        settings: limits and times.
        clock: returns monotonic seconds.

    Attributes:
        ready: set once every program is compiled.
        failure: error message of a worker that has ended; "" otherwise.
        fps: pixel frames per second of the films.
        pixel_size: side of the square of pixels that shows one pixel of a film.
    """

    def __init__(
        self,
        recipe: Recipe,
        load: Callable[[], Programs],
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.recipe, self.settings, self.clock = recipe, settings, clock
        self.metrics = Metrics(recipe.name)
        self._load = load
        self._programs: Programs | None = None
        self.ready = threading.Event()
        self.failure = ""
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._turns: collections.deque[Session] = collections.deque()  # running ones, the next turn first
        self._queue: collections.deque[Session] = collections.deque()
        self._snapshots = Snapshots(settings.snapshot_bytes)
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.fps = recipe.video.fps
        self.pixel_size = max(1, 256 // recipe.video.height)

    # ---- the worker ----

    @property
    def programs(self) -> Programs:
        """The compiled programs.

        Raises:
            ConfigError: it is not loaded yet.
        """
        if self._programs is None:
            raise ConfigError("the server is still starting; try again in a moment")
        return self._programs

    @property
    def has_encoder(self) -> bool:
        """Whether pictures are accepted."""
        return self._programs is not None and self._programs.has_encoder

    @property
    def has_branch(self) -> bool:
        """Whether the student has an image branch, so that every film starts from a picture and follows no video."""
        return has_branch(self.recipe.student)

    @property
    def follows_videos(self) -> bool:
        """Whether videos are accepted."""
        return self.has_encoder and not self.has_branch

    def check_input(self, picture: bool, video: bool) -> None:
        """Refuse a picture or a video that the student cannot read, and a start without the picture that it needs.

        Raises:
            ConfigError: an input that is not accepted (the message names what is), or the programs are not loaded yet.
        """
        if picture or video:
            require(self.programs.has_encoder, "this server reads neither pictures nor videos")
        require(
            not (self.has_branch and video), "this student has an image branch and follows no video; send a picture"
        )
        require(
            picture or not self.has_branch, "this student has an image branch; send the picture that it starts from"
        )

    def load(self) -> None:
        """Load the weights and compile every program; first remove unfinished files of a killed server.

        Raises:
            ConfigError: recordings would be written to a file, or weights are missing or do not fit.
        """
        begin, folder = time.perf_counter(), pathlib.Path(self.settings.recordings)
        require(folder.is_dir() or not folder.exists(), f"--recordings is {str(folder)!r}, a file; give a directory")
        remove_abandoned(folder)
        self._programs = self._load()
        self._programs.warm_up()
        self.ready.set()
        _LOG.info("ready after %.1f s of loading and compiling", time.perf_counter() - begin)

    def start(self) -> None:
        """Start the worker thread; it loads and warms up first."""
        self._thread = threading.Thread(target=self.run, name="device", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Work until :meth:`stop`."""
        try:
            self.load()
            while not self._stopping:
                if not self.step():
                    with self._work:
                        if not self._stopping and not any(session.wants_device() for session in self._turns):
                            self._work.wait(1.0)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            _LOG.error("the device worker has ended", exc_info=not isinstance(error, ConfigError))
            for session in self.sessions():
                self.close(session, "the server's device has failed")

    def step(self) -> bool:
        """Run the commands of the next session and generate a block of it; return False if there is no work."""
        with self._lock:
            session = next((session for session in self._turns if session.wants_device()), None)
            if session is None:
                return False
            self._turns.remove(session)
            self._turns.append(session)
            commands = list(session.commands)
            session.commands.clear()
        for command in commands:
            self._guarded(session, command)
        self._guarded(session, lambda: self._apply(session))
        with self._lock:
            generates = session.may_generate()
        if generates:
            self._guarded(session, lambda: self._generate(session), fatal=True)
        return True

    def _guarded(self, session: Session, action: Callable[[], None], fatal: bool = False) -> None:
        """Run an action of one session. An error becomes an event of that session and does not affect others."""
        try:
            action()
        except (ConfigError, RunError) as error:
            session.emit("error", message=sentence(error))
            if fatal:
                self.close(session, sentence(error))
        except Exception:
            _LOG.exception("session %s failed", session.id)
            self.close(session, "the server failed on this film; the log says why")

    def _apply(self, session: Session) -> None:
        """Apply the latest change of prompt; earlier changes that no block has used are skipped."""
        with self._lock:
            change, session.change = session.change, None
        if change is None:
            return
        film = session.has_film()
        film.change(change.prompt, change.context, change.blend)
        session.playing, session.knows = None, change.id  # a replay ends where it is changed
        session.emit("changed", id=change.id, block=film.block, prompt=change.prompt)

    def _generate(self, session: Session) -> None:
        film, playing, begin = session.has_film(), session.playing, time.perf_counter()
        block, frame, starts = film.block, film.frame, session.starts
        frames = playing.step() if playing is not None else film.step(*self._input(session))
        seconds = time.perf_counter() - begin
        self._record(session, frames)
        with self._lock:
            chunk = Chunk(
                session.made, session.take, block, frame, session.shown, frames, film.prompt, session.knows, seconds
            )
            session.made += 1
            session.shown += len(frames)
            if session.keeps:
                session.chunks.append(chunk)
            else:
                session.confirmed = session.made
            self.metrics.block(session, len(frames) / self.fps, seconds, self.clock())
        session.on_frames(frames)
        session.on_output()
        if playing is not None and playing.finished:
            same = playing.same if playing.script.sha256 else None
            session.emit("replayed", same=same, blocks=film.block)
            session.playing = None
            if session.starts == starts:  # no other film waits to begin
                session.paused = True

    def _input(self, session: Session) -> tuple[np.ndarray | None, float | None]:
        """Return the picture or video frames for the next block, and the strength."""
        with self._lock:
            if session.picture is not None:
                picture, session.picture = session.picture, None
                return picture[None], None
            if session.video is not None and session.film is not None:
                frames = session.film.frames_of(session.video)
                return frames, None if frames is None else session.strength
            if session.strength is not None and session.input:
                return np.stack(session.input), session.strength
        return None, None

    def _record(self, session: Session, frames: np.ndarray) -> None:
        recording = session.recording
        if recording is None:
            return
        try:
            recording.append(frames)
        except RunError as error:
            session.emit("error", message=sentence(error))
            self._finish_recording(session)

    # ---- sessions ----

    def open(self, start: Start, address: str = "", job: Callable[[Session], None] | None = None) -> Session:
        """Return a new session, running or in the queue.

        Args:
            start: of its first film.
            address: of the client, whose sessions are counted; "": not counted.
            job: attaches a job, which takes chunks at once; without one a client confirms them.

        Raises:
            ConfigError: the queue is full, the address has too many sessions, or ``start`` is not possible.
        """
        require(not self._stopping, "the server is stopping")
        session = Session(address, self.clock(), ahead=self.settings.ahead, keeps=job is None)
        with self._lock:
            everyone = [*self._turns, *self._queue]
            mine = sum(other.address == address for other in everyone)
            require(
                not address or mine < self.settings.per_address,
                f"your address has {mine} sessions; accepted: {self.settings.per_address}",
            )
            full = len(self._turns) >= self.settings.sessions and len(self._queue) >= self.settings.queue
            require(not full, f"all {self.settings.sessions} places and the queue are taken; try again later")
            if job is not None:
                job(session)
            self._queue.append(session)
            self.restart(session, start)
            self._admit()
        return session

    def restart(self, session: Session, start: Start) -> None:
        """Start a new film in the session. A film that cannot be started becomes the event ``error``.

        This and other commands raise ConfigError if too many are waiting.
        """
        with self._work:
            session.post(lambda: self._begin(session, start))
            session.change, session.strength, session.paused = None, None, False
            session.starts += 1
            session.input.clear()
            self._work.notify()

    def _begin(self, session: Session, start: Start) -> None:
        """Create the session's film, in the worker thread."""
        with self._lock:
            snapshot = None if start.snapshot is None else self._snapshots.get(start.snapshot)
        self._finish_recording(session)
        playing = None
        if snapshot is not None:
            film = snapshot.fork()
        elif start.script is not None:
            playing = Replay(self.programs, start.script)
            film = playing.film
        else:
            self.check_input(start.picture is not None, start.video is not None)
            if start.video is not None:
                schedule.strength_step(self.recipe.diffusion, start.strength)  # refuses what is out of bounds
            # An image branch keeps the picture; for other students it is the first block.
            film = Film(self.programs, start.seed, start.prompt, picture=start.picture if self.has_branch else None)
        first_block = None if self.has_branch else start.picture
        with self._lock:
            session.film, session.playing, session.picture = film, playing, first_block
            session.video = start.video
            session.strength = start.strength if start.video is not None else session.strength
            session.take += 1
            session.shown = session.knows = 0
            session.play_end = session.last_chunk = None
            session.opened = session.asked = self.clock()
            session.chunks.clear()
            session.confirmed = session.begun = session.made
            session.credit = max(session.credit, session.made + 1)
        session.emit(
            "started", take=session.take, seed=film.seed, prompt=film.prompt, block=film.block, frame=film.frame
        )

    def change(self, session: Session, change: Change) -> None:
        """Switch the prompt from the next block on. If several changes wait, the latest is used."""
        with self._work:
            session.change = change
            self._work.notify()

    def pull(self, session: Session, upto: int, received: int) -> None:
        """Allow chunks with an index up to ``upto``, and confirm those below ``received``."""
        with self._work:
            session.confirm(received)
            if upto + 1 > session.credit:
                session.credit, session.asked = upto + 1, self.clock()
            self._work.notify()

    def chunks(self, session: Session, start: int) -> list[Chunk]:
        """Return the unconfirmed chunks from index ``start`` on."""
        with self._lock:
            return [chunk for chunk in session.chunks if chunk.index >= start]

    def pause(self, session: Session, paused: bool) -> None:
        """Pause or resume generation."""
        with self._work:
            session.paused = paused
            session.play_end = None
            self._work.notify()

    def follow(self, session: Session, frame: np.ndarray | None, strength: float | None) -> None:
        """Add a frame, uint8 ``[H, W, 3]``, of the video that the film follows at ``strength``; None ends it."""
        with self._lock:
            session.strength = None if frame is None else strength
            session.input.append(frame) if frame is not None else session.input.clear()

    def snapshot(self, session: Session, name: int) -> None:
        """Keep a copy of the film; the event ``snapshot`` has the id for a fork."""

        def take() -> None:
            self._snapshots.check(session.has_film())
            film = session.has_film().snapshot()
            with self._lock:
                key = self._snapshots.add(session.token, film)
            session.emit("snapshot", id=key, name=name, block=film.block, frame=film.frame, prompt=film.prompt)

        self._post(session, take)

    def script(self, session: Session) -> None:
        """Send the script so far as the event ``script``."""

        def tell() -> None:
            require(session.has_film().block > 0, "the film has no block yet")
            session.emit("script", script=session.has_film().script().to_json())

        self._post(session, tell)

    def record(self, session: Session, on: bool) -> None:
        """Start or finish a recording; events ``recording`` and ``recorded`` name it."""

        def switch() -> None:
            self._finish_recording(session)
            if on:
                film = session.has_film()
                name = f"{secrets.token_hex(12)}.mp4"
                path = pathlib.Path(self.settings.recordings) / name
                session.recording = Recording(path, self.fps, self.pixel_size, self.settings.recording_bytes)
                session.recorded_from = film.block
                session.emit("recording", name=name)

        self._post(session, switch)

    def _post(self, session: Session, command: Callable[[], None]) -> None:
        with self._work:
            session.post(command)
            self._work.notify()

    def _finish_recording(self, session: Session) -> None:
        with self._lock:
            (recording, session.recording), film = (session.recording, None), session.film
        if recording is None or film is None:
            return
        try:
            recording.close(film.script(), session.recorded_from)
        except RunError as error:
            session.emit("error", message=sentence(error))
        if recording.blocks:
            session.emit("recorded", name=recording.path.name, frames=recording.frames)
        self.remove_old_files()

    def remove_old_files(self) -> None:
        """Keep the newest ``kept`` videos of the recordings' directory."""
        remove_old(pathlib.Path(self.settings.recordings), self.settings.kept)

    # ---- coming and going ----

    def attach(self, token: str, received: int | None, on_output: Callable[[], None]) -> Session | None:
        """Connect a client to a session; return None if no session has this token, or a needed frame is gone.

        Chunks from ``received`` on are sent again; None: those that are not confirmed. Chunks of a former film are not
        sent again. An earlier connection that still exists is closed.
        """
        with self._lock:
            everyone = [*self._turns, *self._queue]
            session = next((s for s in everyone if secrets.compare_digest(s.token, token)), None)
            if session is None:
                return None
            received = session.confirmed if received is None else max(received, session.begun)
            if received < session.confirmed:
                return None
            session.confirm(received)
            session.lost, session.seen = None, self.clock()
            before, session.on_output = session.on_output, on_output
            before()
            return session

    def lose(self, session: Session, on_output: Callable[[], None]) -> bool:
        """Record that the session's connection is lost. It can be resumed for ``resume_seconds``.

        Returns:
            False if another connection, with another ``on_output``, has already resumed the session and keeps it.
        """
        with self._lock:
            if session.on_output != on_output:
                return False
            if session.status != "ended":
                session.lost = self.clock()
                session.on_output = lambda: None
            return True

    def close(self, session: Session, reason: str) -> None:
        """End a session; its recording is finished."""
        with self._lock:
            if session.status == "ended":
                return
            session.status = "ended"
            for line in (self._turns, self._queue):
                if session in line:
                    line.remove(session)
        self._finish_recording(session)
        session.emit("ended", reason=reason)
        session.film = session.playing = None
        session.chunks.clear()
        with self._work:
            self._admit()

    def tick(self) -> None:
        """End sessions that are idle or lost for longer than the settings allow; call it about every second."""
        now, limits = self.clock(), self.settings
        for session in self.sessions():
            if not session.keeps:  # a job
                continue
            if session.lost is not None and now - session.lost > limits.resume_seconds:
                self.close(session, "the connection was lost")
            elif session.is_idle(now, limits.idle_seconds):
                self.close(session, f"nothing was asked for {limits.idle_seconds:.0f} s")

    def _admit(self) -> None:
        while self._queue and len(self._turns) < self.settings.sessions:
            session = self._queue.popleft()
            session.status = "running"
            session.opened = session.asked = session.seen = self.clock()
            self._turns.appendleft(session)
            self._work.notify()
        for position, waiting in enumerate(self._queue, 1):
            waiting.emit("queued", position=position)
        self.metrics.sessions(len(self._turns), len(self._queue))

    def sessions(self) -> list[Session]:
        """Return all sessions, running and queued."""
        with self._lock:
            return [*self._turns, *self._queue]

    def stop(self) -> None:
        """End all sessions, finish their recordings, and end the worker."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join(30)
        for session in self.sessions():
            self.close(session, "the server is stopping")
