"""Train and measure an experiment: ``causvid experiment --name=ablation --config=digits --base=runs/digits``.

``--base`` is the working directory of a finished ``causvid road``. Every row trains only the stages that it changes,
in folders under ``--workdir``: the distillation for every seed, the stages before it once. It writes the result to
``--output`` as JSON, and a table (``.md``) and a plot (``.png``) beside it. The same command continues an interrupted
experiment. ``docs/evidence.md`` lists the experiments.
"""

import dataclasses
import json
import pathlib

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import Recipe, require
from causvid_jax.config.fields import Few, Many
from causvid_jax.config.files import atomic, write_text


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    config: Recipe = config_option()
    name: str = option("", "The experiment: a name of experiments/, or a Python file, which is run.")
    base: str | None = option(None, "Working directory of a finished causvid road, from which every row starts.")
    workdir: str | None = option(None, "Folder in which the rows are trained.")
    output: str | None = option(None, "The result, a .json file; .md and .png have the same name.")
    seeds: Few = option(3, "Trainings of every row.")
    samples: Many = option(64, "Held-out clips of every training.")

    def __post_init__(self) -> None:
        require(self.base, "no --base is given; it must be the working directory of a finished causvid road")


def main(options: Options) -> None:
    """Run the experiment and write its result.

    Raises:
        ConfigError: a path that cannot be used, or no such experiment.
    """
    require(pathlib.Path(options.base or "").is_dir(), f"--base {options.base} is not a directory")
    output = common.check_output(options.output, (".json",))
    workdir = common.writable_workdir(options.workdir)
    from causvid_jax.training import experiment

    budget = experiment.Budget(options.seeds, options.samples)
    plan = experiment.load(options.name)
    common.enable_compilation_cache()
    common.log_start(options.config)
    with common.parts():
        result = experiment.run(plan, options.config, pathlib.Path(options.base or ""), workdir, budget)
    write_text(output.with_suffix(".md"), experiment.markdown(result))
    with atomic(output.with_suffix(".png")) as picture:
        experiment.draw(result, picture)
    write_text(output, json.dumps(result, indent=1) + "\n")
    print(experiment.markdown(result))
