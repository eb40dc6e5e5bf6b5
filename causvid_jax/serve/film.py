"""One film: a stream that is generated block by block and records its events.

Live sessions and replays run the same code, so a replay has the same frames.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from causvid_jax.config import ConfigError, require
from causvid_jax.sampling.script import MOST_EVENTS, MOST_INPUT, Event, Script, pack, size_of, unpack
from causvid_jax.sampling.stream import StreamState
from causvid_jax.serve.programs import Programs


def slerp(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """Interpolate embeddings ``[S, E]`` token by token on the sphere; ``share`` in [0, 1] goes from start to end.

    With the angle w between two tokens' directions, the direction is
    ``sin((1 - share) w) / sin(w) a + sin(share w) / sin(w) b``; the length is interpolated linearly. If a token is
    zero, or the angle is 0 or a half turn, the interpolation is linear. Source: Shoemake, "Animating rotation with
    quaternion curves", SIGGRAPH 1985.
    """
    a, b = start.astype(np.float64), end.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1, keepdims=True), np.linalg.norm(b, axis=-1, keepdims=True)
    units = a / np.maximum(lengths[0], 1e-12), b / np.maximum(lengths[1], 1e-12)
    angle = np.arccos(np.clip(np.sum(units[0] * units[1], axis=-1, keepdims=True), -1, 1))
    sine = np.sin(angle)
    turns = (sine > 1e-6) & (lengths[0] > 0) & (lengths[1] > 0)
    safe = np.where(turns, sine, 1.0)
    direction = np.sin((1 - share) * angle) / safe * units[0] + np.sin(share * angle) / safe * units[1]
    length = (1 - share) * lengths[0] + share * lengths[1]
    return np.where(turns, length * direction, (1 - share) * a + share * b).astype(np.float32)


@dataclasses.dataclass
class _Blend:
    """A gradual change of embeddings to those of a prompt."""

    start: np.ndarray
    end: np.ndarray
    context: str
    length: int
    done: int = 0


class Film:
    """A stream with its script.

    A student with an image branch needs ``picture``, uint8 ``[H, W, 3]``, which stays through every change of prompt.
    Other students start from a picture as the first block (:meth:`step`).

    Args:
        programs: of the recipe.
        seed: of the noise.
        prompt: of the start.
        latents: the maximum number of latent frames, for a recipe without a window.
        picture: for a student with an image branch.

    Attributes:
        block: number of blocks so far.
        frame: number of pixel frames so far.
        prompt: the current prompt.

    Raises:
        ConfigError: a prompt that cannot be encoded.
    """

    def __init__(
        self,
        programs: Programs,
        seed: int,
        prompt: str,
        latents: int | None = None,
        picture: np.ndarray | None = None,
    ):
        self.programs, self.seed, self.prompt = programs, seed, prompt
        self.block, self.frame = 0, 0
        self._latents, self._picture = latents, picture
        self._embeds = self._encode(prompt)
        self._state: StreamState = programs.start(self._embeds, seed, latents, picture)
        self._events = [Event(0, prompt=prompt)]
        self._blend: _Blend | None = None
        self._coder: Any = None
        self._places: Any = None  # of a snapshot: the shardings of state and coder on the device
        self._input, self._complete = 0, True
        self._digest = hashlib.sha256()
        if picture is not None:
            self._keep(Event(0, frames=pack(picture[None])))

    def change(self, prompt: str, context: str = "reset", blend: int = 0) -> None:
        """Switch to a prompt at the next block, or gradually over ``blend`` blocks.

        Raises:
            ConfigError: a prompt that cannot be encoded, or a value out of bounds.
        """
        event = Event(self.block, prompt=prompt, context=context, blend=blend)
        require(len(self._events) < MOST_EVENTS, f"the film has {MOST_EVENTS} changes of prompt; start a new one")
        embeds = self._encode(prompt)
        if self.block == 0:  # before the first block, this is the prompt of the start
            self._embeds, self._events[0] = embeds, Event(0, prompt=prompt)
            self._state = self.programs.start(embeds, self.seed, self._latents, self._picture)
        else:
            if self._events[-1].block == self.block and self._events[-1].prompt is not None:
                self._events.pop()
            self._events.append(event)
            self._blend = _Blend(self._embeds, embeds, context, max(blend, 1))
        self.prompt = prompt

    def step(self, frames: np.ndarray | None = None, strength: float | None = None) -> np.ndarray:
        """Return the uint8 frames ``[n, H, W, 3]`` of the next block.

        Args:
            frames: uint8 ``[n, H, W, 3]``: a picture to start from, or the latest frames of a video to follow.
            strength: distance from the video, up to 1; None: ``frames`` is a picture.

        Raises:
            ConfigError: a picture after the first block, frames for a student with an image branch, or a strength out
                of bounds.
        """
        require(
            frames is None or not self.programs.has_branch,
            "a student with an image branch reads a picture at its start only, and follows no video",
        )
        if self._blend:
            self._turn(self._blend)
        if frames is None:
            self._coder = None
            frames_out, self._state = self.programs.next(self._state)
        elif strength is None:
            require(self.block == 0, "a picture can only be the start of a film")
            self._keep(Event(0, frames=pack(frames[:1])))
            frames_out, self._state = self.programs.show(self._state, frames[0])
        else:
            frames = _fit(frames, self.programs.input_frames(self._state, self._coder))
            self._keep(Event(self.block, frames=pack(frames), strength=strength))
            frames_out, self._state, self._coder = self.programs.follow(self._state, frames, strength, self._coder)
        self.block += 1
        self.frame += len(frames_out)
        self._digest.update(frames_out.tobytes())
        return frames_out

    def frames_of(self, video: np.ndarray) -> np.ndarray | None:
        """Return the frames of a whole video ``[T, H, W, 3]`` that the next block follows; None after its end."""
        count = self.programs.input_frames(self._state, self._coder)
        frames = video[self.frame : self.frame + count]
        return frames if len(frames) else None

    def script(self) -> Script:
        """Return the script of the film so far."""
        return Script(
            recipe=self.programs.recipe.name,
            weights=self.programs.weights,
            seed=self.seed,
            events=tuple(event for event in self._events if event.block < max(self.block, 1)),
            blocks=self.block,
            latents=self._latents,
            size=size_of(self.programs.recipe),
            fps=self.programs.recipe.video.fps,
            complete=self._complete,
            sha256=self._digest.hexdigest(),
        )

    def snapshot(self) -> "Film":
        """Return a constant copy of the film, with its state in host memory."""
        film = object.__new__(Film)
        film.__dict__.update(self.__dict__)
        on_device = self._state, self._coder
        if not isinstance(self._state.block, np.ndarray):
            film._places = jax.tree.map(lambda leaf: leaf.sharding, on_device)
        film._state, film._coder = jax.device_get(on_device)
        film._events, film._digest = list(self._events), self._digest.copy()
        film._blend = dataclasses.replace(self._blend) if self._blend else None
        return film

    def fork(self) -> "Film":
        """Return a film that continues a snapshot. The snapshot does not change."""
        film = self.snapshot()
        film._state, film._coder = self.programs.put((film._state, film._coder), self._places)
        return film

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, a constant."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    def _turn(self, blend: _Blend) -> None:
        blend.done += 1
        last = blend.done >= blend.length
        self._embeds = blend.end if last else slerp(blend.start, blend.end, blend.done / blend.length)
        # A blend resets the context only at its start. With a reset at every block all blocks would be first blocks.
        context = "keep" if blend.context == "reset" and blend.done > 1 else blend.context
        self._state = self.programs.switch(self._state, self._embeds, context)
        self._coder = None if context == "reset" else self._coder
        self._blend = None if last else blend

    def _keep(self, event: Event) -> None:
        self._input += len(event.frames or "")
        if self._input > MOST_INPUT or len(self._events) >= MOST_EVENTS:
            self._complete = False
            self._events = [item for item in self._events if item.frames is None]
        else:
            self._events.append(event)

    def _encode(self, prompt: str) -> np.ndarray:
        return np.asarray(self.programs.pipe.encode_prompt(prompt))[0]


def _fit(frames: np.ndarray, count: int) -> np.ndarray:
    """Return the latest ``count`` frames; if there are fewer, repeat the last one."""
    frames = frames[-count:]
    return np.concatenate([frames, np.repeat(frames[-1:], count - len(frames), axis=0)])


def check_script(script: Script, programs: Programs) -> None:
    """Refuse a script that these weights cannot replay.

    Raises:
        ConfigError: the script belongs to another recipe or other weights, or its inputs were not kept.
    """
    recipe = programs.recipe
    require(
        script.recipe == recipe.name,
        f"the film was made by recipe {script.recipe!r}; this is {recipe.name!r}",
    )
    width, _, height = script.size.partition("x")
    require(
        script.size in ("", size_of(recipe)),
        f"the film has {script.size} pixels, this recipe {size_of(recipe)}; add --config.video.width={width} "
        f"--config.video.height={height}",
    )
    require(
        script.fps in (None, recipe.video.fps),
        f"the film has {script.fps or 0:.12g} frames per second, this recipe {recipe.video.fps:.12g}; add "
        f"--config.video.fps={script.fps or 0:.12g}",
    )
    require(
        script.weights == programs.weights,
        f"the film was made by other weights (checksum {script.weights[:12]}, here {programs.weights[:12]})",
    )
    require(script.complete, "the film followed a video that was too long to be stored, so it cannot be replayed")
    require(
        programs.has_encoder or all(event.frames is None for event in script.events),
        "the film starts from a picture or follows a video; this needs the weights of the VAE's encoder",
    )
    pictures = [event for event in script.events if event.frames is not None and event.block == 0]
    require(
        not programs.has_branch or (len(pictures) == 1 and pictures[0].strength is None),
        "the film has no picture at its start, which a student with an image branch needs",
    )


class Replay:
    """A film that follows a script: :meth:`step` until :attr:`finished`, with the frames of the first film.

    Raises:
        ConfigError: :func:`check_script` refuses the script.
    """

    def __init__(self, programs: Programs, script: Script):
        check_script(script, programs)
        prompt = script.events[0].prompt
        assert prompt is not None
        self.script = script
        self._events, picture = list(script.events[1:]), None
        if programs.has_branch:
            event = next(event for event in self._events if event.frames is not None)
            self._events.remove(event)
            picture = unpack(event.frames or "", programs.recipe.video.height)[0]
        self.film = Film(programs, script.seed, prompt, script.latents, picture)

    @property
    def finished(self) -> bool:
        """Whether all blocks of the script are made."""
        return self.film.block >= self.script.blocks

    def step(self) -> np.ndarray:
        """Return the uint8 frames ``[n, H, W, 3]`` of the next block."""
        height = self.film.programs.recipe.video.height
        frames, strength = None, None
        while self._events and self._events[0].block == self.film.block:
            event = self._events.pop(0)
            if event.prompt is not None:
                self.film.change(event.prompt, event.context, event.blend)
            if event.frames is not None:
                frames, strength = unpack(event.frames, height), event.strength
        return self.film.step(frames, strength)

    @property
    def same(self) -> bool:
        """Whether the frames are those of the first film."""
        return self.film.script().sha256 == self.script.sha256


def replay(programs: Programs, script: Script) -> Iterator[np.ndarray]:
    """Yield the uint8 frames ``[n, H, W, 3]`` of every block that the script's recording shows.

    Raises:
        ConfigError: :func:`check_script` refuses it, or the frames differ from those of the recording.
    """
    playing = Replay(programs, script)
    remaining = script.length
    digest = hashlib.sha256()
    while not playing.finished:
        frames = playing.step()
        if playing.film.block <= script.first:
            continue
        frames = frames if remaining is None else frames[:remaining]
        remaining = None if remaining is None else remaining - len(frames)
        digest.update(frames.tobytes())
        yield frames
    if script.sha256 and digest.hexdigest() != script.sha256:
        raise ConfigError(
            "the frames differ from those of the recording; it was made on another kind of device or version of JAX"
        )
