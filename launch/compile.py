"""Compile for a machine that is not at hand, and say whether the program fits and roughly how fast it is.

``python -m launch.compile --config=configs/wan_14b.py --stage=distill --topology=v5p:4x4x4``

The mesh is ``--config.parallel.*``. Nothing of the machine is needed but the extra ``tpu``; the status is 1 if the
program does not fit.
"""

import dataclasses
import json
import sys

from absl import flags

from causvid_jax.config import require
from launch import common

_CONFIG = common.define_config_flag()
_STAGE = flags.DEFINE_string("stage", None, "What to compile: teacher, init, distill or stream.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "KIND:AxB or KIND:AxBxC, *N for N slices; for example v5p:4x4x4.")
_OUTPUT = flags.DEFINE_string("output", None, "Also write the report as JSON to this file.")

TOO_LARGE = 1


def main() -> None:
    """Check the flags, compile, report."""
    recipe = common.load_recipe(_CONFIG)
    # After the flags: whoever mistypes one should not wait for libtpu.
    from causvid_jax.parallel import aot, topology

    stage, name = _STAGE.value or "", _TOPOLOGY.value or ""
    require(stage in aot.STAGES, f"--stage is {stage!r}; accepted: {', '.join(aot.STAGES)}")
    require(name != "", "no --topology is given; for example --topology=v5p:4x4x4")
    output = common.check_output(_OUTPUT.value, (".json",)) if _OUTPUT.value else None
    machine = topology.describe(name)
    try:
        report = aot.compile_for(recipe, stage, machine)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())
        print(f"does not fit {machine.name}: {reason[:400]}\n{advice(recipe)}", file=sys.stderr)
        sys.exit(TOO_LARGE)
    print(aot.table(report))
    if output:
        output.write_text(json.dumps(dataclasses.asdict(report), indent=1))
    if not report.fits:
        print(advice(recipe), file=sys.stderr)
        sys.exit(TOO_LARGE)


def advice(recipe) -> str:
    """What would make a program smaller, in the order of what it costs."""
    mesh = recipe.parallel
    hints = [] if recipe.student.remat and recipe.teacher.remat else ["teacher.remat=True and student.remat=True"]
    hints += [
        f"a larger fsdp (now {mesh.fsdp}) for parameters and optimizer states",
        f"a larger context (now {mesh.context}) or tensor (now {mesh.tensor}) for activations",
        "accumulate in the stage's settings for smaller parts of a batch",
        "more devices",
    ]
    return "what would make it smaller: " + "; ".join(hints)


if __name__ == "__main__":
    common.run(main)
