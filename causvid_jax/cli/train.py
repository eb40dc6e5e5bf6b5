"""Train one stage: ``causvid train --config=digits --stage=STAGE --workdir=DIR``.

Stages: vae, taehv, teacher, causal, init, consistency, distill. The same command continues a run that was stopped.
Under ``WORKDIR/STAGE`` are ``metrics.jsonl`` and ``tensorboard/``, ``samples/``, ``checkpoints/`` and, at the end,
``weights.safetensors``. Ctrl-C (status 130) and SIGTERM (status 0) save a checkpoint first; docs/training.md lists
failures of a run and their effects. On many hosts run the same command on each (docs/hosts.md).
"""

import dataclasses

from causvid_jax.cli import common, processes
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import STAGES, Recipe, require


@dataclasses.dataclass(frozen=True)
class Options(processes.Processes):
    """The flags."""

    config: Recipe = config_option()
    stage: str = option("", f"What to train: {', '.join(STAGES)}.")
    workdir: str | None = option(None, "Folder of the recipe's data, weights and logs.")
    init_from: str | None = option(
        None, "Weights to start with: a file, or another recipe's --workdir (the same stage's weights)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.stage in STAGES, f"--stage is {self.stage!r}; accepted: {', '.join(STAGES)}")
        self.config.check_stage(self.stage)


def main(options: Options) -> None:
    """Train the stage, from its newest checkpoint if there is one."""
    folder = common.writable_workdir(options.workdir)
    print(f"Stage {options.stage} of recipe {options.config.name}: loading ...", flush=True)
    from causvid_jax.training import stages

    with processes.joined(options):
        processes.check({"stage": options.stage, "config": dataclasses.asdict(options.config)}, folder)
        common.enable_compilation_cache()
        common.log_start(options.config)
        stages.train(options.stage, options.config, folder, options.init_from)
