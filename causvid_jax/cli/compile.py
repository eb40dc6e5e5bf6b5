"""Compile ahead of time: to say whether a program fits a machine that is not at hand, or to keep the sampler as a file.

``python -m launch.compile --config=configs/wan_14b.py --stage=distill --topology=v5p:4x4x4``

The mesh is ``--config.parallel.*``. Where none is given for several devices, it is the one that is computed to be the
fastest of those that fit, with what it needs of rematerialisation, accumulation and offload; its flags are printed.
Nothing of the machine is needed but a compiler for it: the extra ``tpu``, or for GPUs ``cuda12``. ``--quick`` has it
make the least effort: for a TPU that takes a seventh of the time and gives much the same memory, but more and smaller
collectives than those of the program that would run. ``--estimate`` needs no compiler: it computes memory and time from
shapes. The status is 1 if the program does not fit; then it is said what should make it fit.

``python -m launch.compile --config=configs/wan_1_3b.py --stage=stream --platform=cuda --output=stream.program``

lowers the streaming sampler for one device of a platform (cpu, cuda, tpu), at the recipe's size and ``--batch`` videos
at once, and writes it to a file that ``launch.sample --program`` loads without tracing the model
(``causvid_jax.sampling.exported``). The device need not be there, but cuDNN has to be, if it is the attention.
"""

import dataclasses
import json
import sys

from absl import flags

from causvid_jax.cli import common
from causvid_jax.config import require

_CONFIG = common.define_config_flag()
_STAGE = flags.DEFINE_string("stage", None, "What to compile: teacher, init, distill or stream.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU KIND:AxB[xC], *N for N slices; GPU KIND:N or KIND:NODESxN; for example v5p:4x4x4, h200:8x8."
)
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Compute the figures from shapes; nothing is compiled.")
_QUICK = flags.DEFINE_bool("quick", False, "Have the compiler make the least effort.")
_OUTPUT = flags.DEFINE_string("output", None, "Write the report as JSON to this file, too; the program's file.")
_PLATFORM = flags.DEFINE_string("platform", None, "Write the stream's program for cpu, cuda or tpu to --output.")
_BATCH = flags.DEFINE_integer("batch", 1, "With --platform: videos at once.")
_EXACT = flags.DEFINE_bool("exact", False, "With --platform: as launch.sample --exact.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "With --platform: the folder whose VAE says how latents are normalised, if the recipe does not."
)

TOO_LARGE = 1


def main() -> None:
    """Check the flags, compile, report."""
    recipe = common.load_recipe(_CONFIG)
    # After the flags: whoever mistypes one should not wait for libtpu.
    from causvid_jax.analysis import compile_report, topology

    stage, name = _STAGE.value or "", _TOPOLOGY.value or ""
    require(stage in compile_report.STAGES, f"--stage is {stage!r}; accepted: {', '.join(compile_report.STAGES)}")
    if _PLATFORM.value is not None:
        require(name == "", "--platform and --topology are both given; accepted: one of them")
        build(recipe, stage, _PLATFORM.value)
        return
    require(name != "", "no --topology is given; for example --topology=v5p:4x4x4 (or --platform=cuda)")
    output = common.check_output(_OUTPUT.value, (".json",)) if _OUTPUT.value else None
    machine = topology.parse(name)
    recipe = with_mesh(recipe, stage, machine)
    try:
        if _ESTIMATE.value:
            report = compile_report.estimate_for(recipe, stage, machine)
        else:
            report = compile_report.compile_for(recipe, stage, topology.describe(name), quick=_QUICK.value)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())
        print(f"does not fit {name}: {reason[:400]}\n{advice(recipe, stage, machine)}", file=sys.stderr)
        sys.exit(TOO_LARGE)
    print(compile_report.table(report))
    if output:
        output.write_text(json.dumps(dataclasses.asdict(report), indent=1))
    if not report.fits:
        print(advice(recipe, stage, machine), file=sys.stderr)
        sys.exit(TOO_LARGE)


def with_mesh(recipe, stage, machine):
    """The recipe as it is if it has a mesh, or the machine needs none; else as it should be fastest there."""
    from causvid_jax.analysis import mesh_search

    if recipe.parallel != mesh_search.without_mesh(recipe.parallel) or machine.size == 1:
        return recipe
    best = mesh_search.plan(recipe, stage, machine)
    how = "the fastest that should fit" if best.fits else "the one that needs least memory"
    print(f"no mesh was given; of those of {machine.name} {how}, computed: {best.settings(stage)}")
    return best.recipe


def build(recipe, stage, platform) -> None:
    """Lower the stream's programs and write them."""
    from causvid_jax.checkpoints import workdir
    from causvid_jax.config.files import format_bytes
    from causvid_jax.models import precision
    from causvid_jax.sampling import exported

    require(stage == "stream", f"--stage is {stage!r}; accepted with --platform: 'stream'")
    output = common.check_output(_OUTPUT.value, (exported.SUFFIX,))
    if _EXACT.value:
        recipe = precision.exact(recipe, teacher=False)
    if recipe.decoder == "vae":
        recipe = dataclasses.replace(recipe, vae=workdir.find_statistics(recipe, _CHECKPOINT.value))
    header, made = exported.build(recipe, platform, batch=_BATCH.value)
    exported.save(output, header, made)
    print(exported.describe(header, made))
    print(f"Wrote {output}, {format_bytes(output.stat().st_size)}")


def advice(recipe, stage, machine) -> str:
    """What would make a program fit: other settings that should, by computation, or what else there is to change."""
    from causvid_jax.analysis import compile_report, mesh_search

    tried = mesh_search.settings(recipe, recipe, stage)
    best = mesh_search.plan(recipe, stage, machine, too_large=(tried,))
    size = compile_report.readable_bytes
    needs = f"{size(best.estimate.memory)} of {size(best.limit)} a device, computed"
    if best.fits:
        return f"what should make it fit ({needs}): {best.settings(stage)}"
    mesh = recipe.parallel
    return (
        f"no mesh, remat policy or offload should make it fit {machine.name} (the least: {needs}, with "
        f"{best.settings(stage)}); what is left: more devices, devices with more memory, or shorter clips. The mesh "
        f"was fsdp {mesh.fsdp}, context {mesh.context}, tensor {mesh.tensor}"
    )
