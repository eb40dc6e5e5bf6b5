"""Run a controlled experiment: train and measure rows of settings in the same way, each with several seeds.

An experiment is a file with ``get_experiment()`` (``experiments/``). Every row starts from the same working directory
of a finished ``causvid road``. It trains only the stages that it names, and reads everything else from that directory.
Finished parts are skipped, so an interrupted experiment continues.

Every figure is the mean over seeds and held-out prompts, with a 95 % interval by a bootstrap over both.
"""

import collections
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import Recipe, require, to_json
from causvid_jax.config.files import write_text
from causvid_jax.config.recipes import override
from causvid_jax.data import digits, prepare
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.evaluation import frame_metrics, report
from causvid_jax.sampling import batch, blocks, weights
from causvid_jax.sampling.pipeline import StudentPipeline
from causvid_jax.text import encoder
from causvid_jax.training import provenance, road
from causvid_jax.training.samples import CLASSIFIER, many_steps

TRAINED = ("teacher", "causal", "init", "consistency", "distill")
CAUSAL_STEPS = 16
"""Denoising steps of a causal teacher that is run as a stream."""
BATCH = 16
PAPER_SAMPLER: Mapping[str, str] = {"causal.context_pass": "True", "diffusion.first_block_timesteps": "()"}
"""Settings of the paper's sampler: all blocks have the same steps, and a pass on the clean block writes the cache."""
LABELS = {"digit": "share of frames with the right digit", "color": "share of frames with the right colour"}
"""Names of plotted metrics on the axis."""
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of an experiment.

    Attributes:
        name: in the table.
        network: the stage whose weights are sampled: ``"teacher"`` makes clips, ``"causal"`` streams with
            :data:`CAUSAL_STEPS` steps, ``"init"`` and ``"distill"`` stream as the recipe says.
        stages: stages that the row trains again for every seed (``"trajectories"`` are made again).
        once: stages before them that the row trains again, once for all seeds.
        settings: recipe fields as text, such as ``{"train_distill.teacher": "causal"}``.
        replace: stage to another stage whose weights are used instead, such as ``{"init": "causal"}``.
        strength: follow a real clip of another colour at this strength (video to video); None: from text.
        paper: the paper's figure for this row, as text; empty if there is none.
    """

    name: str
    network: str = "distill"
    stages: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    replace: Mapping[str, str] = dataclasses.field(default_factory=dict)
    strength: float | None = None
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A claim and the rows that test it.

    Attributes:
        title: of the table and the plot.
        claim: the claim of the paper, with its source.
        rows: settings to compare.
        metric: the plotted figure, a name of :func:`frame_metrics.frame_values`.
        lengths: ends of the measured clips, in trained lengths; each clip has one trained length.
        settings: recipe fields of every row.
    """

    title: str
    claim: str
    rows: tuple[Row, ...]
    metric: str = "digit"
    lengths: tuple[int, ...] = (1,)
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Number of seeds per row, and of clips per seed.

    Raises:
        ConfigError: ``seeds`` is outside 1 to 100, or ``samples`` outside 2 to 100,000.
    """

    seeds: int = 3
    samples: int = 64

    def __post_init__(self) -> None:
        require(1 <= self.seeds <= 100, f"--seeds is {self.seeds}; accepted: 1 to 100")
        require(2 <= self.samples <= 10**5, f"--samples is {self.samples}; accepted: 2 to {10**5}")


# ---- files -----------------------------------------------------------------------------------------------------------


def folder() -> pathlib.Path:
    """Return the folder of the experiments of a clone."""
    return pathlib.Path(__file__).resolve().parents[2] / "experiments"


def names() -> list[str]:
    """Return the names of the experiments of a clone."""
    return sorted(path.stem for path in folder().glob("*.py"))


def load(name: str) -> Experiment:
    """Load an experiment by name or by file. The file is Python and is run: use files that you trust.

    Raises:
        ConfigError: there is no such experiment, or its file has no ``get_experiment``.
    """
    path = folder() / f"{name}.py" if re.fullmatch(r"\w+", name) else pathlib.Path(name)
    require(path.is_file(), f"experiment {name!r} does not exist; accepted: {', '.join(names())}, or a file")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, "get_experiment"), f"experiment file {path} has no get_experiment function")
    return module.get_experiment()


def link(base: pathlib.Path, part: pathlib.Path, stages: tuple[str, ...], replace: Mapping[str, str]) -> None:
    """Make ``part`` a working directory that reads everything from ``base`` except the results of ``stages``."""
    again = ("causal_trajectories", "trajectories") if "trajectories" in stages else ()
    (part / "data").mkdir(parents=True, exist_ok=True)
    for source in (*base.glob("*"), *(base / "data").glob("*")):
        target = part / source.relative_to(base)
        made_here = source.name in (*stages, "data", paths.ROAD_RECORD, road.REPORT) or source.name.startswith(again)
        if not made_here and not target.is_symlink():
            source = base / replace[source.name] if source.parent == base and source.name in replace else source
            target.symlink_to(source.resolve(), target_is_directory=source.is_dir())


# ---- one row ---------------------------------------------------------------------------------------------------------


def row_recipe(recipe: Recipe, experiment: Experiment, row: Row, seed: int) -> Recipe:
    """Return the recipe of a row: its settings, the seed of the stages that it trains, decoded by the VAE."""
    seeds = {f"train_{stage}.seed": str(seed) for stage in row.stages if stage in TRAINED}
    changed = override(recipe, {**experiment.settings, **row.settings, **seeds})
    return dataclasses.replace(changed, decoder="vae")


def folder_of(recipe: Recipe, row: Row, base: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """Return where the stages of a row are trained: ``WORKDIR/<stages>_<digest>``.

    The digest covers everything that determines the weights. Rows of several experiments with equal training share a
    folder, and rows with other settings never do.
    """
    parts = [to_json(recipe), row.once, row.stages, sorted(row.replace.items()), str(base.resolve())]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
    return workdir / "_".join((*row.stages, digest))


def train(recipe: Recipe, row: Row, base: pathlib.Path, part: pathlib.Path, say: Say) -> None:
    """Run the stages of a row in its folder; finished ones are skipped.

    Raises:
        ConfigError: the row names an unknown stage.
    """
    require(
        set(row.stages) <= {*TRAINED, "trajectories"},
        f"row {row.name!r} has the stages {row.stages}; accepted: {', '.join((*TRAINED, 'trajectories'))}",
    )
    link(base, part, row.stages, row.replace)
    legs = [leg for leg in road.legs(recipe, part, prepare.Options()) if leg.name in row.stages]
    if legs:
        road.travel(recipe, part, legs, say)


def train_row(
    recipe: Recipe, experiment: Experiment, row: Row, seed: int, base: pathlib.Path, workdir: pathlib.Path, say: Say
) -> tuple[Recipe, pathlib.Path]:
    """Train all stages of a row for a seed; return its recipe and its folder. Finished stages are skipped."""
    start = base
    if row.once:
        first = dataclasses.replace(row, stages=row.once, once=())
        of_first = row_recipe(recipe, experiment, first, seed=0)
        start = folder_of(of_first, first, base, workdir)
        train(of_first, first, base, start, say)
    own = row_recipe(recipe, experiment, row, seed)
    part = folder_of(own, row, base, workdir)
    train(own, row, start, part, say)
    return own, part


def sample(
    recipe: Recipe, row: Row, part: pathlib.Path, budget: Budget, lengths: tuple[int, ...], seed: int
) -> tuple[list[str], dict[int, np.ndarray]]:
    """Return the captions, and by length (in trained lengths) the clips uint8 ``[B, T, H, W, 3]`` that end there."""
    captions = report.held_out_prompts(recipe, budget.samples, seed)
    params, recipe = paths.load_decoders(recipe, part)
    trained, _ = paths.load_stage(recipe, row.network, part)
    noise = 1000 * seed
    if row.network == "teacher":
        samplers = batch.make_samplers({**params, "teacher": trained, "student": trained}, recipe)
        assert samplers.teacher is not None
        clips = [samplers.teacher(some, noise + first) for first, some in in_batches(captions)]
        return captions, {1: np.concatenate(clips)}
    if row.network == "causal":
        recipe = many_steps(recipe, CAUSAL_STEPS)
    pipe = StudentPipeline(
        recipe, weights.for_stream({**params, "student": trained}, recipe), encoder.open_encoder(recipe, part)
    )
    if row.strength is not None:
        return captions, {1: follow(pipe, captions, row.strength, noise)}
    ends = [int(report.stream_starts(recipe, length)[-1]) for length in lengths]
    parts = [play(pipe, some, ends, noise + first) for first, some in in_batches(captions)]
    return captions, {length: np.concatenate([clips[i] for clips in parts]) for i, length in enumerate(lengths)}


def in_batches(captions: list[str]) -> list[tuple[int, list[str]]]:
    """Return the captions in batches of :data:`BATCH`, each with the number of its first caption."""
    return [(first, captions[first : first + BATCH]) for first in range(0, len(captions), BATCH)]


def play(pipe: StudentPipeline, captions: list[str], ends: list[int], seed: int) -> list[np.ndarray]:
    """Stream to the last of ``ends`` (pixel frames); return the clip before each, uint8 ``[B, T, H, W, 3]``.

    No other frames are kept.
    """
    config, clips, frame = pipe.config, [], 0
    recent: collections.deque[np.ndarray] = collections.deque(
        maxlen=blocks.block_of(config.video.frames - 1, config) + 1
    )
    state = pipe.stream(captions, seed=seed)
    for frames, _ in pipe.frames(state, blocks.block_of(ends[-1] - 1, config) + 1):
        recent.append(frames)
        frame += frames.shape[1]
        if frame in ends:
            clips.append(np.concatenate(recent, axis=1)[:, -config.video.frames :])
    return clips


def follow(pipe: StudentPipeline, captions: list[str], strength: float, seed: int) -> np.ndarray:
    """Return streams, uint8 ``[B, T, H, W, 3]``, that follow real clips of another colour than ``captions`` say.

    ``strength`` in (0, 1] is that of video to video.
    """
    recipe, result = pipe.config, []
    sources = report.real_clips(recipe, [recolor(caption, recipe) for caption in captions], seed)
    for first, some in in_batches(captions):
        state = pipe.stream(some, seed=seed + first)
        parts = [frames for frames, _ in pipe.follow(state, sources[first : first + len(some)], strength)]
        result.append(np.concatenate(parts, axis=1))
    return np.concatenate(result)


def recolor(caption: str, recipe: Recipe) -> str:
    """Return the caption with the next colour of the recipe."""
    specs, colors = digits.parse_caption(caption), recipe.data.colors
    following = {color: colors[(i + 1) % len(colors)] for i, color in enumerate(colors)}
    return digits.caption_of([dataclasses.replace(spec, color=following[spec.color]) for spec in specs])


# ---- the experiment --------------------------------------------------------------------------------------------------


def run(
    experiment: Experiment, recipe: Recipe, base: pathlib.Path, workdir: pathlib.Path, budget: Budget, say: Say = print
) -> dict[str, Any]:
    """Train and measure all rows and return the result; finished parts are read from ``workdir``.

    Raises:
        ConfigError: ``base`` does not have what the rows start from.
    """
    classifier = classifiers.load(recipe.data, base / CLASSIFIER)
    values: dict[str, dict[int, dict[str, list[np.ndarray]]]] = {}
    for row in experiment.rows:
        for seed in range(budget.seeds):
            say(f"{row.name}, seed {seed}:")
            own, part = train_row(recipe, experiment, row, seed, base, workdir, say)
            lengths = "_".join(map(str, experiment.lengths))
            of = row.network if row.strength is None else f"{row.network}_{row.strength:g}"
            path = part / f"values_{of}_{lengths}_{budget.samples}_{seed}.json"
            if not path.is_file():
                captions, clips = sample(own, row, part, budget, experiment.lengths, seed)
                first = int(report.stream_starts(own, 1)[1])
                measured = {
                    n: frame_metrics.frame_values(classifier, video, captions, own.data, first)
                    for n, video in clips.items()
                }
                as_lists = {n: {k: v.tolist() for k, v in each.items()} for n, each in measured.items()}
                write_text(path, json.dumps(as_lists) + "\n")
            for length, each in json.loads(path.read_text(encoding="utf-8")).items():
                for name, value in each.items():
                    slot = values.setdefault(row.name, {}).setdefault(int(length), {})
                    slot.setdefault(name, []).append(np.asarray(value, np.float64))
    rows = {
        name: {str(n): {k: frame_metrics.nested_interval(v) for k, v in each.items()} for n, each in lengths.items()}
        for name, lengths in values.items()
    }
    of_distillation = f"{recipe.train_distill.steps} cycles of {recipe.train_distill.batch_size} clips"
    return {
        "title": experiment.title,
        "claim": experiment.claim,
        "recipe": recipe.name,
        "seeds": budget.seeds,
        "samples": budget.samples,
        "distillation": of_distillation if any("distill" in row.stages for row in experiment.rows) else "",
        "metric": experiment.metric,
        "paper": {row.name: row.paper for row in experiment.rows},
        "rows": rows,
        **provenance.origin(base),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table, one line for every row and length."""
    columns = list(next(iter(next(iter(result["rows"].values())).values())))
    head = ["row", "length", *columns, "paper"]
    lines = [f"# {result['title']}", result["claim"], "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, lengths in result["rows"].items():
        for length, figures in lengths.items():
            cells = [f"{f['mean']:.3f} ({f['low']:.3f} to {f['high']:.3f})" for f in figures.values()]
            lines.append("| " + " | ".join([name, f"{length}x", *cells, result["paper"][name]]) + " |")
    lines += [
        "",
        f"{result['seeds']} seeds, {result['samples']} held-out clips each; 95 % intervals by a bootstrap over",
        f"seeds and clips. Distillation: {result['distillation'] or 'none'}.",
        f"{result['code']}; {result['machine']}.",
        "",
    ]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw the metric of every row and its 95 % interval as a PNG: over several lengths as curves, else as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric, rows = result["metric"], result["rows"]
    label = LABELS.get(metric, metric)
    figure, axis = plt.subplots(figsize=(8, 4))
    many = any(len(lengths) > 1 for lengths in rows.values())
    for number, (name, lengths) in enumerate(rows.items()):
        figures = [each[metric] for each in lengths.values()]
        mean = np.array([f["mean"] for f in figures])
        error = np.array([[f["mean"] - f["low"] for f in figures], [f["high"] - f["mean"] for f in figures]])
        if many:
            axis.errorbar([int(n) for n in lengths], mean, np.maximum(error, 0), marker="o", capsize=3, label=name)
        else:
            axis.barh(number, mean, xerr=np.maximum(error, 0), capsize=3, color="tab:blue")
    if many:
        axis.set(xscale="log", xlabel="length of the stream, in trained lengths", ylabel=label)
        axis.legend()
    else:
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_xlabel(label)
    axis.set_title(result["title"])
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=100)  # the path may be a temporary without a suffix
    plt.close(figure)
