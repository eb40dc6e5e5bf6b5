"""How fast a recipe's stream is here: ``python -m launch.bench --config=configs/digits.py --output=bench.json``.

Milliseconds per denoising step at each cache length, of the cache write and of each codec; time to first frame; steady
frames/s and those of a clip, with and without a codec; memory; TFLOP/s and their share of the device's peak. Writes
JSON and, beside it, the same as a Markdown table (``.md``). Weights are random. One device; what is measured follows
the recipe: ``--config.causal.window=21 --config.student.dtype=bfloat16 --config.student.attention=cudnn``.
"""

import json

from absl import flags

from causvid_jax.analysis import bench_codecs, bench_plan, bench_results, bench_sampler
from causvid_jax.cli import common

_CONFIG = common.define_config_flag()
_OUTPUT = flags.DEFINE_string("output", None, "The report to write, a .json file; .md goes beside it.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls of each program.")
_STREAMS = flags.DEFINE_integer("streams", 1, "Videos side by side.")
_CODECS = flags.DEFINE_list("codecs", list(bench_codecs.NAMES), "Decoders to measure, of wan and taehv.")
_WEIGHTS = flags.DEFINE_string(
    "weights", "compute", "Stored type of kernels: compute (the type they are multiplied in) or float32."
)


def main() -> None:
    """Check the flags, measure, write."""
    recipe = common.load_recipe(_CONFIG)
    output = common.check_output(_OUTPUT.value, (".json",))
    names = tuple(name.strip() for name in _CODECS.value if name.strip())
    wanted = bench_plan.Plan(_REPEATS.value, _STREAMS.value, names, _WEIGHTS.value)
    bench_plan.check(recipe, wanted)
    common.enable_compilation_cache()
    common.log_start(recipe)
    report = bench_sampler.run(recipe, wanted, log=lambda what: print(f"... {what}", flush=True))
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = bench_results.markdown(report)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
