"""Write docs/scaling.md: memory, time and cost of every stage on every machine.

``python benchmarks/scaling.py`` writes the file from shapes and published peaks
(:mod:`causvid_jax.analysis.mesh_search`) and from docs/scaling.json, which holds the compiled rows.
``--compile ROW...`` compiles rows one at a time, each in a new process, and adds each to that file as soon as it is
done. A row that the file has with the same settings is not compiled again. If a mesh that should fit does not, the next
mesh is compiled. ``--quick`` is that of ``launch.compile``. A row is chosen by its name, such as
``1.3B/distill/v5e-16``, or by a pattern (``"1.3B/*/64 H100"``). Compiling needs the compiler of the machine (extras
``tpu``, ``cuda12``).
"""

import argparse
import dataclasses
import fnmatch
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from causvid_jax.analysis import compile_report, estimate, flops, mesh_search, topology
from causvid_jax.config import ParallelConfig, Recipe
from causvid_jax.config.recipes import load_recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = {
    "1.3B": "configs/wan_1_3b.py",
    "1.3B by 14B": "configs/wan_1_3b.py:teacher_14b",
    "14B": "configs/wan_14b.py",
}
WHAT = {
    "1.3B": "1.3B student, 1.3B teacher",
    "1.3B by 14B": "1.3B student, 14B teacher",
    "14B": "14B student, 14B teacher",
}
MACHINES = {
    "v5e-16": "v5e:4x4",
    "v5e-256": "v5e:16x16",
    "v5p-64": "v5p:2x4x4",
    "v5p-512": "v5p:4x8x8",
    "v6e-256": "v6e:16x16",
    "2 slices of v5p-64": "v5p:2x4x4*2",
    "1 H100": "h100:1",
    "4 H100": "h100:4",
    "8 H100": "h100:8",
    "64 H100": "h100:8x8",
    "1 H200": "h200:1",
    "4 H200": "h200:4",
    "8 H200": "h200:8",
    "64 H200": "h200:8x8",
}
FEW = {1: ("1 H100", "1 H200"), 4: ("4 H100", "4 H200"), 8: ("8 H100", "8 H200"), 64: ("64 H100", "64 H200")}
TEACHER_BATCH = 64  # the published recipes train no teacher; the batch is that of distillation


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of the table: a stage of a recipe on a machine, with its mesh and settings."""

    recipe: str
    stage: str
    machine: str
    plan: mesh_search.Candidate
    report: compile_report.Report  # compiled if that was done, else computed
    refused: bool = False  # the compiler refused the program for its size, without figures

    @property
    def fits(self) -> bool:
        """Whether the stage fits the machine's devices."""
        return self.report.fits and not self.refused

    @property
    def name(self) -> str:
        """Name for ``--compile`` and in docs/scaling.json."""
        return f"{self.recipe}/{self.stage}/{self.machine}"


@functools.cache
def load(name: str) -> Recipe:
    """Return a recipe of :data:`RECIPES`, with a batch size for the teacher, which published recipes do not train."""
    recipe = load_recipe(str(ROOT / RECIPES[name]))
    return dataclasses.replace(
        recipe, train_teacher=dataclasses.replace(recipe.train_teacher, batch_size=TEACHER_BATCH)
    )


def row_of(recipe: str, stage: str, name: str, compiled: dict[str, dict]) -> Row:
    """Return a cell with the fastest mesh that was not found too large, and the compiler's figures if they exist."""
    machine, known = topology.parse(MACHINES[name]), compiled.get(f"{recipe}/{stage}/{name}", {})
    plan = mesh_search.search(load(recipe), stage, machine, too_large=known.get("too_large", ()))
    row = Row(recipe, stage, name, plan, compile_report.estimate_for(plan.recipe, stage, machine))
    if known.get("settings") != plan.settings(stage):
        return row
    report = known["report"]
    return dataclasses.replace(row, **{"report": compile_report.Report(**report)} if report else {"refused": True})


def rows(compiled: dict[str, dict]) -> list[Row]:
    """Return every cell of the table."""
    return [row_of(*cell, compiled) for cell in itertools.product(RECIPES, compile_report.STAGES, MACHINES)]


# ---- the file -------------------------------------------------------------------------------------------------------


def _mesh(report: compile_report.Report) -> str:
    return " x ".join(f"{n} {s}" for n, s in report.mesh.items() if s > 1) or "-"


def _settings(row: Row) -> str:
    recipe = row.plan.recipe
    if row.stage == "stream":
        return f"{row.report.streams} streams" if row.report.streams > 1 else "1 stream"
    net = recipe.teacher if row.stage == "teacher" else recipe.student
    parts = [f"remat {net.remat}"]
    accumulate = getattr(recipe, f"train_{row.stage}").accumulate
    parts += [f"accumulate {accumulate}"] if accumulate > 1 else []
    parts += ["moments on host"] if recipe.parallel.offload_optimizer else []
    return ", ".join(parts)


def _range(row: Row) -> tuple[str, str]:
    slow, fast = row.report.step_seconds
    return (
        f"{compile_report.readable_seconds(fast)} - {compile_report.readable_seconds(slow)}",
        f"{row.report.mfu[0]:.0%} - {row.report.mfu[1]:.0%}",
    )


def stage_table(made: list[Row], recipe: str, stage: str) -> list[str]:
    """Return the lines of one table: a stage of a recipe on all machines."""
    per = "frames/s a stream" if stage == "stream" else "time of a step"
    lines = [
        f"| machine | mesh | settings | memory of a device | fits | {per} | MFU | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in made:
        if (row.recipe, row.stage) != (recipe, stage):
            continue
        report, (seconds, mfu) = row.report, _range(row)
        memory = f"{report.peak / topology.GIB:.1f} of {report.limit / topology.GIB:.1f} GiB"
        if report.host:
            memory += f", host {report.host / topology.GIB:.0f}"
        if stage == "stream":
            shown = 4 * row.plan.recipe.causal.frames_per_block
            seconds = " - ".join(f"{shown / s:.3g}" for s in report.step_seconds)
        if not row.fits:
            seconds = mfu = "-"
        how = "compiled quickly" if report.quick else "compiled"
        source = f"{how} ({report.compile_seconds:.0f} s)" if report.compiled else "computed"
        source += ", refused by the compiler" if row.refused else ""
        lines.append(
            f"| {row.machine} | {_mesh(report)} | {_settings(row)} | {memory} | {'yes' if row.fits else '**no**'} | "
            f"{seconds} | {mfu} | {source} |"
        )
    return lines


def _hours(seconds: tuple[float, float], steps: int, devices: int) -> tuple[float, float]:
    return tuple(sorted(s * steps * devices / 3600 for s in seconds))  # type: ignore[return-value]


def _pairs(recipe: Recipe, machine: topology.TopologySpec, pairs: int, steps: int) -> tuple[float, float]:
    """Return device hours (least, most) of ``pairs`` ODE trajectories of ``steps`` guided passes of the teacher."""
    frames = recipe.video.latent_frames
    one = flops.forward(recipe.teacher, frames, flops.tokens_per_frame(recipe, recipe.teacher), frames**2)
    ideal = pairs * steps * 2 * one / machine.chip.flops / 3600
    low, high = estimate.EFFICIENCY
    return ideal / high, ideal / low


def cost_table(made: list[Row], recipe: str) -> list[str]:
    """Return the lines of the table of device hours of the paper's and of Self-Forcing's schedule."""
    by_cell = {(row.stage, row.machine): row for row in made if row.recipe == recipe}
    lines = [
        "| machine | 1,000 trajectories | 16,000 trajectories | init, 3,000 steps of 128 | DMD, 1,200 cycles (paper) "
        "| DMD, 120 cycles (Self-Forcing) | the latter takes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, address in MACHINES.items():
        machine = topology.parse(address)
        cells = [
            "{:,.0f} - {:,.0f}".format(*_pairs(load(recipe), machine, *count)) for count in ((1000, 50), (16000, 48))
        ]
        for stage, steps in (("init", 3000), ("distill", 1200), ("distill", 120)):
            row = by_cell[stage, name]
            hours = _hours(row.report.step_seconds, steps, machine.size)
            cells.append("{:,.0f} - {:,.0f}".format(*hours) if row.fits else "does not fit")
        row = by_cell["distill", name]
        slow, fast = (compile_report.readable_seconds(120 * s) for s in row.report.step_seconds)
        cells.append(f"{fast} - {slow}" if row.fits else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def few_devices(made: list[Row]) -> list[str]:
    """Return what 1, 4, 8 and 64 devices can train, and with which settings."""
    lines = []
    for count, names in FEW.items():
        lines += ["", f"### {count} device{'s' if count > 1 else ''}", ""]
        for name in names:
            for recipe, what in WHAT.items():
                here = [row for row in made if row.machine == name and row.recipe == recipe]
                fits = [row for row in here if row.fits]
                verdict = ", ".join(row.stage for row in fits) or "nothing"
                missing = ", ".join(row.stage for row in here if not row.fits)
                lines.append(f"- **{name}, {what}**: {verdict}{f'; not {missing}' if missing else ''}.")
                for row in fits:
                    lines.append(f"  - {row.stage}: `{row.plan.settings(row.stage) or 'no flags'}`")
    return lines


HEAD = """# What fits where, and how long it takes

`python benchmarks/scaling.py` writes this page. **Nothing here was measured on an accelerator.**

- *compiled*: XLA's own compiler for that machine compiled the real sharded step. The memory is the compiler's figure.
  The processor time of the compilation is in brackets. *compiled quickly*: with the least effort (`launch.compile
  --quick`). Three rows were compiled in both ways: 12.78 GiB in 178 s and 12.70 in 26 (1.3B teacher, v5e-16), 4.64 in
  126 s and 4.66 in 24 (v5e-256), 29.5 in 81 s and 29.5 in 52 (1.3B distillation, 64 H100). On a GPU, moments in host
  memory are subtracted by their shapes. On a TPU, arguments plus temporaries may exceed the peak and, in some rows,
  the memory of the device. The compiler accepts these rows; it refuses a program that does not fit.
- *computed*: memory from shapes (`causvid_jax/analysis/estimate.py`). Parameters, moments, EMA, gradients, caches and
  the arrays that layers keep are exact. The temporary arrays of the current layer are a formula, which is meant to be
  too large rather than too small. A computed row fits if it leaves a tenth of the memory free. One check: the 1.3B
  teacher on 4 chips of v5p (fsdp 4, 2 clips a device, remat full) was compiled at 33.1 GiB, with 195 s of processor
  time on a loaded machine and 1.9 GiB of its memory; the computed figure is CHECK GiB. *refused by the compiler*: the
  compiler reported, without figures, that the program does not fit. The figures in such a row are computed.
- The compiled rows are programs of 2026-11-23 to 26. For 20 distillations today's formula chooses another mesh or other
  settings than were compiled, so these rows are only computed (2026-11-30). Today's formula gives 14% less to 20% more
  than the compiled figures, 5% off in the mean. The programs of the streams copied the KV cache, except that of 14B on
  one H100, which was compiled again on 2026-11-30 (`--compile "14B/stream/1 H100"`). Today's programs of the other
  streams should therefore take less ([Performance](performance.md)).
- *time* is a roofline. Work is the FLOPs of `causvid_jax/analysis/flops.py` with recomputation, at 60% and at 35% of
  the published bfloat16 peak. Traffic between devices runs at the links' full rate, at the same time as the work in
  the fast case and after it in the slow case. Traffic between a host and its devices is not counted. MFU is of model
  FLOPs.
- Clips are 81 frames of 480 x 832. Batches are the published ones: 128 for init, 64 for DMD (one step is one *cycle*:
  five updates of the fake score and one of the student). The teacher has 64, because the published recipes do not
  train it. "1.3B by 14B" (1.3B student, 14B teacher) has a fake score of 1.3B, as Self-Forcing has.
- Mesh and settings are the fastest that fit by computation (`causvid_jax/analysis/mesh_search.py`). If they did not
  fit when they were compiled, the next fastest are shown. Moments are in host memory only if nothing else fits. v5p-64
  counts cores: it has 32 chips.
- Each `context x tensor` group runs one stream. A block of three latent frames has 12 frames.
"""


def document(made: list[Row]) -> str:
    """Return the text of docs/scaling.md."""
    compiled, refused = sum(row.report.compiled for row in made), sum(row.refused for row in made)
    known = dataclasses.replace(load_recipe(str(ROOT / RECIPES["1.3B"])), parallel=ParallelConfig(fsdp=4))  # batch 8
    check = compile_report.estimate_for(known, "teacher", topology.parse("v5p:2x2x1")).peak / topology.GIB
    left = len(made) - compiled - refused
    lines = [
        HEAD.replace("CHECK", f"{check:.1f}"),
        f"Of the {len(made)} rows, {compiled} were compiled. The compiler refused {refused} for lack of memory."
        + (f" {left} were only computed." if left else ""),
        "",
    ]
    lines += [
        "## What 1, 4, 8 and 64 devices can train",
        "",
        "Settings are flags of `launch.train` and `launch.compile`, after `--config=wan_1_3b`, `wan_1_3b:teacher_14b` "
        "(1.3B student,\n14B teacher) or `wan_14b`. The stage `teacher` also needs "
        f"`--config.train_teacher.batch_size={TEACHER_BATCH}`.",
    ]
    lines += few_devices(made)
    for recipe, what in WHAT.items():
        lines += ["", f"## {what}"]
        for stage in compile_report.STAGES:
            lines += ["", f"### {what}: {stage}", "", *stage_table(made, recipe, stage)]
        lines += [
            "",
            f"### {what}: cost",
            "",
            "Device hours by the same roofline. A trajectory has 50 (the paper) or 48 (Self-Forcing) guided steps of "
            "the teacher. The paper trained 6,000 fake-score updates (1,200 cycles) on its own model. Self-Forcing "
            "trained 600 (120 cycles) and reports less than 2 h on 64 H100 (128 device hours); the length of its ODE "
            "initialisation is not published. There are no prices, because they differ by provider and month.",
            "",
            *cost_table(made, recipe),
        ]
    return "\n".join(lines) + "\n"


# ---- compiling ------------------------------------------------------------------------------------------------------


def compile_row(row: Row, quick: bool) -> dict | None:
    """Return the row's entry for docs/scaling.json, computed in a new process.

    The entry has no report if the compiler refused a program that is too large. The result is None if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, log = pathlib.Path(folder) / "report.json", pathlib.Path(folder) / "log"
        command = [
            *(sys.executable, "-m", "launch.compile", f"--config={RECIPES[row.recipe]}", f"--stage={row.stage}"),
            *(f"--topology={MACHINES[row.machine]}", f"--output={output}", f"--quick={quick}"),
            *(f"--config.train_teacher.batch_size={TEACHER_BATCH}", *row.plan.settings(row.stage).split()),
        ]
        packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": packages}
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
        memory = used.ru_maxrss / 2**20
        print(f"== {row.name}: {used.ru_utime:.0f} s, {memory:.1f} GiB\n{log.read_text()[-2500:]}", flush=True)
        if not output.exists() and "RESOURCE_EXHAUSTED" not in log.read_text():
            return None
        report = json.loads(output.read_text()) if output.exists() else None
        return {"settings": row.plan.settings(row.stage), "compiler_memory": round(memory, 1), "report": report}


def compile_plan(row: Row, compiled: dict[str, dict], quick: bool) -> bool:
    """Compile the row's mesh, or note in ``compiled`` that it is too large; return whether ``compiled`` changed."""
    settings, known = row.plan.settings(row.stage), compiled.get(row.name, {})
    if known.get("settings") != settings:
        entry = compile_row(row, quick)
        if entry is not None:
            compiled[row.name] = known | entry
        return entry is not None
    if row.fits or not row.plan.fits:
        return False
    compiled[row.name] = known | {"too_large": [*known.get("too_large", ()), settings]}
    return True


def main() -> None:
    """Compile the rows of ``--compile``, then write docs/scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", nargs="+", default=(), metavar="ROW", help="compile these rows first")
    parser.add_argument("--quick", action="store_true", help="the compiler is to make the least effort")
    chosen = parser.parse_args()
    store = ROOT / "docs" / "scaling.json"
    compiled = json.loads(store.read_text()) if store.exists() else {}
    made = rows(compiled)
    for pattern in chosen.compile:
        matching = [row for row in made if fnmatch.fnmatchcase(row.name, pattern)]
        if not matching:
            parser.error(f"there is no row {pattern!r}; for example {made[0].name!r}")
        for row in matching:
            while compile_plan(row_of(row.recipe, row.stage, row.machine, compiled), compiled, chosen.quick):
                store.write_text(json.dumps(compiled, indent=1) + "\n")
    (ROOT / "docs" / "scaling.md").write_text(document(rows(compiled)))


if __name__ == "__main__":
    main()
