"""Play a stream as a Python generator of frames.

All programs of a stream are compiled before its clock starts, so a prompt switch does not stall the stream. Programs
depend only on shapes, so :func:`compile_ahead` compiles them in a thread while the weights are read. While the frames
of one block are returned, the device already computes the next block.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import media as files
from causvid_jax.config import Recipe, require
from causvid_jax.models import decoder, transformer, vae
from causvid_jax.models.image_branch import Picture, has_branch
from causvid_jax.sampling import exported, rolling, schedule, stream
from causvid_jax.sampling.blocks import covering_latents, first_frame
from causvid_jax.sampling.pipeline import encode_chunk


@dataclasses.dataclass
class Timing:
    """Timing of a stream in seconds, updated while it runs. The clock starts when everything is compiled."""

    compile: float = 0.0  # compilation, or reading compiled programs from the cache; also while weights are read
    first: float = 0.0  # from the start of the clock to the first frames on the host
    frames: int = 0  # pixel frames of each video so far
    total: float = 0.0  # from the start of the clock to the last frames on the host

    @property
    def fps(self) -> float:
        """Pixel frames per second of each video, over the whole time after compilation."""
        return self.frames / max(self.total, 1e-9)

    def add(self, frames: int, total: float) -> None:
        """Count ``frames`` more frames, which reached the host ``total`` seconds after the start."""
        if not self.frames:
            self.first = total
        self.frames += frames
        self.total = total


class Programs:
    """Compiles a jitted function once per (function, ``started``) and adds up the seconds.

    ``started`` tells whether the stream has started, or distinguishes the programs of a function in another way.
    ``loaded`` programs replace the stream's functions, which are then never traced. Once ``closed``, nothing more is
    compiled.
    """

    def __init__(self, timing: Timing, loaded: exported.Programs | None):
        self.timing, self.loaded = timing, loaded
        self.compiled: dict[Any, Any] = {}
        self.closed = False

    def prepare(self, function: Any, started: Any, *args: Any, **static: Any) -> Any:
        if self.closed:
            raise concurrent.futures.CancelledError
        key = function, started
        if key not in self.compiled:
            begin = time.perf_counter()
            if self.loaded is not None:
                lowered = self.loaded.jitted(exported.name_of(function, started)).lower(*args)
            else:
                lowered = function.lower(*args, **static)
            self.compiled[key] = lowered.compile()
            self.timing.compile += time.perf_counter() - begin
        return self.compiled[key]

    def dry(self, function: Any, started: Any, *args: Any, **static: Any) -> Any:
        """Compile a function and return the shapes of its results; arguments are arrays or shapes."""
        results = self.prepare(function, started, *args, **static).out_info
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results)

    def __call__(self, function: Any, started: Any, *args: Any, **static: Any) -> Any:
        return self.prepare(function, started, *args, **static)(*args)


def _put(tree: Any, device: jax.Device) -> Any:
    """Copy arrays to a device; shapes become those of arrays there."""
    where = jax.sharding.SingleDeviceSharding(device)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return jax.device_put(leaf, device)

    return jax.tree.map(one, tree)


@dataclasses.dataclass
class _Elsewhere:
    """The decoder on a second device: its parameters and its cache there."""

    params: stream.Params
    past: Any
    config: Recipe
    device: jax.Device

    @classmethod
    def place(cls, params: stream.Params, batch: int, config: Recipe, device: jax.Device) -> "_Elsewhere":
        height, width = config.latent_size
        past = decoder.init_decode_cache(config, batch=batch, height=height, width=width)
        weights = {config.decoder: params[config.decoder]}
        return cls(_put(weights, device), _put(past, device), config, device)

    def decode(self, run: Callable, latents: Any, started: bool) -> jax.Array:
        """Return the frames of the next block; calls return before they are computed, so the devices overlap."""
        latents, self.past = _put(latents, self.device), _put(self.past, self.device)
        decoded, self.past = run(decoder.decode_next, started, self.params, latents, self.past, config=self.config)
        return decoded


class _Player:
    """The inputs of a played stream, and the programs of one block.

    Every method takes ``run(function, started, *arguments, **static)``, which executes a program or, for a player of
    the shapes of parameters, only prepares it.
    """

    def __init__(
        self,
        params: stream.Params,
        config: Recipe,
        batch: int,
        *,
        image: np.ndarray | None = None,
        video: np.ndarray | None = None,
        strength: float = schedule.DEFAULT_STRENGTH,
        decode_device: jax.Device | None = None,
    ):
        self.params, self.config, self.batch = params, config, batch
        self.image, self.video = image, video
        self.start = schedule.strength_step(config.diffusion, strength) if video is not None else 0
        self.elsewhere: _Elsewhere | None = None
        if decode_device is not None:
            self.elsewhere = _Elsewhere.place(params, batch, config, decode_device)

    def coder(self) -> vae.EncodeCache | None:
        """Return the encoder's cache before a video; None without a video."""
        size = {"batch": self.batch, "height": self.config.video.height, "width": self.config.video.width}
        return None if self.video is None else vae.init_encode_cache(self.config.vae, **size)

    def pixels(self, array: np.ndarray) -> jax.Array:
        """Return uint8 pixels as floats for every stream."""
        return jnp.asarray(np.broadcast_to(files.to_float(array), (self.batch, *array.shape)))

    def block(
        self, run: Callable, block: int, state: stream.StreamState, coder: vae.EncodeCache | None, cut: bool = False
    ) -> tuple[jax.Array, stream.StreamState, vae.EncodeCache | None]:
        """Return (frames [B, 4K, H, W, 3], state, coder) of the next block; ``cut``: it follows a reset."""
        params, config, started = self.params, self.config, state.started
        if self.video is not None:
            latents, coder = self._encode(run, block, self.video, coder, cut)
            start = jnp.int32(self.start)
            x, state = run(stream.next_block_from, started, params, state, latents, start, config=config)
        elif self.image is not None and block == 0:
            x = run(stream.encode_image, started, params, self.pixels(self.image), config=config)
            state = run(stream.append, started, params, state, x, config=config)
        elif self.elsewhere is not None:
            x, state = run(stream.next_block, started, params, state, config=config)
        else:
            _, decoded, state = run(stream.next_frames, started, params, state, config=config)
            return decoded, state, coder
        whole = x.shape[1] == config.causal.frames_per_block
        if self.elsewhere is not None:
            return self.elsewhere.decode(run, x, whole), state, coder
        decoded, state = run(stream.decode_block, whole, params, state, x, config=config)
        return decoded, state, coder

    def _encode(
        self, run: Callable, block: int, video: np.ndarray, coder: vae.EncodeCache | None, cut: bool
    ) -> tuple[jax.Array, vae.EncodeCache | None]:
        """Encode the frames of the video that the block follows.

        After a cut the block is decoded as the start of a clip, and the first latent of a clip is one frame. So the
        encoder starts again there, with the block's last frames.
        """
        indices = np.arange(first_frame(block, self.config), first_frame(block + 1, self.config))
        indices, first = indices[stream.LEAD if cut else 0 :], cut or block == 0
        coder = self.coder() if cut else coder
        # If the input ends inside a block, repeat its last frame.
        chunk = self.pixels(video[np.minimum(indices, len(video) - 1)])
        return run(encode_chunk, first, self.params["vae"], chunk, coder, config=self.config.vae, first=first)

    def switch(self, run: Callable, state: stream.StreamState, embeds: Any) -> stream.StreamState:
        """Return the state with another prompt."""
        return run(stream.change_prompt, state.started, self.params, state, embeds, config=self.config)


def _compile(
    programs: Programs,
    params: stream.Params,
    text: Any,
    *,
    config: Recipe,
    frames: int,
    switches: bool,
    picture: Any = None,
    **inputs: Any,
) -> None:
    """Compile all programs of :func:`play` by a dry run: two blocks and one switch use every one of them.

    ``params``, ``text`` and ``picture`` are shapes, ``inputs`` are those of :class:`_Player`.
    """
    latents = covering_latents(frames, config)
    if config.rolling_blocks:
        _compile_rolling(programs, params, text, config, latents)
        return
    if programs.loaded is None:
        capacity = stream.capacity_of(config, latents)
        seeds = jax.ShapeDtypeStruct(text.shape[:1], jnp.uint32)
        # init_stream() calls the same jitted function, so it finds this program.
        static: dict[str, Any] = {"config": config, "capacity": capacity, "picture": picture}
        state = programs.dry(stream.first_state, None, params, text, seeds, **static)
    else:
        state = programs.loaded.shapes()
    player = _Player(params, config, text.shape[0], **inputs)
    coder = jax.eval_shape(player.coder)
    for block in range(min(len(config.causal.block_sizes(latents)), 2)):
        _, state, coder = player.block(programs.dry, block, state, coder)
    if switches:
        player.switch(programs.dry, state, text)


@contextlib.contextmanager
def compile_ahead(
    params: stream.Params,
    text: jax.ShapeDtypeStruct,
    *,
    timing: Timing,
    loaded: exported.Programs | None,
    **inputs: Any,
) -> Iterator[Callable[[], Programs]]:
    """Compile the programs of :func:`play` in a thread; the value is ``play(..., ahead=...)``, which waits for them.

    Leaving the context ends the thread: the current compilation is finished, and no other is begun.

    Args:
        params: shapes of the parameters (``weights.stream_shapes``).
        text: shape of the prompt embeddings, ``[B, S, E]``.
        timing, loaded: as in :func:`play`.
        inputs: the others of :func:`play`, but ``switches`` is whether there are any, and ``picture`` is of shapes.
    """
    programs = Programs(timing, loaded)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compiler") as pool:
        compiling = pool.submit(_compile, programs, params, text, **inputs)

        def ready() -> Programs:
            compiling.result()
            return programs

        try:
            yield ready
        finally:
            programs.closed = not compiling.done()


@contextlib.contextmanager
def compile_streams(shapes: Mapping[str, Any], config: Recipe, count: int) -> Iterator[None]:
    """Compile the programs of ``count`` parallel streams in a thread, and wait for them at the end of the block.

    ``shapes`` are those in which the block reads the weights. The jitted functions of a stream then find the programs.

    Raises:
        ConfigError: no streams, or a student with an image branch.
    """
    require(count > 0, f"streams is {count}; accepted: 1 or more")
    require(not has_branch(config.student), "streams is given for a student with an image branch; leave it out")
    params = {**shapes, "student": transformer.inference(config.student, unstacked=True)}
    text = jax.ShapeDtypeStruct((count, config.text.length, config.text.dim), jnp.float32)
    inputs: dict[str, Any] = {"config": config, "frames": config.video.frames, "switches": True}
    with compile_ahead(params, text, timing=Timing(), loaded=None, **inputs) as ready:
        yield
        ready()


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
    strength: float = schedule.DEFAULT_STRENGTH,
    timing: Timing | None = None,
    loaded: exported.Programs | None = None,
    picture: Picture | None = None,
    decode_device: jax.Device | None = None,
    ahead: Callable[[], Programs] | None = None,
) -> Iterator[np.ndarray]:
    """Yield frames uint8 ``[B, n, H, W, 3]``, block by block, ``frames`` of them in all.

    Args:
        params: ``{"student"}`` and the recipe's decoder; also ``"vae"`` with an image or a video.
        text: prompt embeddings ``[B, S, E]`` of B parallel streams, stream b with seed ``seed + b``.
        frames: number of pixel frames; the last block is cut to fit.
        seed: of the noise.
        switches: block to the prompt embeddings ``[B, S, E]`` from that block on (``blocks.block_of`` of a frame).
        image: uint8 ``[H, W, 3]`` that the streams start from: frame 0 is the picture itself, the other frames of its
            block are its decoded latents.
        video: uint8 ``[T, H, W, 3]``, T >= frames, that the streams follow, at ``strength``.
        strength: distance from the video, up to 1 (:func:`~causvid_jax.sampling.schedule.strength_step`).
        timing: updated while the stream runs.
        loaded: programs to run instead of tracing the model; they support text and switches only.
        picture: for a student with an image branch, instead of ``image``.
        decode_device: decodes the blocks while the default device generates the next one; None: both on the default.
        ahead: of :func:`compile_ahead` with the same inputs; None compiles at the first frame.

    Raises:
        ConfigError: at the first frame: an input that loaded programs do not support, a strength out of bounds, or
            ``decode_device`` with loaded programs or with a reset at prompt switches. At any frame: one that is not
            finite.
    """
    timing = Timing() if timing is None else timing
    switches = {} if switches is None else switches
    inputs: dict[str, Any] = {"image": image, "video": video, "strength": strength, "decode_device": decode_device}
    pixels = image is not None or video is not None
    _check_inputs(config, loaded, decode_device, pixels, bool(switches) or picture is not None)
    params, embeds = jax.tree.map(jnp.asarray, params), jnp.asarray(text)
    if ahead is None:
        programs = Programs(timing, loaded)
        shapes, prompt, start = jax.eval_shape(lambda *x: x, params, embeds, picture)
        more: dict[str, Any] = {"frames": frames, "switches": bool(switches), "picture": start}
        _compile(programs, shapes, prompt, config=config, **more, **inputs)
    else:
        programs = ahead()
    latents = covering_latents(frames, config)
    count = len(config.causal.block_sizes(latents))
    begin = time.perf_counter()
    if config.rolling_blocks:
        window = rolling.init_rolling(params, embeds, config=config, seed=seed, frames=latents)
        parts = _rounds(programs, params, config, window, count)
    else:
        if loaded is None:
            state = stream.init_stream(params, embeds, config=config, seed=seed, frames=latents, picture=picture)
        else:
            state = loaded.start(params, embeds, seed)
        parts = _blocks(_Player(params, config, len(text), **inputs), programs, count, state, switches)
    timing.compile += time.perf_counter() - begin
    yield from _deliver(parts, frames, timing, image)


def _check_inputs(
    config: Recipe, loaded: exported.Programs | None, decode_device: jax.Device | None, pixels: bool, others: bool
) -> None:
    alone = not (pixels or others) and loaded is None and decode_device is None
    require(alone or not config.rolling_blocks, "rolling_blocks is set, which generates from text only")
    require(
        loaded is None or not pixels,
        "loaded programs generate from text only; accepted: no image and no video",
    )
    require(
        decode_device is None or (loaded is None and config.causal.on_prompt_switch != "reset"),
        "decode_device is given; accepted: no loaded programs, and causal.on_prompt_switch 'keep' or 'recompute'",
    )


def _deliver(parts: Iterator[jax.Array], frames: int, timing: Timing, image: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield the frames of every decoded block on the host, while the device computes the next block."""
    begin, waiting = time.perf_counter(), None
    for number, part in enumerate(itertools.chain(parts, [None])):
        ready, waiting = waiting, part
        if ready is None:
            continue
        decoded = files.to_uint8(ready, f"the frames of block {number - 1}")
        visible = decoded[:, stream.LEAD if timing.frames == 0 else 0 :][:, : frames - timing.frames]
        if image is not None and timing.frames == 0:
            visible[:, 0] = image  # without the decoder's error
        timing.add(visible.shape[1], time.perf_counter() - begin)
        yield visible


def _blocks(
    player: _Player, programs: Programs, count: int, state: stream.StreamState, switches: Mapping[int, np.ndarray]
) -> Iterator[jax.Array]:
    """Yield the decoded frames of ``count`` blocks."""
    coder = player.coder()
    for block in range(count):
        if block in switches:
            state = player.switch(programs, state, jnp.asarray(switches[block]))
        cut = block in switches and player.config.causal.on_prompt_switch == "reset"
        decoded, state, coder = player.block(programs, block, state, coder, cut)
        yield decoded


def _rounds(
    programs: Programs, params: stream.Params, config: Recipe, state: rolling.RollingState, count: int
) -> Iterator[jax.Array]:
    """Yield the decoded frames of ``count`` blocks that are denoised jointly."""
    for enters in rolling.rounds(count, config):
        decoded, state = _round(programs, params, config, state, enters)
        if decoded is not None:
            yield decoded


def _round(
    run: Callable, params: stream.Params, config: Recipe, state: rolling.RollingState, enters: bool
) -> tuple[jax.Array | None, rolling.RollingState]:
    """Return the decoded frames of the block that a round finishes, None if none is, and the next state."""
    age = 0 if enters else state.age + 1
    key, options = (state.window.shape[1], age, enters), {"config": config, "enters": enters, "age": age}
    x, single, window = run(rolling.run_round, key, params, state.stream, state.window, **options)
    if x is None:
        return None, rolling.RollingState(single, window, age)
    decoded, single = run(stream.decode_block, True, params, single, x, config=config)
    return decoded, rolling.RollingState(single, window, age)


def _compile_rolling(programs: Programs, params: stream.Params, text: Any, config: Recipe, latents: int) -> None:
    """Compile the programs of :func:`_rounds`: a clip as long as the window uses every one of a longer clip."""
    count = len(config.causal.block_sizes(latents))
    state = jax.eval_shape(lambda p, t: rolling.init_rolling(p, t, config=config, frames=latents), params, text)
    for enters in rolling.rounds(min(count, config.rolling_blocks), config):
        _, state = _round(programs.dry, params, config, state, enters)
