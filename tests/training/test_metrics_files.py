"""Metrics files: their records, and that those of a resumed run have every step once."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import ConfigError
from causvid_jax.training.metrics import MetricsWriter, read_metrics


def test_records_are_json_lines_and_tensorboard_events(tmp_path):
    with MetricsWriter(tmp_path / "run") as metrics:
        metrics.write(1, {"loss": jnp.float32(0.5), "rate": np.float64(1e-3)})
        metrics.write(np.int64(2), {"loss": float("nan"), "norm": float("inf")})
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # on disk before close
    records = [json.loads(line) for line in lines]
    assert [{k: v for k, v in r.items() if k != "time"} for r in records] == [
        {"step": 1, "loss": 0.5, "rate": 1e-3},
        {"step": 2, "loss": None, "norm": None},
    ]
    assert "NaN" not in "".join(lines) and records[0]["time"] <= records[1]["time"]
    events = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(events) == 1 and events[0].stat().st_size > 100


def test_resuming_drops_later_steps_and_appends(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": step})
    with MetricsWriter(tmp_path, step=4) as metrics:
        metrics.write(5, {"loss": 50})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    with MetricsWriter(tmp_path):  # starts again from nothing
        pass
    assert read_metrics(tmp_path) == []


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with MetricsWriter(tmp_path, step=2) as metrics:
        metrics.write(2, {"loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]


def test_a_workdir_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="metrics cannot be written to .*file"):
        MetricsWriter(tmp_path / "file" / "run")
