"""Compile for a machine that is not at hand, and say whether the program fits and roughly how fast it is.

``python -m launch.compile --config=configs/wan_14b.py --stage=distill --topology=v5p:4x4x4``

The mesh is ``--config.parallel.*``. Nothing of the machine is needed but a compiler for it: the extra ``tpu``, or for
GPUs ``cuda12``. ``--estimate`` needs neither: it computes memory and time from shapes. The status is 1 if the program
does not fit; then the machine's nearest mesh that should is said.
"""

import dataclasses
import json
import sys

from absl import flags

from causvid_jax.config import require
from launch import common

_CONFIG = common.define_config_flag()
_STAGE = flags.DEFINE_string("stage", None, "What to compile: teacher, init, distill or stream.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU KIND:AxB[xC], *N for N slices; GPU KIND:N or KIND:NODESxN; for example v5p:4x4x4, h200:8x8."
)
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Compute the figures from shapes; nothing is compiled.")
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
    machine = topology.parse(name)
    try:
        if _ESTIMATE.value:
            report = aot.estimate_for(recipe, stage, machine)
        else:
            report = aot.compile_for(recipe, stage, topology.describe(name))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())
        print(f"does not fit {name}: {reason[:400]}\n{advice(recipe, stage, machine)}", file=sys.stderr)
        sys.exit(TOO_LARGE)
    print(aot.table(report))
    if output:
        output.write_text(json.dumps(dataclasses.asdict(report), indent=1))
    if not report.fits:
        print(advice(recipe, stage, machine), file=sys.stderr)
        sys.exit(TOO_LARGE)


def advice(recipe, stage, machine) -> str:
    """What would make a program fit: the settings that should, by computation, or what else there is to change."""
    from causvid_jax.parallel import aot, plans

    best = plans.plan(recipe, stage, machine)
    needs = f"{aot.readable_bytes(best.estimate.memory)} of {aot.readable_bytes(best.limit)} a device, computed"
    if best.fits:
        return f"what should make it fit ({needs}): {best.settings(stage)}"
    mesh = recipe.parallel
    return (
        f"no mesh, remat policy or offload should make it fit {machine.name} (the least: {needs}, with "
        f"{best.settings(stage)}); what is left: more devices, devices with more memory, or shorter clips. The mesh "
        f"was fsdp {mesh.fsdp}, context {mesh.context}, tensor {mesh.tensor}"
    )


if __name__ == "__main__":
    common.run(main)
