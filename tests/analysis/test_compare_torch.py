"""The comparison with PyTorch without PyTorch: the turns, the figures of a line, our side of it, and refusals."""

import dataclasses
import importlib.util
import itertools
import pathlib

import numpy as np
import pytest

from causvid_jax.analysis import bench
from causvid_jax.config import CausalConfig, ConfigError
from tests import tiny

FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "compare_torch.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_torch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_calls_take_turns_and_the_first_rounds_do_not_count(compare):
    order, now = [], itertools.count()
    calls = {name: lambda name=name: order.append(name) for name in ("jax", "torch")}
    times = compare.interleave(calls, 3, lambda: next(now))
    assert order == ["jax", "torch", "torch", "jax"] * 2 + ["jax", "torch"]
    assert times == {"jax": [1000.0] * 3, "torch": [1000.0] * 3}


def test_a_line_has_the_ratio_of_medians_its_interval_and_its_range(compare):
    item = compare.line("block", 21, {"jax": [10.0, 11.0, 30.0], "torch": [22.0, 20.0, 33.0]})
    assert item["p50_ms"] == {"jax": 11.0, "torch": 22.0} and item["ratio"] == 2.0
    assert item["range"] == pytest.approx((1.1, 2.2))
    low, high = item["interval"]
    assert low < 2.0 < high
    assert compare.table([item]).splitlines()[-1].startswith("| block | 21 | 11 | 22 | 2.00 | ")


def test_our_side_repeats_one_block_at_a_length(compare):
    recipe = dataclasses.replace(tiny.RECIPE, causal=CausalConfig(frames_per_block=1, window=3))
    ours, (start, _) = compare.Student(recipe), bench.cache_lengths(recipe)[-1]
    ours.fill(start)
    seen = np.asarray(ours.state.cache.frame)
    for function in (ours.denoise, ours.write, ours.block):
        ours.call(function, start)()
        assert int(ours.state.cache.position) == start + 1
    assert sorted(np.asarray(ours.state.cache.frame)) == sorted({*seen, start} - {start - 3, -1})


def test_the_frames_of_a_sink_are_added_to_the_window(compare, monkeypatch):
    other = tiny.changed(tiny.RECIPE, causal={"window": 4, "sink": 2})
    monkeypatch.setattr(compare, "load_recipe", lambda _: other)
    causal = compare.read_recipe(compare.parse(["--config=tiny", "--device=cpu"])).causal
    assert (causal.window, causal.sink) == (6, 0)


def test_what_the_twin_does_not_know_is_refused(compare, monkeypatch):
    given = compare.parse(["--config=tiny", "--window=4", "--device=cpu"])
    monkeypatch.setattr(compare, "load_recipe", lambda _: tiny.RECIPE)
    recipe = compare.read_recipe(given)
    assert (recipe.causal.window, recipe.student.dtype, given.repeats, given.eager) == (4, "float32", 15, False)
    for part, changes, words in (
        ("causal", {"independent_first_frame": True}, "knows neither an independent first frame"),
        ("student", {"linear": "int8"}, "does not compute in 8 bits"),
    ):
        other = tiny.changed(tiny.RECIPE, **{part: changes})
        monkeypatch.setattr(compare, "load_recipe", lambda _, other=other: other)
        with pytest.raises(ConfigError, match=words):
            compare.read_recipe(given)
