"""The prediction of a pipeline of denoising steps against sums by hand, for a small shape."""

import dataclasses
import importlib
import pathlib

import pytest

from causvid_jax.analysis import flops
from causvid_jax.config import ConfigError
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def pipeline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("pipeline")


def test_the_table_of_a_small_shape(pipeline, monkeypatch, capsys):
    """Two steps and a write pass, blocks of two latents of 4 x 4 x 4; four heads, so context 3 does not exist."""
    net = {"num_heads": 4, "dim": 64}
    recipe = tiny.tiny_recipe(
        teacher=net, student=net, causal={"window": 6, "frames_per_block": 2}, video={"frames": 21},
        diffusion={"denoising_timesteps": (1000.0, 500.0)},
    )  # fmt: skip
    monkeypatch.setattr(pipeline, "load_recipe", lambda name: recipe)
    found = {row.scheme: row for row in pipeline.main(["--chips=v5p"])["v5p"]}
    assert list(found) == [
        "one device", "context 2", "context 2, no write pass", "steps, noisy keys", "steps, estimates",
        "steps, sent keys",
    ]  # fmt: skip
    one_pass = found["one device"].block_ms / 3
    assert one_pass >= 1e3 * flops.stream_block(recipe) / 3 / (0.8 * 459e12)
    latents = 2 * 4 * 4 * 4 * 4
    hop = 1e3 * latents / 100e9  # one of six links of 600 GB/s
    noisy, estimates, sent = (found[f"steps, {name}"] for name in ("noisy keys", "estimates", "sent keys"))
    assert noisy.sent_mb == estimates.sent_mb == pytest.approx(latents / 1e6)
    assert noisy.block_ms == pytest.approx(one_pass + hop) and noisy.latency_ms == pytest.approx(2 * noisy.block_ms)
    assert estimates.block_ms == pytest.approx(2 * one_pass + hop)
    assert (noisy.devices, sent.devices) == (2, 3)
    keys = 2 * recipe.student.num_layers * 2 * (4 * 4 // 4) * 64 * (2 if recipe.student.dtype == "bfloat16" else 4)
    assert sent.sent_mb == pytest.approx((latents + keys) / 1e6)
    assert noisy.frames == pytest.approx(8 / (1e-3 * noisy.block_ms))
    text = capsys.readouterr().out
    assert f"| steps, sent keys | 3 | 0.0 GiB | {sent.sent_mb:.4g} MB | {sent.block_ms:.1f}, " in text
    larger = dataclasses.replace(noisy, gib=96.0)
    assert pipeline.markdown({"v5p": [larger]}).endswith("| too large |") and "too large" not in text
    with pytest.raises(ConfigError, match="--chips names b200; accepted: v5e, v5p, v6e, h100, h200"):
        pipeline.main(["--chips=b200"])
