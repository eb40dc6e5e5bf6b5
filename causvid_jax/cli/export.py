"""Write the weights of a checkpoint: ``causvid export --workdir=DIR --stage=distill --step=50 --output=FILE``.

Writes the weights of any kept checkpoint in the form of a finished run, also while the run continues. A distillation
exports the student only. Without ``--step`` it exports the newest checkpoint.
"""

import dataclasses
import pathlib

from causvid_jax.cli import common
from causvid_jax.cli.options import option
from causvid_jax.config import STAGES, require
from causvid_jax.config.fields import CountOrZero


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    workdir: str | None = option(None, "The directory of a training.")
    stage: str = option("", f"Stage of the checkpoint: {', '.join(STAGES)}.")
    step: CountOrZero | None = option(None, "Step of the checkpoint; default: the newest.")
    output: str | None = option(None, "The file to write, .safetensors.")

    def __post_init__(self) -> None:
        workdir = self.workdir or ""
        require(workdir and pathlib.Path(workdir).is_dir(), f"--workdir is {workdir!r}; it must be a run's directory")
        require(self.stage in STAGES, f"--stage is {self.stage!r}; accepted: {', '.join(STAGES)}")


def main(options: Options) -> None:
    """Write the weights of a checkpoint, and print its step and size."""
    output = common.check_output(options.output, (".safetensors",))
    from causvid_jax.training import export

    step = export.export_checkpoint(pathlib.Path(options.workdir or ""), options.stage, output, options.step)
    print(f"{output}: the {options.stage} weights of step {step}, {output.stat().st_size / 1e6:.1f} MB")
