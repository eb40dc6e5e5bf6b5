"""The report of a recipe: real clips, codecs, teacher and student, classified on held-out prompts.

The report is a table of rows, each a name, a sampler and its metrics, and measures of prompt switches and of speed.
"""

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.evaluation import frame_metrics, metrics, targets
from causvid_jax.evaluation.plan import Plan
from causvid_jax.progress import Progress
from causvid_jax.sampling.protocols import Samplers


@dataclasses.dataclass(frozen=True)
class Result:
    """The report as a dict for JSON, and the clips of the contact sheet.

    ``clips``: row name to (captions, uint8 ``[B, T, H, W, 3]``).
    """

    report: dict[str, Any]
    clips: dict[str, tuple[list[str], np.ndarray]]


def held_out_prompts(recipe: Recipe, count: int, seed: int, split: str = "test") -> list[str]:
    """Return ``count`` captions that no training clip has, shuffled; they repeat after all are used.

    Raises:
        ConfigError: the recipe holds no caption out for ``split``.
    """
    captions = digits.captions(recipe.data, split)
    field = "held_out_fraction" if split == "test" else "validation_fraction"
    require(len(captions) > 0, f"data.{field} is {getattr(recipe.data, field)}; no caption is held out for it")
    rng = np.random.default_rng([seed, 2])
    order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-count // len(captions)))])
    return [captions[i] for i in order[:count]]


def report_prompts(recipe: Recipe, plan: Plan) -> list[str]:
    """Return the held-out prompts of the longest row; the other rows have the first ones of them."""
    return held_out_prompts(recipe, plan.most_samples, plan.seed, plan.captions)


def switched_prompts(recipe: Recipe, prompts: Sequence[str], seed: int, split: str = "test") -> list[str]:
    """Return for each prompt a held-out one that differs in digit, colour and direction, for every pair of digits.

    Raises:
        ConfigError: no held-out caption differs from a prompt.
    """
    captions = {caption: classifiers.target_triples(caption) for caption in digits.captions(recipe.data, split)}
    rng = np.random.default_rng([seed, 3])
    result = []
    for prompt in prompts:
        old = [set(values) for values in zip(*classifiers.target_triples(prompt), strict=True)]
        other = [
            c for c, new in captions.items() if not any(x in y for one in new for x, y in zip(one, old, strict=True))
        ]
        require(len(other) > 0, f"no held-out caption differs from {prompt!r} in digit, colour and direction")
        result.append(other[rng.integers(len(other))])
    return result


def real_clips(recipe: Recipe, prompts: Sequence[str], seed: int) -> np.ndarray:
    """Return real clips of ``prompts`` in test handwriting, uint8 ``[B, T, H, W, 3]``."""
    rng = np.random.default_rng([seed, 4])
    return np.stack([digits.sample_clip(rng, "test", recipe.data, recipe.video, p)[0] for p in prompts])


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of ``call`` over ``repeats`` runs, after one run that compiles."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


class _Work(Progress):
    """Progress over a known amount of work, in network passes of one latent frame."""

    done = 0.0

    def add(self, work: float) -> None:
        """Record that ``work`` more passes are done."""
        self.done += work
        self.update(round(self.done))


def stream_starts(recipe: Recipe, factor: int) -> np.ndarray:
    """Return the first pixel frames of the blocks (``metrics.block_starts``) of a stream of ``factor`` times a clip."""
    latent = recipe.video.latent_frames
    blocks = len(recipe.causal.block_sizes(latent))
    longer = latent + (factor - 1) * blocks * recipe.causal.frames_per_block
    return metrics.block_starts(longer, recipe.causal.block_sizes(longer))


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the report: captions and the sampler of its clips.

    Attributes:
        name: of the row.
        captions: one per clip.
        sample: ``(captions, first) -> uint8 [B, T, H, W, 3]``, clips ``first``, ``first + 1``, ....
        passes: network passes of one latent frame that a clip costs.
        starts: first pixel frames of the blocks, for the discontinuity at their borders.
    """

    name: str
    captions: list[str]
    sample: Callable[[list[str], int], np.ndarray]
    passes: float
    starts: np.ndarray


def make_rows(recipe: Recipe, samplers: Samplers, plan: Plan, cost: Mapping[str, float]) -> list[Row]:
    """Return the rows of the report: real clips, codecs, teacher, student, and the end of long streams.

    ``cost`` holds the network passes of one latent frame that a clip of the teacher and of the student takes.
    """
    frames, seed = recipe.video.frames, plan.seed
    starts = stream_starts(recipe, 1)
    prompts = report_prompts(recipe, plan)
    own = prompts[: plan.samples]
    real = real_clips(recipe, own, seed)

    def real_part(captions: list[str], first: int) -> np.ndarray:
        return _slice(real, first, len(captions))

    def through(codec: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[str], int], np.ndarray]:
        return lambda captions, first: codec(real_part(captions, first))

    def student(captions: list[str], first: int) -> np.ndarray:
        return samplers.student(captions, seed + first, frames=frames)

    def long_row(name: str, factor: int, count: int) -> Row:
        ends = stream_starts(recipe, factor)

        def sample(captions: list[str], first: int) -> np.ndarray:
            return samplers.student(captions, seed + first, frames=int(ends[-1]))[:, -frames:]

        # Borders before the last frames become negative, and are ignored.
        return Row(name, prompts[:count], sample, cost["student"] * factor, ends - (ends[-1] - frames))

    rows = [Row("real", own, real_part, 0.0, starts), Row("vae", own, through(samplers.reconstruct), 0.0, starts)]
    if samplers.reconstruct_tiny:
        rows.append(Row("taehv", own, through(samplers.reconstruct_tiny), 0.0, starts))
    if (teacher := samplers.teacher) is not None:
        rows.append(Row("teacher", own, lambda p, first: teacher(p, seed + first), cost["teacher"], starts))
    rows.append(Row("student", own, student, cost["student"], starts))
    rows.append(long_row("long", plan.long_factor, plan.long_samples or plan.samples))
    if plan.longest_factor:
        rows.append(long_row("longest", plan.longest_factor, plan.longest_samples))
    return rows


def switch_row(recipe: Recipe, samplers: Samplers, plan: Plan, cost: float) -> tuple[Row, list[str], int]:
    """Return the row of streams whose prompt changes half-way, their first prompts, and the block of the change.

    The streams have twice a clip's length; ``cost`` is that of a student's clip, as in :func:`make_rows`.
    """
    starts = stream_starts(recipe, 2)
    at = (len(starts) - 1) // 2
    before = report_prompts(recipe, plan)[: plan.switch_samples or plan.samples]
    after = switched_prompts(recipe, before, plan.seed, plan.captions)

    def sample(captions: list[str], first: int) -> np.ndarray:
        prompts = _slice(before, first, len(captions))
        switch = int(starts[at]), captions
        return samplers.student(prompts, plan.seed + first, frames=int(starts[-1]), switch=switch)

    return Row("switch", after, sample, 2 * cost, starts), before, at


def sample_row(row: Row, batch: int, progress: _Work) -> np.ndarray:
    """Return the clips of a row, uint8 ``[B, T, H, W, 3]``, made ``batch`` at a time.

    Raises:
        ConfigError: frames that are not finite; the message names the row.
    """
    clips = []
    progress.note(row.name)
    for first in range(0, len(row.captions), batch):
        part = row.captions[first : first + batch]
        # Pad a short last batch and cut the result, so that one batch size needs one compilation.
        try:
            made = row.sample(_slice(row.captions, first, batch), first)
        except ConfigError as error:  # frames that are not finite
            raise ConfigError(f"row {row.name!r} of the report, clips from {first} on: {error}") from error
        clips.append(made[: len(part)])
        progress.add(row.passes * len(part))
    return np.concatenate(clips)


def score(
    recipe: Recipe, classifier: classifiers.Classifier, row: Row, video: np.ndarray, reference: np.ndarray
) -> dict[str, float]:
    """Return the figures of a row: accuracies, Frechet distance, discontinuity at block borders, number of clips.

    ``video`` is uint8 ``[B, T, H, W, 3]``; ``reference [M, FEATURES]`` are features of real clips.
    """
    reading = classifiers.read(classifier, video, data=recipe.data)
    return {
        **metrics.accuracies(reading.triples, [classifiers.target_triples(caption) for caption in row.captions]),
        "frechet": metrics.frechet_distance(reading.features, reference),
        "discontinuity": metrics.discontinuity(video, row.starts),
        "clips": len(video),
    }


def digits_of(captions: Sequence[str]) -> list[int]:
    """Return the digit of each caption of one digit."""
    return [classifiers.target_triples(caption)[0][0] for caption in captions]


def real_sharpness(recipe: Recipe, prompts: Sequence[str], seed: int) -> dict[int, float]:
    """Return the mean sharpness of the real clips of ``prompts`` for every digit among them."""
    values, digit = frame_metrics.sharpness(real_clips(recipe, prompts, seed)), np.array(digits_of(prompts))
    return {int(d): float(values[digit == d].mean()) for d in np.unique(digit)}


def frames_report(
    recipe: Recipe,
    classifier: classifiers.Classifier,
    rows: Sequence[Row],
    videos: Mapping[str, np.ndarray],
    real: Mapping[int, float],
) -> dict[str, Any]:
    """Return frame scores of every row, and PSNRs in dB of codecs.

    Sharpness is relative to ``real``, the :func:`real_sharpness`. A PSNR is the mean over frame indices, that of the
    first frame, and the worst.
    """
    first_block = int(stream_starts(recipe, 1)[1])
    result: dict[str, Any] = {}
    for row in rows:
        video = videos[row.name]
        values = frame_metrics.frame_values(classifier, video, row.captions, recipe.data, first_block)
        values["sharpness"] = frame_metrics.relative_sharpness(values["sharpness"], digits_of(row.captions), real)
        result[row.name] = {name: frame_metrics.interval(value) for name, value in values.items()}
        if row.name in ("vae", "taehv"):
            psnr = frame_metrics.psnr(frame_metrics.error_by_frame(video, videos["real"]))
            result[row.name]["psnr"] = {"mean": float(psnr.mean()), "first": float(psnr[0]), "worst": float(psnr.min())}
    return result


def _passes(recipe: Recipe) -> dict[str, dict[str, float]]:
    diffusion, frames = recipe.diffusion, recipe.video.latent_frames
    of_teacher = diffusion.num_inference_steps * (1 + (diffusion.guidance_scale != 1.0))
    sizes = recipe.causal.block_sizes(frames)
    of_student = [diffusion.steps_of(block) + recipe.causal.context_pass for block in range(len(sizes))]
    return {
        "teacher": metrics.network_passes(block_sizes=(frames,), passes=(of_teacher,)),
        "student": metrics.network_passes(block_sizes=sizes, passes=of_student),
    }


def evaluate(
    recipe: Recipe,
    classifier: classifiers.Classifier,
    samplers: Samplers,
    plan: Plan,
) -> Result:
    """Return the report.

    Args:
        recipe: geometry, data and step counts.
        classifier: of ``classifiers.load``.
        samplers: of the trained networks.
        plan: how many clips.

    Raises:
        ConfigError: a clip of a single block, held-out captions that are missing, or frames that are not finite.
    """
    latent = recipe.video.latent_frames
    passes = _passes(recipe)
    if samplers.teacher is None:
        del passes["teacher"]
    cost = {name: float(latent * p["passes_per_frame"]) for name, p in passes.items()}
    require(
        len(stream_starts(recipe, 1)) > 2,
        f"a clip of {latent} latent frames is a single block; the discontinuity at borders needs two",
    )
    rows = make_rows(recipe, samplers, plan, cost)
    switching, before, at = switch_row(recipe, samplers, plan, cost["student"])
    timed_clips = 2 * plan.batch * (plan.repeats + 1)
    sampled = sum(row.passes * len(row.captions) for row in (*rows, switching))
    work = _Work("evaluation, passes", round(sampled + timed_clips * sum(cost.values())))
    pool = held_out_prompts(recipe, plan.reference, plan.seed + 1, plan.captions)
    reference = classifiers.read_digits(classifier, real_clips(recipe, pool, plan.seed + 1))[1]
    clips = {row.name: (row.captions, sample_row(row, plan.batch, work)) for row in (*rows, switching)}
    scores = {row.name: score(recipe, classifier, row, clips[row.name][1], reference) for row in rows}
    frames = {}
    if recipe.data.digits_per_clip == 1:
        real = real_sharpness(recipe, report_prompts(recipe, plan), plan.seed)
        frames = frames_report(recipe, classifier, rows, {name: video for name, (_, video) in clips.items()}, real)
    video = clips["switch"][1]
    switch = switch_report(recipe, classifier, video, before, switching.captions, switching.starts, at)
    work.note("timing")
    timing = _timing(recipe, samplers, plan, rows[0].captions, lambda name: work.add(cost[name] * timed_clips / 2))
    work.close()
    counts = {"long_samples": len(clips["long"][1]), "switch_samples": len(video)}
    report = {
        "recipe": recipe.name,
        "plan": dataclasses.asdict(plan) | counts,
        "machine": machine(),
        "scores": scores,
        "frames": frames,
        "switch": switch,
        "passes": passes,
        "seconds_per_clip": timing,
        "decoders": {"teacher": "vae", "student": recipe.decoder},
    }
    return Result(report | {"targets": targets.targets(report)}, clips)


def _slice(values: Any, start: int, count: int) -> Any:
    """Return ``values[start : start + count]``, the last one repeated beyond the end."""
    part = [values[min(i, len(values) - 1)] for i in range(start, start + count)]
    return np.stack(part) if isinstance(values, np.ndarray) else part


def switch_report(
    recipe: Recipe,
    classifier: classifiers.Classifier,
    video: np.ndarray,
    before: Sequence[str],
    after: Sequence[str],
    starts: np.ndarray,
    at: int,
) -> dict[str, Any]:
    """Report the predictions for every block around a prompt switch.

    Args:
        video: uint8 ``[B, T, H, W, 3]``.
        before, after: captions of each clip.
        starts: first pixel frame of every block, and T.
        at: index of the first block under the new caption.

    Returns:
        ``metrics.switch_scores`` of the number of blocks until the new caption holds: it is predicted for a block, and
        for the video from that block to the end. ``every_block``: the same for the strictest count
        (``metrics.blocks_until``), in which every single block to the end must be correct. ``cache``:
        ``CausalConfig.on_prompt_switch``. Also the share of clips with the old caption in the block before, and with
        the new one in each block after.
    """

    def reads(captions: Sequence[str], first: int, last: int) -> np.ndarray:
        reading = classifiers.read(classifier, video[:, starts[first] : starts[last]], data=recipe.data)
        agreed = metrics.agreement(reading.triples, [classifiers.target_triples(c) for c in captions])
        return np.asarray(agreed.all(axis=(1, 2)))

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


def _timing(
    recipe: Recipe, samplers: Samplers, plan: Plan, prompts: Sequence[str], done: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    batch = _slice(list(prompts), 0, plan.batch)
    calls = {}
    teacher = samplers.teacher
    if teacher is not None:
        calls["teacher"] = lambda decode: teacher(batch, plan.seed, decode=decode)
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
    """Return devices, processor cores and versions of the machine that the seconds were measured on."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
