"""Compile ahead of time: check whether a program fits a machine without access to it, or write the sampler to a file.

``causvid compile --config=wan_14b --stage=distill --topology=v5p:4x4x4``

The mesh is ``--config.parallel.*``. Without one, several devices get the mesh that is estimated to be the fastest of
those that fit, with the necessary rematerialisation, accumulation and offloading; its flags are printed. Only a
compiler for the machine is needed: the extra ``tpu``, or for GPUs ``cuda12``. ``--quick`` compiles with the least
optimisation. For a TPU this takes a seventh of the time and gives almost the same memory, but more and smaller
collectives than in the real program. ``--estimate`` needs no compiler: it computes memory and time from shapes. If the
program does not fit, the status is 1 and settings that should fit are printed.

``causvid compile --config=published:self_forcing_dmd --stage=stream --platform=cuda --output=stream.program``

lowers the streaming sampler for one device of a platform (cpu, cuda, tpu), at the recipe's size and with ``--batch``
videos at once, and writes it to a file that ``causvid sample --program`` loads without tracing the model
(``causvid_jax.sampling.exported``). ``--stage=serve`` writes the file for ``causvid serve --program``. The device is
not needed, but attention by cuDNN needs cuDNN. If the platform is that of this machine, the file also holds
executables, and an equal machine starts without compiling.
"""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import Recipe, require
from causvid_jax.config.fields import BatchSize
from causvid_jax.config.files import reason, write_text

if TYPE_CHECKING:
    from causvid_jax.analysis.topology import TopologySpec


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    config: Recipe = config_option()
    stage: str = option("", "What to compile: teacher, init, distill or stream; with --platform stream or serve.")
    topology: str | None = option(
        None,
        "TPU KIND:AxB[xC], *N for N slices; GPU KIND:N or KIND:NODESxN; for example v5p:4x4x4, h200:8x8.",
    )
    estimate: bool = option(False, "Compute the figures from shapes; nothing is compiled.")
    quick: bool = option(False, "Compile with the least optimisation.")
    output: str | None = option(None, "Also write the report as JSON here; with --platform: the program.")
    platform: str | None = option(None, "Write the stream's program for cpu, cuda or tpu to --output.")
    batch: BatchSize = option(1, "With --platform: videos at once.")
    exact: bool = option(False, "With --platform: round as the published code does.")
    checkpoint: str | None = option(
        None, "With --platform: the folder whose VAE has the latent statistics, if the recipe does not."
    )


TOO_LARGE = 1


def main(options: Options) -> None:
    """Compile and print the report; end with status 1 if the program does not fit.

    Raises:
        ConfigError: flags that exclude each other, an unknown machine, or a mesh that does not fit it.
    """
    recipe = options.config
    from causvid_jax.analysis import compile_report, topology
    from causvid_jax.training import stages

    stage, name = options.stage, options.topology or ""
    if options.platform is not None:
        require(name == "", "--platform and --topology are both given; accepted: one of them")
        build(options)
        return
    require(stage in compile_report.STAGES, f"--stage is {stage!r}; accepted: {', '.join(compile_report.STAGES)}")
    require(name != "", "no --topology is given; for example --topology=v5p:4x4x4 (or --platform=cuda)")
    output = common.check_output(options.output, (".json",)) if options.output else None
    machine = topology.parse(name)
    recipe = recipe if stage == "stream" else stages.with_lora(stage, recipe)
    recipe = with_mesh(recipe, stage, machine)
    if stage != "stream":
        recipe.check_stage(stage)
    try:
        if options.estimate:
            report = compile_report.estimate_for(recipe, stage, machine)
        else:
            report = compile_report.compile_for(recipe, stage, topology.describe(name), quick=options.quick)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"does not fit {name}: {reason(error)[:400]}\n{advice(recipe, stage, machine)}", file=sys.stderr)
        sys.exit(TOO_LARGE)
    print(compile_report.table(report))
    if output:
        write_text(output, json.dumps(dataclasses.asdict(report), indent=1))
    if not report.fits:
        print(advice(recipe, stage, machine), file=sys.stderr)
        sys.exit(TOO_LARGE)


def with_mesh(recipe: Recipe, stage: str, machine: "TopologySpec") -> Recipe:
    """Return the recipe unchanged if it has a mesh or needs none; else with the mesh estimated as fastest, printed.

    Raises:
        ConfigError: no mesh over the devices divides the recipe's sizes.
    """
    from causvid_jax.analysis import mesh_search

    if recipe.parallel != mesh_search.without_mesh(recipe.parallel) or machine.size == 1:
        return recipe
    best = mesh_search.search(recipe, stage, machine)
    how = "the fastest mesh that fits" if best.fits else "the mesh of least memory on"
    print(f"no mesh is given; by estimate {how} {machine.name} is: {best.settings(stage)}")
    return best.recipe


def build(options: Options) -> None:
    """Lower the programs of a stream or a server and write them to a file.

    Raises:
        ConfigError: another stage, a batch of a server, or arrays that exceed the memory.
    """
    recipe, stage = options.config, options.stage
    from causvid_jax.analysis import bounds
    from causvid_jax.checkpoints import workdir
    from causvid_jax.config.files import format_bytes
    from causvid_jax.models import precision
    from causvid_jax.sampling import exported

    require(stage in ("stream", "serve"), f"--stage is {stage!r}; accepted with --platform: 'stream' and 'serve'")
    require(stage == "stream" or options.batch == 1, f"--batch is {options.batch}; accepted with --stage=serve: 1")
    output = common.check_output(options.output, (exported.SUFFIX,))
    if options.exact:
        recipe = precision.exact(recipe, teacher=False)
    if recipe.decoder == "vae" or stage == "serve":
        recipe = dataclasses.replace(recipe, vae=workdir.find_statistics(recipe, options.checkpoint))
    platform = options.platform or ""
    bounds.check_program(recipe, options.batch, here=platform == exported.this_platform())
    if stage == "serve":
        from causvid_jax.serve import functions

        header, programs = functions.build(recipe, platform)
    else:
        header, programs = exported.build(recipe, platform, batch=options.batch)
    executables = exported.compiled(programs) if platform == exported.this_platform() else {}
    exported.save(output, header, programs, executables)
    print(exported.describe(header, programs))
    print(f"Wrote {output}, {format_bytes(output.stat().st_size)}")


def advice(recipe: Recipe, stage: str, machine: "TopologySpec") -> str:
    """Return a sentence with settings that should fit by the estimate; without such settings, with other changes."""
    from causvid_jax.analysis import mesh_search
    from causvid_jax.config.files import format_bytes

    tried = mesh_search.settings(recipe, stage)
    best = mesh_search.search(recipe, stage, machine, too_large=(tried,))
    needs = f"{format_bytes(round(best.estimate.memory))} of {format_bytes(round(best.limit))} a device, computed"
    if best.fits:
        return f"what should make it fit ({needs}): {best.settings(stage)}"
    mesh = recipe.parallel
    return (
        f"no mesh, remat policy or offload should make it fit {machine.name} (the least: {needs}, with "
        f"{best.settings(stage)}); what is left: more devices, devices with more memory, or shorter clips. The mesh "
        f"was fsdp {mesh.fsdp}, context {mesh.context}, tensor {mesh.tensor}"
    )
