"""A stream as a Python generator of frames: what a program or a server sits on.

All programs a stream will need are compiled before its clock starts, so that a change of prompt does not stall it; the
next block is already under way on the device while the frames of the last one are handed out.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import media as files
from causvid_jax.config import Recipe, require
from causvid_jax.models import vae
from causvid_jax.sampling import exported, stream


@dataclasses.dataclass
class Timing:
    """How fast a stream is, filled in by :func:`play` as it goes. Seconds."""

    compile: float = 0.0  # compilation (or reading compiled programs from the cache), before the clock starts
    first: float = 0.0  # from the start of the clock to the first frames on the host
    first_frames: int = 0  # frames of each stream that came with the first block
    frames: int = 0  # frames of each stream so far
    total: float = 0.0  # from the start of the clock to the last frames on the host

    @property
    def fps(self) -> float:
        """Steady frames per second of each stream: all after the first block; of the first, if it is the only one."""
        if self.frames > self.first_frames:
            return (self.frames - self.first_frames) / max(self.total - self.first, 1e-9)
        return self.frames / max(self.total, 1e-9)


def covering_latents(frames: int, config: Recipe) -> int:
    """The fewest latent frames that fit the blocks and hold ``frames`` frames."""
    require(frames >= 1, f"frames is {frames}; a stream has at least 1")
    return _first_latent_after(block_of(frames - 1, config), config)


def block_of(frame: int, config: Recipe) -> int:
    """The block that holds a frame, both counted from 0."""
    latent = -(-frame // vae.time_factor(config.vae))  # frame 0 is latent 0 alone, 1..4 are latent 1, ...
    first = int(config.causal.independent_first_frame)
    return latent // config.causal.frames_per_block if not first or not latent else _after_first(latent, config)


def first_frame(block: int, config: Recipe) -> int:
    """The first frame of a block, both counted from 0."""
    latents = _first_latent_after(block - 1, config)
    return 1 + vae.time_factor(config.vae) * (latents - 1) if latents else 0


def _after_first(latent: int, config: Recipe) -> int:
    return 1 + (latent - 1) // config.causal.frames_per_block


def _first_latent_after(block: int, config: Recipe) -> int:
    """Latent frames in blocks 0 to ``block`` together."""
    if config.causal.independent_first_frame:
        return 1 + block * config.causal.frames_per_block if block >= 0 else 0
    return (block + 1) * config.causal.frames_per_block


class _Programs:
    """Compiles a jitted function once per (function, whether the stream has started) and keeps count of the time.

    With ``loaded`` programs those stand in for the stream's functions, which then are never traced.
    """

    def __init__(self, timing: Timing, loaded: exported.Programs | None):
        self.timing, self.loaded = timing, loaded
        self.compiled: dict[Any, Any] = {}

    def prepare(self, function: Any, started: bool, *args, **static) -> Callable[..., Any]:
        key = function, started
        if key not in self.compiled:
            begin = time.perf_counter()
            jitted = self.jitted(function, started, static)
            self.compiled[key] = jitted.lower(*args).compile()
            self.timing.compile += time.perf_counter() - begin
        return self.compiled[key]

    def jitted(self, function: Any, started: bool, static: Mapping[str, Any]) -> Any:
        """The function of its arrays alone: our own, or the one that was loaded in its place."""
        if self.loaded is not None:
            return self.loaded.jitted(exported.name_of(function, started))
        return _Bound(function, static)

    def __call__(self, function: Any, started: bool, *args, **static) -> Any:
        return self.prepare(function, started, *args, **static)(*args)


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A jitted function with its static arguments."""

    function: Any
    static: Mapping[str, Any]

    def lower(self, *args):
        return self.function.lower(*args, **self.static)

    def __call__(self, *args):
        return self.function(*args, **self.static)


_encode_chunk = jax.jit(vae.encode_chunk, static_argnames=("config", "first"))


def play(
    params: stream.Params,
    text: np.ndarray,
    *,
    config: Recipe,
    frames: int,
    seed: int = 0,
    switches: Mapping[int, np.ndarray] | None = None,
    image: np.ndarray | None = None,
    video: np.ndarray | None = None,
    strength: float = 0.5,
    timing: Timing | None = None,
    loaded: exported.Programs | None = None,
) -> Iterator[np.ndarray]:
    """Frames uint8 ``[B, n, H, W, 3]``, block by block, ``frames`` of them in all.

    Args:
        params: ``{"student", "vae"}``.
        text: prompt rows ``[B, S, E]``; B streams side by side, stream b of seed ``seed + b``.
        config: the recipe.
        frames: how many; the last block is cut to fit.
        seed: of the noise.
        switches: block to the text rows ``[B, S, E]`` that hold from that block on (:func:`block_of` of a frame).
        image: uint8 ``[H, W, 3]`` that the streams start from.
        video: uint8 ``[T, H, W, 3]``, T >= frames, that the streams follow, at ``strength``.
        timing: filled in as the stream goes.
        loaded: programs to run instead of tracing the model; they know text and switches only.
    """
    timing = Timing() if timing is None else timing
    batch, k = text.shape[0], config.causal.frames_per_block
    switches = {} if switches is None else switches
    latents = covering_latents(frames, config)
    blocks = len(config.causal.block_sizes(latents))
    start = stream.strength_step(config.diffusion, strength) if video is not None else 0
    require(
        loaded is None or (image is None and video is None),
        "a stream of loaded programs starts from text; accepted: no image and no video",
    )
    programs = _Programs(timing, loaded)

    begin = time.perf_counter()
    params = jax.tree.map(jnp.asarray, params)
    if loaded is None:
        state = stream.init_stream(params, jnp.asarray(text), config=config, seed=seed, frames=latents)
    else:
        state = loaded.start(params, jnp.asarray(text), seed)
    timing.compile += time.perf_counter() - begin
    size = {"batch": batch, "height": config.video.height, "width": config.video.width}
    coder = None if video is None else vae.init_encode_cache(config.vae, **size)

    def pixels(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(files.to_float(array), (batch, *array.shape)))

    def one(run: Callable, block: int, state: stream.StreamState, coder: vae.EncodeCache | None):
        """(frames [B, 4K, H, W, 3], state, coder) by ``run``, which executes each program or only prepares it."""
        started, first = state.started, block == 0
        if video is not None:
            wanted = np.arange(first_frame(block, config), first_frame(block + 1, config))
            # Where the input ends inside a block, its last frame stays.
            chunk = pixels(video[np.minimum(wanted, len(video) - 1)])
            given, coder = run(_encode_chunk, first, params["vae"], chunk, coder, config=config.vae, first=first)
            x, state = run(stream.next_block_from, started, params, state, given, config=config, start=start)
        elif image is not None and block == 0:
            x = run(stream.encode_image, started, params, pixels(image), config=config)
            state = run(stream.append, started, params, state, x, config=config)
        else:
            _, shown, state = run(stream.next_frames, started, params, state, config=config)
            return shown, state, coder
        shown, state = run(stream.decode_block, x.shape[1] == k, params, state, x, config=config)
        return shown, state, coder

    def switch(run: Callable, state: stream.StreamState, rows: np.ndarray) -> stream.StreamState:
        return run(stream.change_prompt, state.started, params, state, jnp.asarray(rows), config=config)

    def prepare(function: Any, started: bool, *args, **static) -> Any:
        programs.prepare(function, started, *args, **static)
        return jax.eval_shape(programs.jitted(function, started, static), *args)

    # A dry run over shapes. From the third block on, and from the second switch on, all programs are known.
    dry, dry_coder = jax.eval_shape(lambda x: x, (state, coder))
    for block in range(min(blocks, 2)):
        _, dry, dry_coder = one(prepare, block, dry, dry_coder)
    for rows in list(switches.values())[:1]:
        switch(prepare, dry, rows)

    begin = time.perf_counter()
    waiting = None
    for block in range(blocks + 1):
        ready, waiting = waiting, None
        if block < blocks:
            if block in switches:
                state = switch(programs, state, switches[block])
            waiting, state, coder = one(programs, block, state, coder)
        if ready is None:
            continue
        shown = files.to_uint8(ready)[:, stream.LEAD if timing.frames == 0 else 0 :][:, : frames - timing.frames]
        timing.frames += shown.shape[1]
        timing.total = time.perf_counter() - begin
        if block == 1:
            timing.first, timing.first_frames = timing.total, timing.frames
        yield shown
