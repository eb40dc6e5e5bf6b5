"""Make the datasets of a recipe: ``causvid prepare --config=digits --workdir=DIR --stage=data``.

Stages, in the order of a training:

* ``data`` writes pixel clips: moving digits, or those of your own videos with ``--videos=DIR --captions=FILE``.
* ``latents`` encodes them with the trained VAE.
* ``videos`` splits and encodes a folder of videos with a published VAE.
* ``prompts`` embeds a list of prompts (``--prompts=FILE``) and fills the cache of a UMT5 encoder in
  ``WORKDIR/prompts``, which trajectories and training read.
* ``trajectories`` runs the trained teacher's ODE.
* ``streams`` runs the trained student for the tiny decoder to learn from.
* ``assets`` copies the weights of ``WORKDIR`` into the package.

Each writes a tfds dataset under ``WORKDIR/data``, keeps existing data and resumes after an interruption. Several
machines share a stage like a training (docs/hosts.md), or separately with ``--host_index=I --host_count=N``.
Formats and rules: docs/data.md.
"""

import dataclasses

from causvid_jax.cli import common, processes
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import Recipe, require
from causvid_jax.config.fields import BatchSize, Count, CountOrZero, Few, Many, ManyOrZero

STAGES = ("data", "latents", "videos", "prompts", "trajectories", "streams", "assets")


@dataclasses.dataclass(frozen=True)
class Options(processes.Processes):
    """The flags; from ``count`` on those of :class:`causvid_jax.data.prepare.Options`."""

    config: Recipe = config_option()
    stage: str = option("", f"What to make: {', '.join(STAGES)}.")
    workdir: str | None = option(None, "Where the recipe keeps its data, weights and logs.")
    count: CountOrZero = option(0, "Number of examples; 0: that of the recipe.")
    videos: str | None = option(None, "data, videos: the folder of your videos.")
    captions: str | None = option(None, "data, videos: csv, tsv, json or jsonl; none: a.txt by a.mp4.")
    prompts: str | None = option(None, "prompts, trajectories: the list; none: the recipe's data.prompt_file.")
    name: str = option("latents", "videos: the dataset's folder under WORKDIR/data.")
    clips_per_video: CountOrZero = option(0, "data, videos: maximum clips per video; 0: all.")
    shard_videos: Count = option(64, "data, videos: videos per shard; a crash loses at most one shard.")
    batch: BatchSize = option(1, "videos: clips per device and call of the VAE.")
    workers: Few = option(2, "data, videos: videos decoded at a time.")
    host_index: ManyOrZero | None = option(None, "This machine's number from 0; none: JAX's process index.")
    host_count: Many | None = option(None, "Number of machines that share the stage; none: JAX's process count.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.workdir, "no --workdir is given; it must be a directory for data and weights")
        require(self.stage in STAGES, f"--stage is {self.stage!r}; accepted: {', '.join(STAGES)}")


def main(options: Options) -> None:
    """Make one stage's dataset."""
    recipe, stage = options.config, options.stage
    folder = common.writable_workdir(options.workdir)
    print(f"Stage {stage} of recipe {recipe.name}: loading ...", flush=True)
    import jax
    from absl import logging

    from causvid_jax.analysis import bounds
    from causvid_jax.data import prepare
    from causvid_jax.distributed import collectives

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(prepare.Options)}
    stage_options = prepare.Options(**{name: value for name, value in values.items() if value is not None})
    with processes.joined(options) as many:
        bounds.check_stage(stage, recipe, stage_options)
        if many:
            processes.check(values | {"stage": stage, "config": dataclasses.asdict(recipe)}, folder)
        if stage != "data":
            common.enable_compilation_cache()
            logging.info("%d process(es), %d device(s) here", jax.process_count(), jax.local_device_count())
        others_wait = many and prepare.by_one_process(stage, recipe)
        if others_wait and not collectives.is_first():
            collectives.barrier(stage)
            return
        summary = prepare.run(stage, recipe, folder, stage_options)
        if others_wait:
            collectives.barrier(stage)
        if not many or collectives.is_first():
            print(summary)
