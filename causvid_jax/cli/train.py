"""Train one stage: ``python -m launch.train --config=configs/digits.py --stage=STAGE --workdir=DIR``.

Stages: vae, taehv, teacher, causal, init, distill. Started again with the same arguments it goes on where it stopped.
Under ``WORKDIR/STAGE``: ``metrics.jsonl`` and ``tensorboard/``, ``samples/``, ``checkpoints/`` and, at the end,
``weights.safetensors``. Ctrl-C (status 130) and SIGTERM (status 0) save a checkpoint first; ``docs/runs.md`` tells what
becomes of a run when something fails. On many hosts the same command is given on each (``docs/hosts.md``).
"""

import dataclasses

from absl import flags

from causvid_jax.cli import common, processes
from causvid_jax.config import require
from causvid_jax.training import stages

_CONFIG = common.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the recipe keeps its data, weights and logs.")
_STAGE = flags.DEFINE_string("stage", None, "What to train: vae, taehv, teacher, causal, init or distill.")
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Weights to start with: a file, or another recipe's --workdir (the same stage's weights)."
)
processes.define_flags()


def main() -> None:
    """Check the flags, then train."""
    recipe = common.load_recipe(_CONFIG)
    name, workdir = _STAGE.value or "", _WORKDIR.value or ""
    require(workdir != "", "no --workdir is given; it must be a directory for data and weights")
    require(name in stages.TRAINERS, f"--stage is {name!r}; accepted: {', '.join(stages.TRAINERS)}")
    folder = common.writable_workdir(workdir)
    with processes.joined():
        processes.check({"stage": name, "config": dataclasses.asdict(recipe)}, folder)
        common.enable_compilation_cache()
        common.log_start(recipe)
        stages.train(name, recipe, folder, _INIT_FROM.value)
