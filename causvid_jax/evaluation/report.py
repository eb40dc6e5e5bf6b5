"""The report of a recipe: real clips, VAE, teacher and student judged on held-out prompts, as a dict and in Markdown.

Samplers are handed in as functions (:class:`Samplers`), so that what is measured does not depend on how it is made.
"""

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from causvid_jax.config import Recipe, require
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as judging
from causvid_jax.evaluation import metrics
from causvid_jax.progress import Progress

Switch = tuple[int, Sequence[str]]


class Teacher(Protocol):
    """Clips of the recipe's own length for ``prompts``: uint8 ``[B, T, H, W, 3]``; latents if not ``decode``."""

    def __call__(self, prompts: Sequence[str], seed: int, *, decode: bool = True) -> np.ndarray: ...


class Student(Protocol):
    """Streams of ``frames`` pixel frames; with ``switch = (frame, new prompts)`` the prompts change at that frame."""

    def __call__(
        self, prompts: Sequence[str], seed: int, *, frames: int, switch: Switch | None = None, decode: bool = True
    ) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Samplers:
    """What makes clips. ``reconstruct`` passes uint8 clips ``[B, T, H, W, 3]`` through the VAE and back;
    ``reconstruct_tiny`` back through the tiny decoder, where the student's streams are shown by that. Without a
    ``teacher`` the report has no row, no seconds and no ratio of one."""

    reconstruct: Callable[[np.ndarray], np.ndarray]
    teacher: Teacher | None
    student: Student
    reconstruct_tiny: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
      samples: clips per row; the held-out prompts are taken in turn, each time with other noise.
      long_samples: streams of ``long_factor`` times the trained length (0: as many as ``samples``).
      switch_samples: streams whose prompt changes half-way through twice the trained length (0: as ``samples``).
      reference: real test clips that every row's Frechet distance is measured to.
      batch: clips sampled at once, also in the timing.
      long_factor: length of the long streams, in trained lengths.
      repeats: timed runs of each sampler, after one that compiles; the median counts.
      seed: of prompts, real clips and noise.
    """

    samples: int = 64
    long_samples: int = 0
    switch_samples: int = 0
    reference: int = 256
    batch: int = 16
    long_factor: int = 10
    repeats: int = 3
    seed: int = 0

    def __post_init__(self):
        for name, least in (("samples", 2), ("reference", 2), ("batch", 1), ("long_factor", 1), ("repeats", 1)):
            value = getattr(self, name)
            require(value >= least, f"--{name} is {value}; it must be at least {least}")
        for name in ("long_samples", "switch_samples"):
            value = getattr(self, name)
            require(value == 0 or value >= 2, f"--{name} is {value}; it must be 0 (as --samples) or at least 2")


@dataclasses.dataclass(frozen=True)
class Result:
    """The report as a JSON-able dict, and clips to look at: row name to (captions, uint8 ``[B, T, H, W, 3]``)."""

    report: dict[str, Any]
    clips: dict[str, tuple[list[str], np.ndarray]]


def held_out_prompts(recipe: Recipe, count: int, seed: int) -> list[str]:
    """``count`` captions with combinations no training caption has, shuffled, repeated only once all were used."""
    captions = digits.captions(recipe.data, "test")
    require(len(captions) > 0, f"data.held_out_fraction is {recipe.data.held_out_fraction}; no caption is held out")
    rng = np.random.default_rng([seed, 2])
    order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-count // len(captions)))])
    return [captions[i] for i in order[:count]]


def switched_prompts(recipe: Recipe, prompts: Sequence[str], seed: int) -> list[str]:
    """For each prompt a held-out one that differs from it in digit, colour and direction.

    With two digits none of the new ones has anything of any of the old ones.
    """
    captions = {caption: judging.wanted(caption) for caption in digits.captions(recipe.data, "test")}
    rng = np.random.default_rng([seed, 3])
    result = []
    for prompt in prompts:
        old = [set(values) for values in zip(*judging.wanted(prompt), strict=True)]
        other = [
            c for c, new in captions.items() if not any(x in y for one in new for x, y in zip(one, old, strict=True))
        ]
        require(len(other) > 0, f"no held-out caption differs from {prompt!r} in digit, colour and direction")
        result.append(other[rng.integers(len(other))])
    return result


def real_clips(recipe: Recipe, prompts: Sequence[str], seed: int) -> np.ndarray:
    """Real clips of ``prompts`` in test handwriting, uint8 ``[B, T, H, W, 3]``."""
    rng = np.random.default_rng([seed, 4])
    return np.stack([digits.sample_clip(rng, "test", recipe.data, recipe.video, p)[0] for p in prompts])


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``call`` over ``repeats`` runs, after one run that compiles and does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


class _Work:
    """Progress over a known amount of work, in network passes of one latent frame."""

    def __init__(self, total: float, show: bool):
        self._progress = Progress("evaluation, passes", round(total)) if show else None
        self._done = 0.0

    def begin(self, what: str) -> None:
        if self._progress:
            self._progress.note(what)

    def add(self, work: float) -> None:
        self._done += work
        if self._progress:
            self._progress.update(round(self._done))

    def close(self) -> None:
        if self._progress:
            self._progress.close()


def stream_starts(recipe: Recipe, factor: int) -> np.ndarray:
    """Block starts, as of ``metrics.block_starts``, of a stream with ``factor`` times the blocks of a clip."""
    latent = recipe.video.latent_frames
    blocks = len(recipe.causal.block_sizes(latent))
    longer = latent + (factor - 1) * blocks * recipe.causal.frames_per_block
    return metrics.block_starts(longer, recipe.causal.block_sizes(longer))


def _score(
    recipe: Recipe,
    judge: judging.Judge,
    video: np.ndarray,
    prompts: Sequence[str],
    starts: np.ndarray,
    reference: np.ndarray,
) -> dict[str, float]:
    reading = judging.read(judge, video, data=recipe.data)
    return {
        **metrics.accuracies(reading.triples, [judging.wanted(p) for p in prompts]),
        "frechet": metrics.frechet_distance(reading.features, reference),
        "discontinuity": metrics.discontinuity(video, starts),
        "clips": len(video),
    }


def _passes(recipe: Recipe) -> dict[str, dict[str, int]]:
    frames = recipe.video.latent_frames
    return {
        "teacher": metrics.network_passes(
            block_sizes=(frames,),
            steps=recipe.diffusion.num_inference_steps,
            guided=recipe.diffusion.guidance_scale != 1.0,
        ),
        "student": metrics.network_passes(
            block_sizes=recipe.causal.block_sizes(frames),
            steps=len(recipe.diffusion.denoising_timesteps),
            guided=False,
            extra=int(recipe.causal.context_pass),
        ),
    }


def evaluate(
    recipe: Recipe,
    judge: judging.Judge,
    samplers: Samplers,
    plan: Plan,
    *,
    progress: bool = True,
) -> Result:
    """Measure everything the report holds.

    Args:
      recipe: geometry, data and step counts.
      judge: as from ``judge.load``.
      samplers: what makes the clips.
      plan: how many.
      progress: show a bar with the time left.
    """
    frames, latent = recipe.video.frames, recipe.video.latent_frames
    passes = _passes(recipe)
    if samplers.teacher is None:
        del passes["teacher"]
    cost = {name: float(latent * p["passes_per_frame"]) for name, p in passes.items()}
    starts = stream_starts(recipe, 1)
    require(len(starts) > 2, f"a clip of {latent} latent frames is a single block; there is no border to judge")
    long_starts, switch_starts = stream_starts(recipe, plan.long_factor), stream_starts(recipe, 2)
    at = (len(switch_starts) - 1) // 2
    n_long, n_switch = plan.long_samples or plan.samples, plan.switch_samples or plan.samples
    prompts = held_out_prompts(recipe, max(plan.samples, n_long, n_switch), plan.seed)
    own = prompts[: plan.samples]
    total = plan.samples * sum(cost.values())
    total += cost["student"] * (plan.long_factor * n_long + 2 * n_switch)
    timing_work = 2 * plan.batch * (plan.repeats + 1)
    total += timing_work * sum(cost.values())
    work = _Work(total, progress)
    work.add(0.0)

    def batches(what, each, captions, make):
        clips = []
        work.begin(what)
        for i in range(0, len(captions), plan.batch):
            part = captions[i : i + plan.batch]
            # One batch size, hence one compilation: a short last batch is filled up and cut again.
            full = [*part, *([part[-1]] * (plan.batch - len(part)))]
            clips.append(make(full, i)[: len(part)])
            work.add(each * len(part))
        return np.concatenate(clips)

    pool = held_out_prompts(recipe, plan.reference, plan.seed + 1)
    reference = judging.read_digits(judge, real_clips(recipe, pool, plan.seed + 1))[1]
    clips: dict[str, tuple[list[str], np.ndarray]] = {}
    real = real_clips(recipe, own, plan.seed)
    clips["real"] = own, real

    def through(codec, what):
        return own, batches(what, 0.0, own, lambda full, i: codec(_slice(real, i, len(full))))

    clips["vae"] = through(samplers.reconstruct, "VAE")
    if samplers.reconstruct_tiny:
        clips["taehv"] = through(samplers.reconstruct_tiny, "tiny decoder")
    if teacher := samplers.teacher:
        clips["teacher"] = own, batches("teacher", cost["teacher"], own, lambda p, i: teacher(p, plan.seed + i))
    clips["student"] = (
        own,
        batches("student", cost["student"], own, lambda p, i: samplers.student(p, plan.seed + i, frames=frames)),
    )
    long_prompts = prompts[:n_long]
    clips["long"] = (
        long_prompts,
        batches(
            f"student, {plan.long_factor}x",
            cost["student"] * plan.long_factor,
            long_prompts,
            lambda p, i: samplers.student(p, plan.seed + i, frames=int(long_starts[-1]))[:, -frames:],
        ),
    )
    before = prompts[:n_switch]
    after = switched_prompts(recipe, before, plan.seed)
    clips["switch"] = (
        after,
        batches(
            "prompt switch",
            cost["student"] * 2,
            before,
            lambda p, i: samplers.student(
                p,
                plan.seed + i,
                frames=int(switch_starts[-1]),
                switch=(int(switch_starts[at]), _slice(after, i, len(p))),
            ),
        ),
    )
    scores: dict[str, dict[str, float]] = {
        name: _score(recipe, judge, clips[name][1], own, starts, reference)
        for name in ("real", "vae", "taehv", "teacher", "student")
        if name in clips
    }
    tail = long_starts - (long_starts[-1] - frames)  # borders before the tail become negative
    scores["long"] = _score(recipe, judge, clips["long"][1], long_prompts, tail, reference)
    switch = switch_report(recipe, judge, clips["switch"][1], before, after, switch_starts, at)
    work.begin("timing")
    timing = _timing(recipe, samplers, plan, own, lambda name: work.add(cost[name] * timing_work / 2))
    work.close()
    report = {
        "recipe": recipe.name,
        "plan": dataclasses.asdict(plan) | {"long_samples": n_long, "switch_samples": n_switch},
        "machine": machine(),
        "scores": scores,
        "switch": switch,
        "passes": passes,
        "seconds_per_clip": timing,
        "decoders": {"teacher": "vae", "student": recipe.decoder},
    }
    return Result(report | {"targets": targets(report)}, clips)


def _slice(values, start: int, count: int):
    """``values[start : start + count]``, the last one repeated where they end."""
    part = [values[min(i, len(values) - 1)] for i in range(start, start + count)]
    return np.stack(part) if isinstance(values, np.ndarray) else part


def switch_report(
    recipe: Recipe,
    judge: judging.Judge,
    video: np.ndarray,
    before: Sequence[str],
    after: Sequence[str],
    starts: np.ndarray,
    at: int,
) -> dict[str, Any]:
    """Block verdicts around a prompt switch.

    Args:
      video: uint8 ``[B, T, H, W, 3]``.
      before, after: captions of each clip.
      starts: first pixel frame of every block, and T.
      at: index of the first block under the new caption.

    Returns:
      ``metrics.switch_scores`` of how many blocks it takes until the new caption holds: until a block is read as it,
      and the video from that block to the end, too, in the way every clip is read. ``every_block``: the same of the
      strictest count (``metrics.blocks_until``), for which every single block to the end must be read right.
      ``cache``: what the stream does with it (``CausalConfig.on_prompt_switch``). Share of clips that obeyed the old
      caption in the block before, and of those that read the new one in each block after.
    """

    def reads(captions, first, last):
        reading = judging.read(judge, video[:, starts[first] : starts[last]], data=recipe.data)
        return metrics.agreement(reading.triples, [judging.wanted(c) for c in captions]).all(axis=(1, 2))

    end = len(starts) - 1
    single = np.stack([reads(after, block, block + 1) for block in range(at, end)], axis=1)  # [B, blocks]
    rest = np.stack([reads(after, block, end) for block in range(at, end)], axis=1)
    return metrics.switch_scores([metrics.first_block(row) for row in single & rest]) | {
        "cache": recipe.causal.on_prompt_switch,
        "every_block": metrics.switch_scores([metrics.blocks_until(row) for row in single]),
        "old_caption_before": float(reads(before, at - 1, at).mean()),
        "new_caption_by_block": single.mean(axis=0).tolist(),
        "clips": len(video),
    }


def _timing(recipe, samplers, plan, prompts, done) -> dict[str, dict[str, float]]:
    batch = _slice(list(prompts), 0, plan.batch)
    calls = {}
    if samplers.teacher:
        calls["teacher"] = lambda decode: samplers.teacher(batch, plan.seed, decode=decode)
    calls["student"] = lambda decode: samplers.student(batch, plan.seed, frames=recipe.video.frames, decode=decode)
    result: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        result[name] = {}
        for key, decode in (("with_decode", True), ("without_decode", False)):
            seconds = timed(functools.partial(call, decode), plan.repeats)
            result[name][key] = seconds / plan.batch
            done(name)
    return result


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the digits recipe is to reach, each with the figure measured and whether it is met; nothing that is
    measured against the teacher where ``report`` has none."""
    scores, seconds, passes = report["scores"], report["seconds_per_clip"], report["passes"]
    result = []

    def add(name, value, bound, at_least=True):
        met = value >= bound - 1e-9 if at_least else value <= bound + 1e-9
        words = f"{'>=' if at_least else '<='} {bound:g}"
        result.append({"name": name, "value": value, "bound": words, "met": met})

    def share(part, whole):
        return part / whole if whole else float("nan")

    if "teacher" in scores:
        for part, whole in (("teacher", "real"), ("student", "teacher")):
            for attribute in metrics.ATTRIBUTES:
                add(f"{part} / {whole}, {attribute}", share(scores[part][attribute], scores[whole][attribute]), 0.95)
        ratio = passes["teacher"]["passes_per_frame"] / passes["student"]["passes_per_frame"]
        add("network passes per frame, teacher / student", ratio, 20)
        for key, words in (("with_decode", "with"), ("without_decode", "without")):
            ratio = share(seconds["teacher"][key], seconds["student"][key])
            add(f"seconds {words} decoding, teacher / student", ratio, 8)
    for attribute in metrics.ATTRIBUTES:
        lost = scores["student"][attribute] - scores["long"][attribute]
        add(f"{attribute} lost at {report['plan']['long_factor']}x the length", lost, 0.05, at_least=False)
    add("new prompt holds within 3 blocks", report["switch"]["within_3"], 0.9)
    return result
