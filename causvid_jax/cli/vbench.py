"""Evaluate a student by VBench: sample its prompts, run its models, compute its totals (docs/vbench.md).

``--stage=all`` runs the three in order. A run that was stopped continues; ``--shard=0/8`` samples an eighth. Scoring
needs the extra ``vbench``, or for VBench-Long ``--long``, a checkout of VBench. ``--stage=drift`` measures the drift of
videos without any model.
"""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import Recipe, published, require
from causvid_jax.config.files import write_text
from causvid_jax.evaluation.vbench.protocol import Protocol

Stage = Literal["all", "sample", "score", "totals", "drift"]


@dataclasses.dataclass(frozen=True)
class Options(Protocol):
    """The flags; with those of a :class:`causvid_jax.evaluation.vbench.protocol.Protocol`."""

    config: Recipe = config_option()
    stage: Stage = option("all", "What to do: all, sample, score, totals or drift.")
    output: str | None = option(None, "The folder of the run: clips in its videos/, results in its results/.")
    info: str | None = option(None, "VBench_full_info.json; default: that of the package vbench.")
    extended: str | None = option(None, "File with the text to sample for each entry of --info, line by line.")
    checkpoint: str | None = option(None, "Weights, as in causvid sample.")
    student: str | None = option(None, "The student's weights, instead of those in --checkpoint.")
    vae: str | None = option(None, "The VAE's weights, instead of those in --checkpoint.")
    taehv: str | None = option(None, "The tiny decoder's weights, instead of those in --checkpoint.")
    shard: str = option("0/1", "I/N: sample the clips I, I + N, I + 2 N, ...")
    long: str | None = option(None, "A checkout of VBench: score by VBench-Long.")
    results: tuple[str, ...] = option((), "Result files for --stage=totals; default: those of --output.")
    videos: tuple[str, ...] = option((), "Videos for --stage=drift.")

    def __post_init__(self) -> None:
        require(self.output, "no --output is given; it must be a folder for clips and results")
        require(self.stage != "drift" or self.videos, "no --videos is given; --stage=drift measures videos")

    config_of = staticmethod(published.recipe_of)


def main(options: Options) -> None:
    """Run the stages that the flag names.

    Raises:
        ConfigError: unreadable lists, clips that are missing, or results that are incomplete.
        RunError: VBench-Long failed.
    """
    folder = pathlib.Path(options.output or "")
    if options.stage == "drift":
        measure_drift(options, folder)
        return
    from causvid_jax.evaluation.vbench import clips, score, totals
    from causvid_jax.media.output import remove_abandoned

    index, count = clips.parse_shard(options.shard)
    info = score.find_info(options.info)
    entries = clips.read_entries(info, options.extended)
    all_clips, videos = clips.plan(entries, options), folder / clips.VIDEOS
    if options.stage in ("all", "sample"):
        sample(options, all_clips[index::count], all_clips, folder)
    if options.stage in ("all", "score"):
        remove_abandoned(videos)  # VBench would take them for clips
        lacking = clips.absent(all_clips, videos)
        require(
            not lacking,
            f"{videos} lacks {len(lacking)} of {len(all_clips)} clips, first {lacking[0].name if lacking else ''!r}; "
            "sample them first (--stage=sample on every shard)",
        )
        if options.long:
            results = score.run_long(pathlib.Path(options.long), videos, folder / "results")
        else:
            results = score.run_short(videos, info, folder / "results")
    else:
        results = [pathlib.Path(path) for path in options.results] or sorted(
            (folder / "results").rglob("*_results.json")
        )
    if options.stage != "sample":
        expected = {} if options.long else clips.expected_videos(entries, options)
        text = totals.describe(totals.read_results(results, expected))
        write_text(folder / "totals.md", text)
        print(text)


def sample(options: Options, clips_of_shard: list, all_clips: list, folder: pathlib.Path) -> None:
    """Sample the clips of this shard that are missing, into ``folder``/videos.

    Raises:
        ConfigError: weights that do not fit, or clips of other weights, texts or settings in the folder.
    """
    common.writable_workdir(str(folder), "--output")
    print(f"Loading {options.config.name} ...", flush=True)
    from causvid_jax.evaluation.vbench import clips
    from causvid_jax.sampling import pipeline, weights
    from causvid_jax.text import encoder

    common.enable_compilation_cache()
    videos = folder / clips.VIDEOS
    # All texts are encoded first: the encoder is loaded once, and freed before the student is loaded.
    texts = dict.fromkeys(clip.text for clip in clips.absent(clips_of_shard, videos))
    reader = encoder.open_encoder(options.config, options.checkpoint)
    encoder.fill(reader, list(texts))
    files: dict[str, Any] = {"student": options.student, "vae": options.vae, "taehv": options.taehv}
    opened, recipe = weights.find(options.config, "student", options.checkpoint, files=files)
    pipe = pipeline.StudentPipeline(recipe, weights.load_student(opened, recipe), reader)
    clips.claim(folder, clips.identity(pipe, weights.checksum(opened, recipe), all_clips, options))
    clips.sample(pipe, clips_of_shard, videos, options, lambda line: print(line, flush=True))


def measure_drift(options: Options, folder: pathlib.Path) -> None:
    """Write ``drift.json`` with the measures and curves of every video, and print the measures."""
    common.writable_workdir(str(folder), "--output")
    from causvid_jax import media
    from causvid_jax.evaluation.vbench import drift
    from causvid_jax.sampling import blocks

    recipe, report = options.config, {}
    for path in options.videos:
        video = media.read_video(path, recipe.video.height, recipe.video.width, fps=recipe.video.fps)
        first = blocks.first_frame(1, recipe)
        result = drift.measure(video, recipe.video.fps, blocks.first_frame(2, recipe) - first, first)
        report[path] = {**result.summary(), "curves": {k: v.round(5).tolist() for k, v in result.curves.items()}}
        print(json.dumps({path: result.summary()}, indent=1), flush=True)
    write_text(folder / "drift.json", json.dumps(report))
