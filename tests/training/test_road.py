"""All legs of a recipe's road in order, interrupted and continued; a second road gives the same bits."""

import json
import signal

import numpy as np
import pytest

from causvid_jax.checkpoints import store
from causvid_jax.checkpoints import workdir as paths
from causvid_jax.cli import road as cli_road
from causvid_jax.cli.stopping import Stopped
from causvid_jax.config import ConfigError, RunError, to_json
from causvid_jax.config.recipes import load_recipe
from causvid_jax.data import prepare
from causvid_jax.evaluation import measure, report, train_classifier
from causvid_jax.training import preemption, provenance, road, stages
from tests.tiny import changed, tiny_recipe

SHORT = {"steps": 2, "samples": 0}
RECIPE = tiny_recipe(
    decoder="taehv",
    train_vae=SHORT | {"curriculum": ()},
    train_teacher=SHORT,
    train_causal=SHORT,
    train_init=SHORT | {"teacher": "causal"},
    train_distill=SHORT,
    train_taehv=SHORT | {"rollouts": ((1, 2),)},
)
PLAN = report.Plan(samples=2, reference=2, batch=2, long_factor=2, repeats=1)
LEGS = [
    *("data", "classifier", "vae", "latents", "teacher", "causal"),
    *("trajectories", "init", "distill", "streams", "taehv", "report"),
]


@pytest.fixture(autouse=True)
def short_measures(monkeypatch):
    make = measure.make_classifier
    monkeypatch.setattr(measure, "make_classifier", lambda recipe, path: make(recipe, path, steps=3))
    monkeypatch.setattr(train_classifier, "accuracy", lambda *_: {})

    def write_report(recipe, output, plan, *, folder, classifier):
        assert recipe == RECIPE and classifier == folder / "classifier.safetensors"
        output.write_text(json.dumps({"plan": {"samples": plan.samples}}))

    monkeypatch.setattr(measure, "write_report", write_report)  # what it measures is tested by itself


def test_the_road_continues_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    lines: list[str] = []
    train = stages.train
    with monkeypatch.context() as patch:

        def stop_at_teacher(name, *arguments):
            if name == "teacher":
                raise RunError("stopped")
            return train(name, *arguments)

        patch.setattr(stages, "train", stop_at_teacher)
        with pytest.raises(RunError, match="stopped"):
            road.travel(RECIPE, first, road.legs(RECIPE, first, prepare.Options(), PLAN), lines.append)
    assert [line.split(",")[1].strip() for line in lines] == LEGS[:5]
    lines.clear()
    legs = road.legs(RECIPE, first, prepare.Options(), PLAN)
    assert [leg.name for leg in legs] == LEGS
    assert [leg.is_done() for leg in legs] == [True] * 4 + [False] * 8
    road.travel(RECIPE, first, legs, lines.append)
    assert [": done" in line for line in lines] == [True] * 4 + [False] * 9
    assert all(leg.is_done() for leg in legs)
    assert json.loads((first / road.REPORT).read_text())["plan"]["samples"] == 2
    record = json.loads((first / paths.ROAD_RECORD).read_text())
    assert list(record["seconds"]) == LEGS and record["seconds"]["vae"] > 0

    road.travel(RECIPE, second, road.legs(RECIPE, second, prepare.Options())[:4], lines.append)
    for stage in ("vae", "teacher"):
        (a, about), (b, _) = (store.load_params(paths.stage_path(folder, stage)) for folder in (first, second))
        a, b = store.flatten(a), store.flatten(b)
        assert all((a[name] == b[name]).all() for name in a | b)
        made = json.loads(about[provenance.KEY])
        assert made["steps"] == 2 and made["hours"] > 0 and "JAX" in made["machine"] and made["code"].startswith("0.")
    assert made["data"].keys() >= {"latents"} and any(name.startswith("moving_digits/") for name in made["data"])
    assert made["data"].items() <= json.loads((first / paths.ROAD_RECORD).read_text())["data"].items()


def test_a_road_whose_training_sigterm_ends_is_not_done(tmp_path, monkeypatch):
    def end(*_):
        raise preemption.Terminated

    monkeypatch.setattr(stages, "train", end)
    with pytest.raises(Stopped) as stopped:
        cli_road.main(cli_road.Options(RECIPE, str(tmp_path)))
    assert stopped.value.number == signal.SIGTERM


def test_the_package_has_a_record_of_every_leg_of_its_road(tmp_path):
    """Without it ``causvid road`` cannot say how long the digits recipe will take."""
    recipe = load_recipe("digits")
    record = json.loads((paths.ASSETS / "digits" / paths.ROAD_RECORD).read_text())
    assert list(record["seconds"]) == [leg.name for leg in road.legs(recipe, tmp_path, prepare.Options(), PLAN)]
    assert min(record["seconds"].values()) > 0 and 3600 < sum(record["seconds"].values()) < 14 * 3600


def test_a_finished_leg_of_other_settings_is_said(tmp_path, capsys):
    path, lines = paths.stage_path(tmp_path, "teacher"), []
    store.save_params(path, {"a": np.zeros(1, np.float32)}, {"config": to_json(RECIPE)})
    for changes, note in (
        ({"train_teacher": {"samples": 3, "log_every": 7}, "train_vae": {"steps": 5}}, ""),
        ({"train_teacher": {"steps": 5}}, "made with train_teacher.steps 2, now 5. To make it again, remove"),
    ):
        legs = road.legs(changed(RECIPE, **changes), tmp_path, prepare.Options(), PLAN)
        lines.clear()
        road.travel(RECIPE, tmp_path, [leg for leg in legs if leg.name == "teacher"], lines.append)
        assert ": done" in lines[0] and len(lines) == (3 if note else 2) and note in lines[1]
        cli_road.main(cli_road.Options(changed(RECIPE, **changes), str(tmp_path), dry_run=True))
        assert note in capsys.readouterr().out.partition("teacher: done\n")[2].partition("causal: to do")[0]


def test_a_forecast_is_the_reference_at_the_speed_of_the_legs_so_far():
    reference = {"data": 100.0, "vae": 3600.0, "teacher": 7200.0}
    assert road._forecast(reference, {}, ["data", "vae", "teacher"]) == ": about 2 min, 3 h 02 min to the end"
    assert road._forecast(reference, {"data": 50.0}, ["vae", "teacher"]) == ": about 30 min, 1 h 30 min to the end"
    assert road._forecast(reference, {"data": 100.0, "vae": 1800.0}, ["vae", "teacher"]) == (
        ": about 30 min, 2 h 30 min to the end"
    )
    assert road._forecast({"data": 1.0}, {}, ["data", "vae"]) == ""


@pytest.mark.parametrize(
    "changes, names",
    [
        ({}, ["data", "vae", "latents", "teacher", "trajectories", "init", "distill"]),
        ({"train_distill": {"teacher": "causal"}}, LEGS[:1] + LEGS[2:9]),
    ],
)
def test_legs_follow_the_recipe(tmp_path, changes, names):
    recipe = tiny_recipe(decoder="vae", **changes)
    assert [leg.name for leg in road.legs(recipe, tmp_path, prepare.Options())] == names


def test_a_road_and_a_stage_refuse_a_batch_that_the_mesh_does_not_divide(tmp_path):
    """Before anything is made: the first legs of a road take hours."""
    split = changed(RECIPE, parallel={"fsdp": 7})
    for start in (
        lambda: road.legs(split, tmp_path, prepare.Options()),
        lambda: stages.train("distill", split, tmp_path),
    ):
        with pytest.raises(ConfigError, match="has a batch of .*; slices x data x fsdp x accumulate is 7"):
            start()
    assert not list(tmp_path.iterdir())
