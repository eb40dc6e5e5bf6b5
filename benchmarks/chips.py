"""A streamed block on six chips: products, bytes and a roofline time by the compiled program; nothing is measured.

``python benchmarks/chips.py --config=wan_1_3b --precision=fast --programs=DIR --output=chips.json`` prints a table in
Markdown and writes the same as JSON. The block is that of a full window: all denoising steps and the context pass.

The compilers of the extras ``cuda12`` and ``tpu`` compile ``next_block`` for a described H200, v5e, v5p and v6e. DIR
keeps the text of each program, and a program that is there is not compiled again; remove it after a change. H100 and
B200 are counted with the program of the H200 at their own rates. Without a program and a compiler for one, a row is
computed from shapes: its bytes are those of weights and cache, once in every pass. ``--estimate`` compiles nothing.

Products run at 80% of the chip's published peak in bfloat16. A Pallas kernel of a TPU does not show its products; they
are added by formula.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import roofline

from causvid_jax.analysis import compile_report, estimate, flops, topology
from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.config.files import write_text
from causvid_jax.config.recipes import load_recipe
from causvid_jax.sampling.schedule import passes_per_block

SHARE = 0.8
"""Share of the published peak at which products are counted."""
PROGRAMS = {
    "h100": "h200:1", "h200": "h200:1", "b200": "h200:1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2",
}  # fmt: skip
"""Chip to the described machine whose program counts."""
B200 = 8.0e12
"""Bytes a second of a B200's memory (NVIDIA's data sheet); no program is compiled for it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A chip's figures.

    Attributes:
        chip: its name.
        program: the machine that the program was compiled for; "shapes" without a program.
        tflop: products of a block.
        gigabytes: read and written in a block.
        launches: instructions that run; 0 without a program.
        products_ms: the products alone, which is the ideal.
        roofline_ms: of the program.
        bandwidth_ms: part of it in which the memory takes longer than the products.
        above_ms: what remains above the ideal.
    """

    chip: str
    program: str
    tflop: float
    gigabytes: float
    launches: int
    products_ms: float
    roofline_ms: float
    bandwidth_ms: float
    above_ms: float


def rates(chip: str) -> tuple[float, float]:
    """Return the FLOP/s at which products are counted, and the bytes/s of the memory."""
    if chip == "b200":
        return SHARE * (topology.peak_flops("NVIDIA B200", "bfloat16")[0] or 0.0), B200
    return SHARE * topology.CHIPS[chip].flops, topology.CHIPS[chip].bandwidth


def row(chip: str, recipe: Recipe, program: str | None = None) -> Row:
    """Return the figures of ``chip`` by the text of a compiled program; None: by shapes."""
    (rate, bandwidth), work = rates(chip), flops.stream_block(recipe)
    ideal = work / rate
    if program is None:
        parts = estimate.estimate(recipe, "stream", topology.parse("h100:1")).parts
        moved = passes_per_block(recipe) * (parts["parameters"] + parts["caches"])
        seconds, launches = max(ideal, moved / bandwidth), 0
        bound = seconds if moved / bandwidth > ideal else 0.0
    else:
        sums = roofline.roofline(roofline.costs(program), rate, bandwidth)
        seconds = sums.seconds + max(0.0, work - sums.flops) / rate
        moved, launches, bound = sums.bytes, sums.launches, sums.bound_by_bandwidth
    name = PROGRAMS[chip] if program is not None else "shapes"
    milliseconds = [1e3 * x for x in (ideal, seconds, bound, seconds - ideal)]
    return Row(chip, name, work / 1e12, moved / 1e9, launches, *milliseconds)


def program_of(chip: str, recipe: Recipe, folder: pathlib.Path | None, *, compiles: bool) -> str | None:
    """Return the compiled text of a block for ``chip``, from ``folder`` if it is there; None if there is none."""
    file = folder / f"{PROGRAMS[chip].partition(':')[0]}.hlo" if folder else None
    if file is not None and file.exists():
        return file.read_text()
    if not compiles:
        return None
    try:
        machine = topology.describe(PROGRAMS[chip])
    except ConfigError as error:
        print(f"{chip}: computed from shapes: {error}")
        return None
    lowered = compile_report.lower_block(recipe, machine)
    text = lowered.compile(compile_report.options(machine.machine)).as_text()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return text


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    heads = "chip, program, products, traffic, launches, products alone, roofline, of it bound by bandwidth, above"
    lines = [f"| {heads.replace(', ', ' | ')} |", "|---" * 9 + "|"]
    for one in rows:
        parts = (
            *(one.chip, one.program, f"{one.tflop:.4g} TFLOP", f"{one.gigabytes:.4g} GB", str(one.launches or "")),
            *(f"{x:.1f} ms" for x in (one.products_ms, one.roofline_ms, one.bandwidth_ms, one.above_ms)),
        )
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan_1_3b", help="a recipe's name or file")
    parser.add_argument("--precision", help="the student's policy instead of the recipe's")
    parser.add_argument("--chips", default=",".join(PROGRAMS), help="names separated by commas")
    parser.add_argument("--programs", type=pathlib.Path, help="the folder that keeps the compiled programs")
    parser.add_argument("--estimate", action="store_true", help="compile nothing; no program: by shapes")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    options = parser.parse_args(arguments)
    chips = options.chips.split(",")
    unknown = [chip for chip in chips if chip not in PROGRAMS]
    require(not unknown, f"--chips names {', '.join(unknown)}; accepted: {', '.join(PROGRAMS)}")
    recipe = load_recipe(options.config)
    if options.precision:
        student: Any = dataclasses.replace(recipe.student, precision=options.precision)
        recipe = dataclasses.replace(recipe, student=student)
    texts: dict[str, str | None] = {}
    for chip in chips:
        if PROGRAMS[chip] not in texts:
            texts[PROGRAMS[chip]] = program_of(chip, recipe, options.programs, compiles=not options.estimate)
    rows = [row(chip, recipe, texts[PROGRAMS[chip]]) for chip in chips]
    print(markdown(rows))
    if options.output:
        settings = {"recipe": recipe.name, "precision": recipe.student.precision, "window": recipe.causal.window}
        record = {**settings, "share_of_peak": SHARE, "rows": [dataclasses.asdict(one) for one in rows]}
        write_text(options.output, json.dumps(record, indent=1))
    return rows


if __name__ == "__main__":
    main()
