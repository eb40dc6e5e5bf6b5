"""Measure the speed of a recipe's stream on this machine: ``causvid bench --config=digits --output=bench.json``.

Measures milliseconds per denoising step at each cache length, of the cache write and of each decoder; time to first
frame; frames/s in the steady state and of a clip, with and without a decoder; memory; TFLOP/s and their share of the
device's peak; and delivery to a viewer: first chunk, gaps between chunks, real-time factor, deadlines, underruns.
Writes JSON and a Markdown table (``.md``) of the same name; ``--against`` compares with an earlier report. One device
is measured, with the recipe's settings, for example ``--config.causal.window=21 --config.student.attention=cudnn``.
Weights are random, or those of ``--checkpoint`` and ``--student``, which accept published files as in
``causvid sample``; the file's name chooses the recipe if there is no ``--config``.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import ConfigError, Recipe, published, require
from causvid_jax.config.fields import BatchSize, Many
from causvid_jax.config.files import reason, write_text
from causvid_jax.config.recipes import load_recipe


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    config: Recipe = config_option()
    output: str | None = option(None, "The report to write, a .json file; .md has the same name.")
    repeats: Many = option(20, "Timed calls of each program.")
    streams: BatchSize = option(1, "Number of parallel videos.")
    codecs: str = option("wan,taehv", "Decoders to measure, of wan and taehv.")
    checkpoint: str | None = option(None, "Weights to measure: a folder or a file; default: random weights.")
    student: str | None = option(None, "The student's file, also published, instead of those in --checkpoint.")
    against: str | None = option(None, "An earlier report of this device, to print ratios of times.")
    serve: bool = option(False, "Measure causvid serve as viewers see it, with the weights of the package.")

    config_of = staticmethod(published.recipe_of)


def main(options: Options) -> None:
    """Measure and write the report."""
    output = common.check_output(options.output, (".json",))
    if options.serve:
        measure_server(options.config, output)
        return
    from causvid_jax.analysis import bench
    from causvid_jax.analysis import report as report_format

    earlier = read_report(options.against) if options.against else None
    names = tuple(name.strip() for name in options.codecs.split(",") if name.strip())
    plan = bench.Options(options.repeats, options.streams, names)
    bench.check(options.config, plan)
    recipe, params, weights = read_weights(options)
    common.enable_compilation_cache()
    common.log_start(recipe)
    report = bench.run(recipe, plan, log=lambda what: print(f"... {what}", flush=True), params=params, weights=weights)
    text = report_format.markdown(report)
    if earlier:
        text += "\n" + compare(report, earlier)
    write_text(output.with_suffix(".md"), text)
    write_text(output, json.dumps(report, indent=1) + "\n")
    print(text)


def read_weights(options: Options) -> tuple[Recipe, dict[str, Any], str]:
    """Return the recipe, the weights of the flags by network (empty: random ones), and a text about their origin.

    Raises:
        ConfigError: weights that are missing or do not fit the recipe.
    """
    from causvid_jax.sampling import weights

    recipe = options.config
    if not (options.checkpoint or options.student):
        return recipe, {}, "random"
    opened, recipe = weights.find(recipe, "student", options.checkpoint, files={"student": options.student})
    params = weights.load_student(opened, recipe)
    return recipe, params, ", ".join(f"{name} {checkpoint.path.name}" for name, checkpoint in opened.items())


def read_report(path: str) -> dict[str, Any]:
    """Return an earlier report of this program.

    Raises:
        ConfigError: no such file, or one that is no report.
    """
    try:
        report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--against {path} cannot be read: {reason(error)}") from error
    complete = isinstance(report, dict) and {"device", "settings", "lines"} <= set(report)
    require(complete, f"--against {path} is no report of causvid bench")
    return report


def compare(report: dict[str, Any], earlier: dict[str, Any]) -> str:
    """Return the table of ratios, or a sentence why there is none."""
    from causvid_jax.analysis import report as report_format

    try:
        return report_format.comparison(report, earlier)
    except (KeyError, TypeError, ValueError) as error:
        return f"The reports cannot be compared: {error}.\n"


def measure_server(recipe: Recipe, output: pathlib.Path) -> None:
    """Start a server, view its films, and write the figures as JSON.

    Raises:
        ConfigError: fields of the recipe that were set by flags, or a missing extra.
        RunError: the server did not start, or ended.
    """
    require(recipe == load_recipe(recipe.name), "--serve measures a recipe as it is named; leave --config.FIELD out")
    try:
        from causvid_jax.serve import bench
    except ModuleNotFoundError as error:
        raise ConfigError(f"--serve needs {error.name}; install it: pip install 'causvid_jax[serve]'") from error
    report = {"recipe": recipe.name, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    report |= bench.measure((f"--config={recipe.name}", "--per_address=16"))
    write_text(output, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
