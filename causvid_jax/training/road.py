"""Make all weights of a recipe from scratch: data, every stage in order, classifier and report.

A leg is one step of the road, such as a training stage. A finished leg is skipped, and an interrupted one continues.
``WORKDIR/road.json`` records the seconds of every leg, from which the remaining time is estimated.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping

from causvid_jax.checkpoints import safetensors_io
from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import ConfigError, Recipe, changed_fields, to_json
from causvid_jax.config.files import write_text
from causvid_jax.data import arrays, prepare, sources
from causvid_jax.evaluation import measure
from causvid_jax.evaluation.plan import Plan
from causvid_jax.training import provenance, stages
from causvid_jax.training.samples import CLASSIFIER

UNSEEN = ("samples", "sample_every", "log_every", "save_every", "keep", "keep_every")
"""Settings of a stage that do not change its weights."""
REPORT = "report.json"

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Leg:
    """One leg of the road.

    Attributes:
        name: of the stage.
        is_done: returns whether the working directory has the result of the leg.
        run: runs the leg.
        note: returns a line on settings that have changed since the result was made; "" if none has.
    """

    name: str
    is_done: Callable[[], bool]
    run: Callable[[], object]
    note: Callable[[], str] = str


def legs(recipe: Recipe, workdir: pathlib.Path, options: prepare.Options, plan: Plan | None = None) -> list[Leg]:
    """Return the legs of a recipe in order.

    Args:
        recipe: what to train.
        workdir: of the results.
        options: of ``causvid prepare``; own videos need ``videos`` and ``captions``.
        plan: numbers of clips of the report; None: no classifier and no report, which only digits have.

    Raises:
        ConfigError: the mesh does not divide a batch of a stage.
    """
    data = workdir / "data"

    def dataset(*names: pathlib.Path) -> Callable[[], bool]:
        return lambda: all(arrays.is_complete(name) for name in names)

    def prepared(stage: str, is_done: Callable[[], bool]) -> Leg:
        return Leg(stage, is_done, lambda: prepare.run(stage, recipe, workdir, options))

    def trained(stage: str) -> Leg:
        recipe.check_stage(stage)
        path = paths.stage_path(workdir, stage)
        note = functools.partial(changed_settings, path, stage, recipe)
        return Leg(stage, path.is_file, lambda: stages.train(stage, recipe, workdir), note)

    def has_clips() -> bool:
        try:
            return all(len(sources.clips(recipe, workdir, split)) > 0 for split in ("train", "test"))
        except ConfigError:
            return False

    causal = recipe.train_init.teacher == "causal"
    lengths = [0, *(frames for frames, _ in recipe.train_init.extra_trajectories)]
    folders = [sources.causal_folder(workdir, n) for n in lengths] if causal else [data / sources.TRAJECTORIES]
    result = [prepared("data", has_clips)]
    if plan is not None:
        path = workdir / CLASSIFIER
        result.append(Leg("classifier", path.is_file, lambda: measure.make_classifier(recipe, path)))
    result += [trained("vae"), prepared("latents", dataset(data / sources.LATENTS)), trained("teacher")]
    consistency = recipe.train_distill.init == "consistency"
    if causal or consistency or recipe.train_distill.teacher == "causal":
        result.append(trained("causal"))
    if consistency:
        result += [trained("consistency"), trained("distill")]
    else:
        result += [prepared("trajectories", dataset(*folders)), trained("init"), trained("distill")]
    if recipe.decoder == "taehv":
        rollouts = [sources.streams_folder(workdir, clips) for clips, _ in recipe.train_taehv.rollouts]
        if rollouts:
            result.append(prepared("streams", dataset(*rollouts)))
        result.append(trained("taehv"))
    if plan is not None:
        output, classifier = workdir / REPORT, workdir / CLASSIFIER
        write = functools.partial(measure.write_report, recipe, output, plan, folder=workdir, classifier=classifier)
        result.append(Leg("report", output.is_file, write))
    return result


def travel(recipe: Recipe, workdir: pathlib.Path, road: list[Leg], say: Say = print) -> None:
    """Run the legs that are not done, and record their seconds in ``WORKDIR/road.json``.

    Raises:
        ConfigError: a leg was refused. The same call continues from there.
        RunError: a leg failed. The same call continues from there.
    """
    record = _read(workdir / paths.ROAD_RECORD)
    seconds: dict[str, float] = record.get("seconds", {})
    packaged = _read(paths.ASSETS / recipe.name / paths.ROAD_RECORD).get("seconds", {})
    for number, leg in enumerate(road, start=1):
        where = f"{number} of {len(road)}, {leg.name}"
        if leg.is_done():
            say(f"{where}: done{_took(seconds.get(leg.name))}")
            if note := leg.note():
                say(note)
            continue
        say(f"{where}{_forecast(packaged, seconds, [leg.name for leg in road[number - 1 :]])}")
        begin = time.monotonic()
        try:
            leg.run()
        finally:
            # An interrupted leg adds to its time when it continues.
            seconds[leg.name] = round(seconds.get(leg.name, 0.0) + time.monotonic() - begin, 1)
            record = {"recipe": recipe.name, **provenance.origin(workdir), "seconds": seconds}
            write_text(workdir / paths.ROAD_RECORD, json.dumps(record, indent=1) + "\n")
    say(f"All weights of {recipe.name} are in {workdir}{_took(sum(seconds.values()))}.")


def changed_settings(path: pathlib.Path, stage: str, recipe: Recipe) -> str:
    """Return a line on the settings of a stage that decide its weights and differ from those in its file; "": none."""
    try:
        made_with = json.loads(safetensors_io.open_safetensors(path)[1].get("config", "{}"))
    except (ConfigError, ValueError):
        return ""  # the next leg that reads the file says what is wrong
    changes, group = changed_fields(made_with, json.loads(to_json(recipe))), f"train_{stage}."
    seen = (name for name in changes if name.startswith(group) and name.removeprefix(group) not in UNSEEN)
    text = ", ".join(changes[name] for name in seen)
    return text and f"  Note: it was made with {text}. To make it again, remove {path.parent} first."


def _forecast(reference: Mapping[str, float], seconds: Mapping[str, float], pending: list[str]) -> str:
    """Return how long the first ``pending`` leg and all of them will take at the speed of the legs so far."""
    if any(name not in reference for name in pending):
        return ""
    common = [name for name in seconds if name in reference and name not in pending]
    reference_seconds = sum(reference[name] for name in common)
    speed = sum(seconds[name] for name in common) / reference_seconds if reference_seconds else 1.0
    elapsed = seconds.get(pending[0], 0.0)
    first = max(speed * reference[pending[0]] - elapsed, 0.0)
    rest = first + speed * sum(reference[name] for name in pending[1:])
    return f": about {_duration(first)}, {_duration(rest)} to the end"


def _took(seconds: float | None) -> str:
    return f" ({_duration(seconds)})" if seconds else ""


def _duration(seconds: float) -> str:
    """Return seconds in words: "2 h 05 min", "12 min", "40 s"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def _read(path: pathlib.Path) -> dict:
    """Return the record at ``path``; empty if there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
