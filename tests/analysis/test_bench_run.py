"""The whole benchmark at a tiny size: every line it promises, and that moving a stream back repeats its block."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.analysis import bench, flops
from causvid_jax.analysis import report as report_format
from causvid_jax.config import ConfigError
from causvid_jax.models import transformer
from causvid_jax.sampling import stream
from tests.tiny import tiny_recipe

RECIPE = tiny_recipe(
    video={"frames": 29},
    causal={"frames_per_block": 2, "window": 4},
    diffusion={"denoising_timesteps": (1000.0, 750.0, 500.0, 250.0)},
)
NET = RECIPE.student


def test_every_promised_line_is_there():
    asked = bench.Options(repeats=2, codecs=("wan",))
    report = bench.run(RECIPE, asked)
    lines = {(line["what"], line["seen"], line["codec"]): line for line in report["lines"]}
    codec = "tiny VAE, float32"
    assert set(lines) == {
        *((what, seen, "none") for what in ("denoising step", "cache write") for seen in (2, 4)),
        ("denoising, all 4 steps", 4, "none"),
        ("block, steady", 4, "none"),
        ("clip of 29 frames", None, "none"),
        ("decoding a block", None, codec),
        ("block and decoding, steady", 4, codec),
        ("time to first frame", None, codec),
        ("clip of 29 frames", None, codec),
    }
    assert report["schema"] == report_format.SCHEMA
    seen_by_viewers = {item["codec"]: item for item in report["delivery"]}
    assert set(seen_by_viewers) == {"none", codec}
    for item in seen_by_viewers.values():
        assert item["chunks"] == 4 and 0 < item["gap_p50_ms"] <= item["gap_p95_ms"] <= item["gap_p99_ms"]
        assert item["real_time"] == pytest.approx(item["fps"] / RECIPE.video.fps) and 0 <= item["on_time"] <= 1
    for line in lines.values():
        assert len(line["ms"]) == line["calls"]
        assert 0 < line["p50_ms"] <= line["p99_ms"] and line["calls"] >= 2
        assert (line["resolution"], line["window"], line["precision"]) == ("16x16", "4", "float32")
        assert line["share_of_peak"] is None
    one = flops.forward(NET, 2, 4, 2 * 4, text=False) / 1e12
    assert lines["denoising step", 4, "none"]["tflop"] == pytest.approx(one)
    assert lines["block, steady", 4, "none"]["tflop"] == pytest.approx(5 * one)
    # Four blocks, of which the first sees two frames.
    first = flops.forward(NET, 2, 4, 2 * 2, text=False) / 1e12
    assert lines["clip of 29 frames", None, "none"]["tflop"] == pytest.approx(5 * (first + 3 * one))
    assert report["weights"].startswith("random") and "cpu" in report["device"]["platform"]
    assert "no published peak" in report["peak"]
    assert report_format.markdown(report).count("| 16x16 |") == len(lines)


def test_a_stream_moved_back_makes_its_block_again():
    params = {"student": bench.random_weights(transformer.inference(RECIPE.student, unstacked=True))}
    state = stream.init_stream(params, jnp.ones((1, RECIPE.text.length, RECIPE.text.dim)), config=RECIPE)
    for _ in range(3):
        _, state = stream.next_block(params, state, config=RECIPE)
    once, state = stream.next_block(params, stream.copy_stream(state), config=RECIPE)
    back = dataclasses.replace(bench.rewinder(6)(state), block=jnp.int32(3))
    again, state = stream.next_block(params, back, config=RECIPE)
    assert np.asarray(once).std() > 0
    np.testing.assert_array_equal(again, once)


def test_weights_are_random_and_in_their_types():
    net = dataclasses.replace(NET, dtype="bfloat16")
    recipe = dataclasses.replace(RECIPE, student=net)
    held = bench.random_weights(transformer.inference(recipe.student, unstacked=True))
    kernel = held["blocks"][0]["ffn"]["fc1"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and held["time_embedding"]["fc1"]["kernel"].dtype == jnp.float32
    assert float(kernel.astype(jnp.float32).std()) == pytest.approx(0.02, rel=0.1)
    assert np.all(np.asarray(held["blocks"][0]["norm3"]["scale"]) == 1)


def test_what_cannot_fit_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(bench.memory, "memory_limit", lambda: 1000)
    with pytest.raises(ConfigError, match="to stream takes about .* and the device has"):
        bench.check(RECIPE, bench.Options(codecs=("wan",)))
