"""Measure the speed of the streaming sampler. Weights may be random, because the cost does not depend on values.

Programs are compiled before they are timed. A call is timed until its results are ready. Caches are donated as in a
stream. The steps of a block run in one program, as in a stream, so the time of a step is the time of the program
divided by the number of steps. To time a cache length repeatedly, the cache's position is moved back after every call.
"""

import dataclasses
import datetime
import functools
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.analysis import flops, memory, topology
from causvid_jax.analysis import report as report_format
from causvid_jax.analysis.delivery import Delivery, delivery
from causvid_jax.config import Recipe, require
from causvid_jax.models import attention, decoder, transformer, vae
from causvid_jax.sampling import stream

NOTES = (
    "A line's TFLOP are model FLOPs by formula (`causvid_jax/analysis/flops.py`; codecs: "
    "counted from the trace) over the frames that a block sees. The cache always has all its slots, so "
    "a stream that has not filled its window yet takes about as long as a full one and achieves less.",
    "Time to first frame runs from the prompt's embedding on the device to the first block's frames on the host; a "
    "clip is all of it, to the last frame. Steady frames/s and clips hand out every block; calls follow each other "
    "without waiting, while p50 and p99 wait for each. The text encoder is not part of any time.",
)


@dataclasses.dataclass(frozen=True)
class Times:
    """Wall-clock seconds of repeated calls, in order."""

    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Return the linearly interpolated percentile in seconds; for few calls p99 is close to the slowest call."""
        return float(np.percentile(self.seconds, percent))

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return self.percentile(50)


def time_each(
    call: Callable[[Any], Any], carry: Any, repeats: int, *, before: Callable[[Any], Any] | None = None
) -> tuple[Times, Any]:
    """Time ``repeats`` calls ``carry = call(carry)``, each waited for, after one untimed call.

    A call may donate its argument. ``before(carry)`` makes the argument ready, outside the timed part.

    Returns:
        :class:`Times` and the last carry.
    """
    seconds = []
    for _ in range(repeats + 1):
        carry = jax.block_until_ready(carry if before is None else before(carry))
        begin = time.perf_counter()
        carry = jax.block_until_ready(call(carry))
        seconds.append(time.perf_counter() - begin)
    return Times(tuple(seconds[1:])), carry


def time_pipelined(call: Callable[[Any], Any], carry: Any, repeats: int) -> tuple[float, Any]:
    """Return the seconds per call of ``repeats`` calls ``carry = call(carry)``, waiting only for the last one.

    This is the throughput of a stream: the host prepares the next call while the device works on this one.
    """
    carry = jax.block_until_ready(call(carry))
    begin = time.perf_counter()
    for _ in range(repeats):
        carry = call(carry)
    carry = jax.block_until_ready(carry)
    return (time.perf_counter() - begin) / repeats, carry


CODECS = ("wan", "taehv")


@dataclasses.dataclass(frozen=True)
class Codec:
    """The decoder of ``recipe`` for ``streams`` parallel videos."""

    recipe: Recipe
    streams: int

    @property
    def title(self) -> str:
        """Name of the decoder and its compute type, for tables."""
        if self.recipe.decoder == "taehv":
            return f"TAEHV, {self.recipe.taehv.dtype}"
        model = "Wan" if self.recipe.vae.base_dim == 96 else self.recipe.name
        return f"{model} VAE, {self.recipe.vae.dtype}"

    def shapes(self) -> Any:
        """Return the shapes and types of the decoder's weights, by network."""
        return memory.codec_shapes(self.recipe, encodes=False)

    def programs(self) -> tuple[Any, Any]:
        """Return jitted ``start() -> cache`` and ``decode(params, latents, cache) -> (frames, cache)``.

        Latents are ``[B, K, h, w, C]``, frames ``[B, 4K, H, W, 3]`` in [-1, 1]. ``decode`` donates the cache.
        """
        height, width = self.recipe.latent_size
        size = {"batch": self.streams, "height": height, "width": width}
        start = functools.partial(decoder.init_decode_cache, self.recipe, **size)
        return jax.jit(start), jax.jit(functools.partial(decoder.decode_chunk, config=self.recipe), donate_argnums=2)

    def flops(self, frames: int) -> float:
        """Return the FLOPs of decoding ``frames`` latent frames of every stream."""
        start, decode = self.programs()
        shape = (self.streams, frames, *self.recipe.latent_size, self.recipe.vae.z_dim)
        return flops.count_traced(
            decode, self.shapes(), jax.ShapeDtypeStruct(shape, jnp.float32), jax.eval_shape(start)
        )


def make_codec(name: str, recipe: Recipe, streams: int = 1) -> Codec:
    """Return the codec ``name`` for the latents of ``recipe``; TAEHV in the compute type of the recipe's VAE.

    Raises:
        ConfigError: an unknown name, or a codec that does not fit the recipe's latents.
    """
    require(name in CODECS, f"--codecs names {name!r}; accepted: {', '.join(CODECS)}")
    if name == "wan":
        return Codec(dataclasses.replace(recipe, decoder="vae"), streams)
    tiny = dataclasses.replace(recipe.taehv, z_dim=recipe.vae.z_dim, dtype=recipe.vae.dtype)
    return Codec(dataclasses.replace(recipe, decoder="taehv", taehv=tiny), streams)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the measurement.

    Attributes:
        repeats: timed calls of each program; for clips and first frames a fourth of that, at least 3.
        streams: parallel videos.
        codecs: names of decoders, of ``CODECS``.

    Raises:
        ConfigError: fewer than two repeats, no stream, or a decoder named twice.
    """

    repeats: int = 20
    streams: int = 1
    codecs: tuple[str, ...] = CODECS

    def __post_init__(self) -> None:
        require(self.repeats >= 2, f"--repeats is {self.repeats}; it must be at least 2")
        require(self.streams >= 1, f"--streams is {self.streams}; it must be at least 1")
        require(len(set(self.codecs)) == len(self.codecs), f"--codecs names {self.codecs} twice; give each once")

    @property
    def few(self) -> int:
        """Number of timed clips and first frames."""
        return max(3, self.repeats // 4)


def cache_lengths(recipe: Recipe) -> list[tuple[int, int]]:
    """Return the lengths of context at which a block is timed, until the cache is full.

    Each is (index of the block's first latent frame, number of latent frames that it attends to, including its own).
    """
    causal, k = recipe.causal, recipe.causal.frames_per_block
    first = int(causal.independent_first_frame)
    last = causal.window + causal.sink + first if causal.window else recipe.video.latent_frames - k
    start_of: dict[int, int] = {}
    for start in range(first, last + 1, k):
        seen = sum(b - a for a, b in attention.visible_frames(start + k, causal))
        start_of.setdefault(seen, start)
    return [(start, seen) for seen, start in start_of.items()]


UNIFORM_INT8 = math.sqrt((255**2 - 1) / 12)
"""Standard deviation of an integer drawn uniformly from -127 to 127."""


def random_weights(abstract: Any, seed: int = 0) -> Any:
    """Make parameters of the shapes and types ``abstract`` on the device.

    Scales are 1, biases 0, all other arrays N(0, 0.02^2). Kernels in 8 bits are uniform, standard deviation 0.02.
    """

    def make() -> Any:
        flat, structure = jax.tree_util.tree_flatten_with_path(abstract)
        # XLA's generator: threefry takes longer to compile than everything else here.
        keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(flat))
        leaves = []
        for key, (path, leaf) in zip(keys, flat, strict=True):
            if leaf.dtype == jnp.int8:
                leaves.append(jax.random.randint(key, leaf.shape, -127, 128, jnp.int8))
            elif path[-1].key == "scale" and path[-2].key == "kernel":
                leaves.append(jnp.full(leaf.shape, 0.02 / UNIFORM_INT8, leaf.dtype))
            elif path[-1].key in ("scale", "gamma", "bias"):
                leaves.append(jnp.full(leaf.shape, path[-1].key != "bias", leaf.dtype))
            else:
                leaves.append((0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype))
        return jax.tree.unflatten(structure, leaves)

    return jax.jit(make)()


def check(recipe: Recipe, options: Options) -> list[Codec]:
    """Return the codecs of ``options``, after checking that each fits the device.

    Raises:
        ConfigError: a codec that does not fit the latents, or memory beyond the device's.
    """
    codecs = [make_codec(name, recipe, options.streams) for name in options.codecs]
    for variant in (recipe, *(c.recipe for c in codecs)):
        phases = memory.sampling_phases(
            variant, "student", batch=options.streams, latents=recipe.video.latent_frames, prompts=0
        )
        memory.check_fits(phases, memory.memory_limit())
    return codecs


def settings(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Return the settings that are part of every line of the report."""
    causal, net = recipe.causal, recipe.student
    sink = f" + sink {causal.sink}" if causal.sink else ""
    write = " + write" if causal.context_pass else ""
    precision = net.dtype if net.precision == "default" else f"{net.dtype}, rounded as {net.precision}"
    return {
        "recipe": recipe.name,
        "resolution": f"{recipe.video.height}x{recipe.video.width}",
        "streams": options.streams,
        "frames_per_block": causal.frames_per_block,
        "window": f"{causal.window}{sink}" if causal.window else f"{recipe.video.latent_frames}",
        "steps": f"{len(recipe.diffusion.denoising_timesteps)}{write}",
        "precision": f"{precision}, linear layers in int8" if net.linear == "int8" else precision,
        "attention": attention.resolve(net.attention, net.dtype),
    }


def describe_device() -> dict[str, str | int]:
    """Return the device of single-device programs, the host and the versions."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else _processor()
    return {
        "platform": device.platform,
        "kind": kind,
        "host_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "framework": f"JAX {jax.__version__}",
    }


def _processor() -> str:
    """Return the name of the CPU model; JAX calls all of them "cpu"."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


class _Bench:
    """The compiled programs of one recipe, and the measurements so far."""

    def __init__(self, recipe: Recipe, options: Options, student: Any = None):
        self.recipe, self.options = recipe, options
        self.lines: list[report_format.Line] = []
        self.deliveries: list[Delivery] = []
        self.k, self.steps = recipe.causal.frames_per_block, len(recipe.diffusion.denoising_timesteps)
        self.tokens = flops.tokens_per_frame(recipe, recipe.student)
        if student is None:
            student = random_weights(transformer.inference(recipe.student, unstacked=True))
        self.params = {"student": student}
        rows = (options.streams, recipe.text.length, recipe.text.dim)
        self.text = jax.random.normal(jax.random.key(1), rows)
        shape = (options.streams, self.k, *recipe.latent_size, recipe.vae.z_dim)
        self.latents = jax.random.normal(jax.random.key(2), shape)

        begin = time.perf_counter()
        state = self.start()
        self.first = self.block = stream.next_block.lower(self.params, state, config=recipe).compile()
        if not state.started:
            _, state = self.first(self.params, state)
            self.block = stream.next_block.lower(self.params, state, config=recipe).compile()
        only = dataclasses.replace(recipe, causal=dataclasses.replace(recipe.causal, context_pass=False))
        self.denoise = stream.next_block.lower(self.params, state, config=only).compile()
        self.write = stream.append.lower(self.params, state, self.latents, config=recipe).compile()
        self.compile_seconds = time.perf_counter() - begin

    def start(self) -> stream.StreamState:
        """Return a new stream. The decoders of this benchmark keep their own caches."""
        state = stream.init_stream(self.params, self.text, config=self.recipe)
        return dataclasses.replace(state, decode=None)  # type: ignore[arg-type]

    def pass_tflop(self, context_frames: int, frames: int | None = None) -> float:
        """Return the TFLOP of one pass over a block whose tokens attend to ``context_frames`` frames."""
        frames = self.k if frames is None else frames
        one = flops.forward(self.recipe.student, frames, self.tokens, frames * context_frames, text=False)
        return self.options.streams * one / 1e12

    def add(
        self, what: str, context_frames: int | None, codec: str, times: Times, *, parts: int = 1, **more: Any
    ) -> None:
        p50, p99 = (times.percentile(p) * 1e3 / parts for p in (50, 99))
        each = tuple(seconds * 1e3 / parts for seconds in times.seconds)
        self.lines.append(report_format.Line(what, context_frames, codec, p50, p99, len(each), ms=each, **more))

    def every_length(self) -> stream.StreamState:
        """Time a denoising step and the cache write at every length; return the state after the last block."""
        state = self.start()
        if not state.started:
            _, state = self.first(self.params, state)
        remaining = dict(cache_lengths(self.recipe))
        here = int(self.recipe.causal.independent_first_frame)
        while remaining:
            if here in remaining:
                state = self._length(state, here, remaining.pop(here))
            else:  # as many frames seen as before
                state = self.write(self.params, state, self.latents)
            here += self.k
        return state

    def _length(self, state: stream.StreamState, here: int, context_frames: int) -> stream.StreamState:
        back = rewinder(here)
        repeats, full = self.options.repeats, context_frames == cache_lengths(self.recipe)[-1][1]
        times, state = time_each(lambda s: self.denoise(self.params, s)[1], state, repeats, before=back)
        one = self.pass_tflop(context_frames)
        self.add("denoising step", context_frames, "none", times, parts=self.steps, tflop=one)
        if full:
            self.add(f"denoising, all {self.steps} steps", context_frames, "none", times, tflop=self.steps * one)
        write = lambda s: self.write(self.params, s, self.latents)  # noqa: E731
        times, state = time_each(write, state, repeats, before=back)
        self.add("cache write", context_frames, "none", times, tflop=one)
        return state

    def blocks(self, state: stream.StreamState, decoder: "_Decoder | None") -> stream.StreamState:
        """Time consecutive blocks with a full window, as latents or decoded."""
        here, seen = cache_lengths(self.recipe)[-1]
        back, repeats = rewinder(here), self.options.repeats
        passes = self.steps + self.recipe.causal.context_pass
        tflop, frames = passes * self.pass_tflop(seen), vae.time_factor(self.recipe.vae) * self.k

        def run(carry: Any) -> Any:
            state, cache, _ = carry
            latents, state = self.block(self.params, back(state))
            shown, cache = (latents, None) if decoder is None else decoder.decode(decoder.params, latents, cache)
            return state, cache, shown

        cache, title, what = None, "none", "block, steady"
        if decoder is not None:
            work, title, what = decoder.tflop(self.k), decoder.title, "block and decoding, steady"
            decoding, (_, cache) = time_each(
                lambda c: decoder.decode(decoder.params, self.latents, c[1]), (None, decoder.start()), repeats
            )
            self.add("decoding a block", None, title, decoding, tflop=work)
            tflop += work
        times, carry = time_each(run, (state, cache, None), repeats)
        seconds, carry = time_pipelined(run, carry, repeats)
        self.add(what, seen, title, times, tflop=tflop, fps=frames / seconds)
        return carry[0]

    def play(self, blocks: int, decoder: "_Decoder | None") -> list[float]:
        """Run a new stream; return the times at which each block reached the host, in seconds since its start."""
        begin = time.perf_counter()
        arrivals: list[float] = []
        state, waiting = self.start(), None
        cache = None if decoder is None else decoder.start()
        for i in range(blocks + 1):
            ready, waiting = waiting, None
            if i < blocks:
                waiting, state = (self.first if i == 0 else self.block)(self.params, state)
                if decoder is not None:
                    waiting, cache = decoder.decode(decoder.params, waiting, cache)
            if ready is not None:  # the previous block is delivered while this block is computed
                np.asarray(ready)
                arrivals.append(time.perf_counter() - begin)
        return arrivals

    def clips(self, decoder: "_Decoder | None") -> None:
        """Time the first and the last frame of a clip of the recipe's length."""
        recipe, title = self.recipe, "none" if decoder is None else decoder.title
        sizes = recipe.causal.block_sizes(recipe.video.latent_frames)

        if decoder is not None:
            times, _ = time_each(lambda _: self.play(1, decoder), None, self.options.few)
            self.add("time to first frame", None, title, times)
        times, _ = time_each(lambda _: self.play(len(sizes), decoder), None, self.options.few)
        count = max(len(sizes), self.options.repeats) if recipe.causal.window else len(sizes)
        if count > 2:
            frames = vae.time_factor(recipe.vae) * self.k
            self.deliveries.append(delivery(self.play(count, decoder), frames, recipe.video.fps, codec=title))
        end, tflop = 0, 0.0
        for size in sizes:
            end += size
            seen = sum(b - a for a, b in attention.visible_frames(end, recipe.causal))
            tflop += (self.steps + recipe.causal.context_pass) * self.pass_tflop(seen, size)
            tflop += 0.0 if decoder is None else decoder.tflop(size)
        what, fps = f"clip of {recipe.video.frames} frames", recipe.video.frames / times.median
        self.add(what, None, title, times, tflop=tflop, fps=fps)


class _Decoder:
    """A codec on the device, compiled for both lengths of a block; networks that ``params`` lacks are random."""

    def __init__(self, codec: Codec, params: Mapping[str, Any]):
        self.codec, self.title = codec, codec.title
        shapes = codec.shapes()
        self.params = {n: params[n] if n in params else random_weights(shape, 3) for n, shape in shapes.items()}
        self.start, self.decode = codec.programs()
        self._tflop: dict[int, float] = {}

    def tflop(self, frames: int) -> float:
        if frames not in self._tflop:
            self._tflop[frames] = self.codec.flops(frames) / 1e12
        return self._tflop[frames]


def rewinder(position: int) -> Callable[[stream.StreamState], stream.StreamState]:
    """Return a function that moves a stream back to latent frame ``position``, to write its next block there again."""

    def back(state: stream.StreamState) -> stream.StreamState:
        # A new array each time: the state is donated.
        return dataclasses.replace(
            state, cache=dataclasses.replace(state.cache, position=jnp.asarray(np.int32(position)))
        )

    return back


def run(
    recipe: Recipe,
    options: Options,
    log: Callable[[str], None] = lambda _: None,
    *,
    params: Mapping[str, Any] | None = None,
    weights: str = "random",
) -> dict[str, Any]:
    """Measure; return the report of :mod:`causvid_jax.analysis.report`.

    Args:
        recipe: to measure, on one device.
        options: numbers of calls and streams, and the decoders.
        log: called with the name of each measurement before it starts.
        params: name of a network to its parameters, the student in the form of streams; missing ones are random.
        weights: origin of ``params``, for the report.

    Raises:
        ConfigError: a decoder that does not fit the recipe's latents, or memory beyond the device's.
    """
    codecs = check(recipe, options)
    peaks = {}
    log("compiling")
    params = params or {}
    bench = _Bench(recipe, options, params.get("student"))
    log("every cache length")
    state = bench.every_length()
    log("steady stream and clips, latents only")
    state = bench.blocks(state, None)
    bench.clips(None)
    peaks["student"], of = memory.memory_peak()
    # Measure the small codec first, because the peak memory never decreases.
    for codec in sorted(codecs, key=lambda c: c.recipe.decoder == "vae"):
        log(f"steady stream and clips, {codec.title}")
        decoder = _Decoder(codec, params)
        state = bench.blocks(state, decoder)
        bench.clips(decoder)
        peaks[f"and {codec.title}"], _ = memory.memory_peak()
    device = describe_device()
    net = recipe.student
    peak, why = topology.peak_flops(str(device["kind"]), net.dtype)
    measured = settings(recipe, options)
    return {
        "schema": report_format.SCHEMA,
        "program": "launch.bench",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "settings": measured,
        "weights": f"{weights}, kernels in {net.dtype}",
        "peak": why,
        "compile_seconds": bench.compile_seconds,
        "memory": {"of": of, "bytes": peaks},
        "lines": [report_format.line(item, measured, peak) for item in bench.lines],
        "delivery": [dataclasses.asdict(item) for item in bench.deliveries],
        "notes": list(NOTES),
    }
