"""Generate videos in the background, in the format of OpenAI's video API; every job is a session like a viewer's."""

import collections
import dataclasses
import pathlib
import secrets
import threading
import time
from typing import Any, Literal

import numpy as np

from causvid_jax.config import ConfigError, require
from causvid_jax.sampling import blocks, schedule
from causvid_jax.sampling.script import size_of
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.fragments import Recording
from causvid_jax.serve.session import Session, Start

Status = Literal["queued", "in_progress", "completed", "failed"]


@dataclasses.dataclass
class Job:
    """A video that is waiting, being made, or finished.

    Attributes:
        seconds: length of the video.
        size: ``WIDTHxHEIGHT``.
        picture: to start from, uint8 ``[H, W, 3]``; None without a picture, and after the job has begun.
        video: to follow, uint8 ``[T, H, W, 3]``; None without a video, and after the job has begun.
        strength: distance from the video, up to 1.
        progress: percent.
        created_at, completed_at: seconds since 1970.
        error: sentence of a failed job.
        session: that makes the video.
        recording: that writes it.
        path: of the file.
    """

    id: str
    model: str
    prompt: str
    seed: int
    seconds: float
    size: str
    picture: np.ndarray | None = None
    video: np.ndarray | None = None
    strength: float = schedule.DEFAULT_STRENGTH
    status: Status = "queued"
    progress: float = 0.0
    created_at: int = dataclasses.field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None
    error: str | None = None
    session: Session | None = None
    recording: Recording | None = None
    path: pathlib.Path | None = None

    def public(self) -> dict[str, Any]:
        """Return the object ``video`` of the API."""
        return {
            "id": self.id,
            "object": "video",
            "model": self.model,
            "status": self.status,
            "progress": int(self.progress),
            "prompt": self.prompt,
            "seconds": f"{self.seconds:g}",
            "size": self.size,
            "seed": self.seed,
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "expires_at": None,
            "remixed_from_video_id": None,
            "error": None if self.error is None else {"code": "failed", "message": self.error},
        }


class Jobs:
    """The jobs of one server. One job runs at a time, in turn with the viewers' sessions."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._lock = threading.RLock()

    def create(
        self,
        prompt: str,
        *,
        model: str = "",
        seconds: float | None = None,
        size: str = "",
        seed: int | None = None,
        strength: float | None = None,
        picture: np.ndarray | None = None,
        video: np.ndarray | None = None,
    ) -> Job:
        """Queue a video, which may start from a picture or follow a video.

        Args:
            prompt: of the video.
            model: name of the recipe; "" accepts the one that is served.
            seconds: length; None: that of ``video``, or 4.
            size: ``WIDTHxHEIGHT``; "" accepts that of the recipe.
            seed: of the noise; None draws one.
            strength: distance from ``video``, up to 1 (None: the default, 0.5).
            picture: uint8 ``[H, W, 3]``.
            video: uint8 ``[T, H, W, 3]``.

        Raises:
            ConfigError: a value that this recipe cannot make, or too many jobs.
        """
        recipe, settings = self.engine.recipe, self.engine.settings
        ours = size_of(recipe)
        require(not model or model == recipe.name, f"model is {model!r}; accepted: {recipe.name}")
        require(not size or size == ours, f"size is {size!r}; accepted: {ours}")
        if seconds is None:
            seconds = 4.0 if video is None else len(video) / recipe.video.fps
        require(
            0 < seconds <= settings.seconds, f"seconds is {seconds:g}; accepted: above 0, up to {settings.seconds:g}"
        )
        settings.check_prompt(prompt)
        self.engine.check_input(picture is not None, video is not None)
        require(
            strength is None or video is not None,
            f"strength is {strength} without a video; it is the distance from the video in input_reference",
        )
        strength = schedule.DEFAULT_STRENGTH if strength is None else strength
        if video is not None:
            schedule.strength_step(recipe.diffusion, strength)  # refuses what is out of bounds
        if recipe.text.kind == "words":
            self.engine.programs.pipe.encode_prompt(prompt)
        seed = secrets.randbelow(2**32) if seed is None else seed
        require(0 <= seed < 2**32, f"seed is {seed}; accepted: 0 to {2**32 - 1}")
        job = Job(f"video_{secrets.token_hex(12)}", recipe.name, prompt, seed, seconds, ours, picture, video, strength)
        with self._lock:
            waiting = sum(other.status == "queued" for other in self._jobs.values())
            require(waiting < settings.jobs, f"{waiting} videos wait already; try again later")
            self._jobs[job.id] = job
            for old in [key for key, other in self._jobs.items() if other.completed_at][: -settings.kept]:
                self.delete(old)
        self._next()
        return job

    def get(self, key: str) -> Job | None:
        """Return the job with the id ``key``, or None."""
        return self._jobs.get(key)

    def all(self) -> list[Job]:
        """Return all jobs, the newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def delete(self, key: str) -> None:
        """Stop the job with the id ``key`` and remove its video; an unknown id does nothing."""
        with self._lock:
            job = self._jobs.pop(key, None)
        if job is None:
            return
        if job.session is not None:
            self.engine.close(job.session, "the job was deleted")
        if job.path is not None:
            job.path.unlink(missing_ok=True)
        self._next()

    def _next(self) -> None:
        with self._lock:
            if any(job.status == "in_progress" for job in self._jobs.values()):
                return
            job = next((job for job in self._jobs.values() if job.status == "queued"), None)
            if job is None:
                return
            job.status = "in_progress"
        try:
            self._begin(job)
        except ConfigError as error:
            self._finish(job, str(error))

    def _begin(self, job: Job) -> None:
        engine = self.engine
        total = max(1, round(job.seconds * engine.fps))
        last = blocks.block_of(total - 1, engine.recipe)
        path = pathlib.Path(engine.settings.recordings) / f"{job.id}.mp4"
        recording = Recording(path, engine.fps, engine.pixel_size, engine.settings.recording_bytes)
        job.recording, job.path = recording, path

        def on_frames(frames: np.ndarray) -> None:
            recording.append(frames[: total - recording.frames])
            job.progress = min(99.0, 100.0 * recording.frames / total)
            film = job.session.film if job.session is not None else None
            if recording.frames >= total and film is not None:
                script = dataclasses.replace(film.script(), length=total)
                recording.close(script, 0)
                self._finish(job)

        def on_output() -> None:
            for event in list(job.session.events if job.session is not None else ()):
                if event["type"] in ("error", "ended") and job.status == "in_progress":
                    self._finish(job, event.get("message") or event["reason"])

        def attach(session: Session) -> None:
            job.session, session.on_frames, session.on_output = session, on_frames, on_output

        start = Start(job.prompt, job.seed, picture=job.picture, video=job.video, strength=job.strength)
        job.picture = job.video = None
        engine.pull(engine.open(start, job=attach), last, 0)

    def _finish(self, job: Job, error: str | None = None) -> None:
        job.status, job.error = ("completed" if error is None else "failed"), error
        job.progress = 100.0 if error is None else job.progress
        job.completed_at = int(time.time())
        if error is not None and job.recording is not None:
            job.recording.discard()
        if job.session is not None:
            self.engine.close(job.session, "the job is finished")
        self.engine.remove_old_files()
        self._next()
