"""Times of the streaming sampler, with random weights: the numbers do not change what a matmul costs.

Everything is compiled before it is timed, a call is timed until its results are there, and caches are donated as in a
stream. The steps of a block run as they do in a stream, in one program: a step's time is the program's over their
number. A length is timed again and again by moving the cache's position back after every call, so that the same slots
are written again.
"""

import dataclasses
import datetime
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.analysis import bench_codecs, bench_results, devices, flops, timing
from causvid_jax.analysis.bench_plan import Plan, abstract_weights, check, lengths, random_weights, settings
from causvid_jax.config import Recipe
from causvid_jax.models import attention, vae
from causvid_jax.sampling import stream

NOTES = (
    "A line's TFLOP are model FLOPs by formula (`causvid_jax/analysis/flops.py`; codecs: "
    "`causvid_jax/analysis/jaxpr_flops.py`) over the frames that a block sees. The cache always has all its slots, so "
    "a stream that has not filled its window yet takes about as long as a full one and achieves less.",
    "Time to first frame runs from the prompt's embedding on the device to the first block's frames on the host; a "
    "clip is all of it, to the last frame. Steady frames/s and clips hand out every block; calls follow each other "
    "without waiting, while p50 and p99 wait for each. The text encoder is not part of any time.",
)


class _Bench:
    """The compiled programs of one recipe, and what they measured so far."""

    def __init__(self, recipe: Recipe, plan: Plan):
        self.recipe, self.plan = recipe, plan
        self.lines: list[bench_results.Line] = []
        self.k, self.steps = recipe.causal.frames_per_block, len(recipe.diffusion.denoising_timesteps)
        self.tokens = flops.tokens_per_frame(recipe, recipe.student)
        self.params = {"student": random_weights(abstract_weights(recipe, plan))}
        rows = (plan.streams, recipe.text.length, recipe.text.dim)
        self.text = jax.random.normal(jax.random.key(1), rows)
        shape = (plan.streams, self.k, *recipe.latent_size, recipe.vae.z_dim)
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
        """A new stream; the decoders of this benchmark keep their own caches."""
        state = stream.init_stream(self.params, self.text, config=self.recipe)
        return dataclasses.replace(state, decode=None)  # type: ignore[arg-type]

    def pass_tflop(self, seen: int, frames: int | None = None) -> float:
        """Of one pass over a block whose tokens see ``seen`` frames."""
        frames = self.k if frames is None else frames
        one = flops.forward(self.recipe.student, frames, self.tokens, frames * seen, text=False)
        return self.plan.streams * one / 1e12

    def add(self, what: str, seen: int | None, codec: str, times: timing.Times, *, parts: int = 1, **more: Any) -> None:
        p50, p99 = (times.percentile(p) * 1e3 / parts for p in (50, 99))
        self.lines.append(bench_results.Line(what, seen, codec, p50, p99, len(times.seconds), **more))

    def every_length(self) -> stream.StreamState:
        """A denoising step and the cache write at every length; the state after the last block."""
        state = self.start()
        if not state.started:
            _, state = self.first(self.params, state)
        found = dict(lengths(self.recipe))
        here = int(self.recipe.causal.independent_first_frame)
        while found:
            if here in found:
                state = self._length(state, here, found.pop(here))
            else:  # as many frames seen as before
                state = self.write(self.params, state, self.latents)
            here += self.k
        return state

    def _length(self, state: stream.StreamState, here: int, seen: int) -> stream.StreamState:
        back = rewinder(here)
        repeats, full = self.plan.repeats, seen == lengths(self.recipe)[-1][1]
        times, state = timing.each(lambda s: self.denoise(self.params, s)[1], state, repeats, before=back)
        one = self.pass_tflop(seen)
        self.add("denoising step", seen, "none", times, parts=self.steps, tflop=one)
        if full:
            self.add(f"denoising, all {self.steps} steps", seen, "none", times, tflop=self.steps * one)
        write = lambda s: self.write(self.params, s, self.latents)  # noqa: E731
        times, state = timing.each(write, state, repeats, before=back)
        self.add("cache write", seen, "none", times, tflop=one)
        return state

    def blocks(self, state: stream.StreamState, decoder: "_Decoder | None") -> stream.StreamState:
        """Blocks with a full window one after the other, as latents or decoded."""
        here, seen = lengths(self.recipe)[-1]
        back, repeats = rewinder(here), self.plan.repeats
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
            alone, (_, cache) = timing.each(
                lambda c: decoder.decode(decoder.params, self.latents, c[1]), (None, decoder.start()), repeats
            )
            self.add("decoding a block", None, title, alone, tflop=work)
            tflop += work
        times, carry = timing.each(run, (state, cache, None), repeats)
        seconds, carry = timing.together(run, carry, repeats)
        self.add(what, seen, title, times, tflop=tflop, fps=frames / seconds)
        return carry[0]

    def clips(self, decoder: "_Decoder | None") -> None:
        """The time to the first frame and to the last one of a clip of the recipe's length."""
        recipe, title = self.recipe, "none" if decoder is None else decoder.title
        sizes = recipe.causal.block_sizes(recipe.video.latent_frames)

        def clip(count: int) -> None:
            state, waiting = self.start(), None
            cache = None if decoder is None else decoder.start()
            for i in range(count):
                out, state = (self.first if i == 0 else self.block)(self.params, state)
                if decoder is not None:
                    out, cache = decoder.decode(decoder.params, out, cache)
                if waiting is not None:  # the block before is handed out while this one is under way
                    np.asarray(waiting)
                waiting = out
            np.asarray(waiting)

        if decoder is not None:
            times, _ = timing.each(lambda _: clip(1), None, self.plan.few)
            self.add("time to first frame", None, title, times)
        times, _ = timing.each(lambda _: clip(len(sizes)), None, self.plan.few)
        end, tflop = 0, 0.0
        for size in sizes:
            end += size
            seen = sum(b - a for a, b in attention.visible_frames(end, recipe.causal))
            tflop += (self.steps + recipe.causal.context_pass) * self.pass_tflop(seen, size)
            tflop += 0.0 if decoder is None else decoder.tflop(size)
        what, fps = f"clip of {recipe.video.frames} frames", recipe.video.frames / times.median
        self.add(what, None, title, times, tflop=tflop, fps=fps)


class _Decoder:
    """A codec with random weights on the device, compiled for both lengths of a block."""

    def __init__(self, codec: bench_codecs.Codec):
        self.codec, self.title = codec, codec.title
        self.params = random_weights(codec.shapes(), 3)
        self.start, self.decode = codec.programs()
        self._tflop: dict[int, float] = {}

    def tflop(self, frames: int) -> float:
        if frames not in self._tflop:
            self._tflop[frames] = self.codec.flops(frames) / 1e12
        return self._tflop[frames]


def rewinder(position: int) -> Callable[[stream.StreamState], stream.StreamState]:
    """Moves a stream back to latent frame ``position``: its next block takes the slots of the block just finished."""

    def back(state: stream.StreamState) -> stream.StreamState:
        # A new array each time: the state is donated.
        return dataclasses.replace(
            state, cache=dataclasses.replace(state.cache, position=jnp.asarray(np.int32(position)))
        )

    return back


def run(recipe: Recipe, plan: Plan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure; the report of :mod:`causvid_jax.analysis.bench_results`.

    Args:
        recipe: what is measured, on one device.
        plan: how much.
        log: told what comes next.

    Raises:
        ConfigError: what cannot work, before anything is computed.
    """
    made = check(recipe, plan)
    held = {}
    log("compiling")
    bench = _Bench(recipe, plan)
    log("every cache length")
    state = bench.every_length()
    log("steady stream and clips, latents only")
    state = bench.blocks(state, None)
    bench.clips(None)
    held["student"], of = devices.memory_peak()
    # The small codec first: a peak never falls.
    for codec in sorted(made, key=lambda c: c.recipe.decoder == "vae"):
        log(f"steady stream and clips, {codec.title}")
        decoder = _Decoder(codec)
        state = bench.blocks(state, decoder)
        bench.clips(decoder)
        held[f"and {codec.title}"], _ = devices.memory_peak()
    device = devices.describe()
    net = recipe.student
    peak, why = devices.peak(str(device["kind"]), net.dtype)
    words = settings(recipe, plan)
    stored = f"kernels in {net.dtype}" if plan.weights == "compute" else "all in float32"
    return {
        "program": "launch.bench",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "settings": words,
        "weights": f"random, {stored}",
        "peak": why,
        "compile_seconds": bench.compile_seconds,
        "memory": {"of": of, "bytes": held},
        "lines": [bench_results.line(item, words, peak) for item in bench.lines],
        "notes": list(NOTES),
    }
