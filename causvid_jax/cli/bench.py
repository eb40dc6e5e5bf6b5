"""Measure the speed of a recipe's stream on this machine: ``causvid bench --config=digits --output=bench.json``.

Measures milliseconds per denoising step at each cache length, of the cache write and of each decoder; time to first
frame; steady frames/s and those of a clip, with and without a decoder; memory; TFLOP/s and their share of the device's
peak. Writes JSON and, beside it, a Markdown table (``.md``). Weights are random. One device is measured, with the
recipe's settings: ``--config.causal.window=21 --config.student.dtype=bfloat16 --config.student.attention=cudnn``.
"""

import dataclasses
import json
from typing import Literal

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import Recipe


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    config: Recipe = config_option()
    output: str | None = option(None, "The report to write, a .json file; .md goes beside it.")
    repeats: int = option(20, "Timed calls of each program.")
    streams: int = option(1, "Videos side by side.")
    codecs: str = option("wan,taehv", "Decoders to measure, of wan and taehv.")
    weights: Literal["compute", "float32"] = option(
        "compute", "Stored type of kernels: compute (the type they are multiplied in) or float32."
    )


def main(options: Options) -> None:
    """Measure and write the report."""
    output = common.check_output(options.output, (".json",))
    from causvid_jax.analysis import bench
    from causvid_jax.analysis import report as report_format

    names = tuple(name.strip() for name in options.codecs.split(",") if name.strip())
    plan = bench.Options(options.repeats, options.streams, names, options.weights)
    bench.check(options.config, plan)
    common.enable_compilation_cache()
    common.log_start(options.config)
    report = bench.run(options.config, plan, log=lambda what: print(f"... {what}", flush=True))
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = report_format.markdown(report)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
