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

Each stage writes a tfds dataset under ``WORKDIR/data``, keeps existing data and resumes after an interruption. Several
machines share a stage like a training (docs/hosts.md), or separately with ``--host_index=I --host_count=N``.
Formats and rules: docs/data.md.
"""

import dataclasses

from causvid_jax.cli import common, processes
from causvid_jax.cli.options import config_option, option, part
from causvid_jax.config import Recipe, require
from causvid_jax.data.options import Options as StageOptions

STAGES = ("data", "latents", "videos", "prompts", "trajectories", "streams", "assets")


@dataclasses.dataclass(frozen=True)
class Options(StageOptions, processes.Processes):
    """The flags; with those of a stage, :class:`causvid_jax.data.options.Options`."""

    config: Recipe = config_option()
    stage: str = option("", f"What to make: {', '.join(STAGES)}.")
    workdir: str | None = option(None, "Folder of the recipe's data, weights and logs.")

    def __post_init__(self) -> None:
        super().__post_init__()
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

    stage_options = part(options, StageOptions)
    with processes.joined(options) as many:
        bounds.check_stage(stage, recipe, stage_options)
        if many:
            shared = {**dataclasses.asdict(stage_options), "stage": stage, "config": dataclasses.asdict(recipe)}
            processes.check(shared, folder)
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
