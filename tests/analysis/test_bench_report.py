"""Tables, percentiles, peaks and comparisons, against numbers worked out by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.analysis import bench, topology
from causvid_jax.analysis import report as report_format
from causvid_jax.config import CausalConfig, Recipe

SETTINGS = {
    "recipe": "tiny",
    "resolution": "480x832",
    "streams": 1,
    "window": "21",
    "steps": "4 + write",
    "precision": "bfloat16",
    "attention": "cudnn",
}


def report(p50=300.0, **changes):
    lines = [
        report_format.Line("denoising, all 4 steps", 21, "none", p50, p50 + 5, 20, 161.64),
        report_format.Line("decoding a block", None, "TAEHV, bfloat16", 8.0, 9.0, 20, 1.63),
        report_format.Line("block, steady", 21, "none", 400.0, 410.0, 20, 202.0, 30.0),
    ]
    settings = SETTINGS | changes
    return {
        "program": "launch.bench",
        "date": "2026-11-22",
        "device": {"platform": "gpu", "kind": "NVIDIA H200", "framework": "JAX 0.11.2"},
        "settings": settings,
        "weights": "random",
        "peak": "as published",
        "compile_seconds": 12.0,
        "memory": {"of": "device", "bytes": {"student": 2**31}},
        "lines": [report_format.line(line, settings, 989e12) for line in lines],
        "notes": ["A note."],
    }


def test_a_line_names_its_settings_and_its_share():
    line = report()["lines"][0]
    assert line["tflops"] == pytest.approx(538.8) and line["share_of_peak"] == pytest.approx(0.5448, rel=1e-3)
    assert {name: line[name] for name in report_format.NAMES} == {name: SETTINGS[name] for name in report_format.NAMES}
    text = report_format.markdown(report())
    row = "| denoising, all 4 steps | 21 | 480x832 | 1 | 21 | 4 + write | bfloat16 | none "
    row += "| 300 | 305 | 162 | 539 | 54.5% |"
    assert row in text and "Weights: random." in text and "student 2048 MiB" in text


def test_unknown_peaks_stay_unknown():
    assert topology.peak_flops("NVIDIA H200", "bfloat16")[0] == 989e12
    assert topology.peak_flops("TPU v5 lite", "bfloat16")[0] == 197e12
    assert topology.peak_flops("abacus", "bfloat16") == (None, "no published peak is known for device kind 'abacus'")
    assert topology.peak_flops("NVIDIA H200", "float32")[0] is None
    line = report_format.line(report_format.Line("x", 3, "none", 2.0, 3.0, 5, 1.0), SETTINGS, None)
    assert line["share_of_peak"] is None and line["tflops"] == 500.0


def test_comparison_has_the_ratio_of_common_lines():
    theirs = report(p50=450.0)
    theirs["device"] = theirs["device"] | {"framework": "PyTorch 2.13"}
    theirs["lines"] = theirs["lines"][:1]
    table = report_format.comparison(report(), theirs)
    assert table.count("\n") == 3
    assert table.splitlines()[-1].endswith("| 300 | 305 | 539 | 450 | 455 | 359 | 1.50 | - |")
    ours = report()
    ours["lines"][0]["ms"], theirs["lines"][0]["ms"] = [299.0, 300.0, 301.0], [450.0] * 3
    assert report_format.comparison(ours, theirs).splitlines()[-1].endswith("| 1.50 | 1.50 to 1.51 |")
    with pytest.raises(ValueError, match="window is 21 and 12: not comparable"):
        report_format.comparison(report(), report(window="12"))
    other = report()
    other["device"] = other["device"] | {"kind": "NVIDIA B200"}
    with pytest.raises(ValueError, match="device kind is 'NVIDIA H200' and 'NVIDIA B200': not comparable"):
        report_format.comparison(report(), other)


def test_times_wait_and_do_not_count_the_first_call():
    calls = []

    def call(x):
        calls.append(float(x))
        return x + 1

    times, last = bench.time_each(call, jnp.zeros(()), 4, before=lambda x: x * 2)
    assert calls == [0.0, 2.0, 6.0, 14.0, 30.0] and float(last) == 31.0 and len(times.seconds) == 4
    seconds, last = bench.time_pipelined(call, jnp.zeros(()), 3)
    assert float(last) == 4.0 and seconds >= 0
    known = bench.Times((1.0, 4.0, 2.0, 3.0))
    assert known.median == 2.5 and known.percentile(99) == pytest.approx(np.percentile([1, 2, 3, 4], 99))


def test_every_length_of_a_window_and_of_a_clip():
    recipe = Recipe(name="tiny", causal=CausalConfig(frames_per_block=3, window=9))
    assert bench.cache_lengths(recipe) == [(0, 3), (3, 6), (6, 9)]
    clip = dataclasses.replace(recipe, causal=CausalConfig(frames_per_block=3))
    assert bench.cache_lengths(clip) == [(start, start + 3) for start in range(0, 21, 3)]
    uneven = dataclasses.replace(recipe, causal=CausalConfig(frames_per_block=3, window=7, sink=1))
    assert bench.cache_lengths(uneven) == [(0, 3), (3, 6), (6, 8)]
