"""Weights of a checkpoint: ``python -m launch.export --workdir=DIR --stage=distill --step=50 --output=FILE``.

What a run exports at its end, from any checkpoint it kept, also while it goes on. Of a distillation that is the student
alone. Without ``--step`` the newest is taken.
"""

import pathlib

from absl import flags

from causvid_jax.cli import common
from causvid_jax.config import require
from causvid_jax.training import export

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the recipe keeps its data, weights and logs.")
_STAGE = flags.DEFINE_string("stage", None, f"Whose checkpoint: {', '.join(export.EMA)}.")
_STEP = flags.DEFINE_integer("step", None, "Of which step; the newest by default.")
_OUTPUT = flags.DEFINE_string("output", None, "The file to write, .safetensors.")


def main() -> None:
    """Check the flags, then export."""
    workdir, stage = _WORKDIR.value or "", _STAGE.value or ""
    require(pathlib.Path(workdir).is_dir() and workdir != "", f"--workdir is {workdir!r}; it must be a run's directory")
    require(stage in export.EMA, f"--stage is {stage!r}; accepted: {', '.join(export.EMA)}")
    output = common.check_output(_OUTPUT.value, (".safetensors",))
    step = export.export_checkpoint(pathlib.Path(workdir), stage, output, _STEP.value)
    print(f"{output}: the {stage} weights of step {step}, {output.stat().st_size / 1e6:.1f} MB")
