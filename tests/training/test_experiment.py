"""Experiments: every row trains its stages for every seed, is measured, continues after a stop, and is drawn."""

import json

import numpy as np
import pytest

from causvid_jax.checkpoints import store
from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import ConfigError
from causvid_jax.config.recipes import load_recipe
from causvid_jax.distill import replay
from causvid_jax.evaluation import frame_metrics
from causvid_jax.training import experiment, stages
from causvid_jax.training.experiment import Budget, Experiment, Row
from tests.tiny import random_transformer, save_classifier, tiny_recipe, tiny_workdir

RECIPE = tiny_recipe(train_distill={"steps": 1, "samples": 0, "rollout": "self"})
PLAN = Experiment(
    title="Two rows",
    claim="A claim.",
    rows=(
        Row("as it is", paper="94.7"),
        Row("Trained again!", stages=("distill",), settings={"train_distill.guidance_scale": "2.0"}),
    ),
    lengths=(1, 2),
)


@pytest.fixture
def base(tmp_path):
    folder = tiny_workdir(tmp_path / "base", RECIPE)
    save_classifier(folder)
    return folder


def test_rows_are_trained_and_measured(base, tmp_path, monkeypatch):
    trained: list[tuple] = []

    def record(name, recipe, folder):  # the stages are tested by themselves
        trained.append((name, recipe.train_distill.guidance_scale, recipe.train_distill.seed, folder.name))
        weights = random_transformer(recipe.student, seed=9, scale=0.05)
        store.save_params(paths.stage_path(folder, name), weights, {})

    monkeypatch.setattr(stages, "train", record)
    budget = Budget(seeds=2, samples=2)

    def run(recipe=RECIPE):
        return experiment.run(PLAN, recipe, base, tmp_path / "out", budget, say=lambda _: None)

    result = run()
    assert [each[:3] for each in trained] == [("distill", 2.0, seed) for seed in (0, 1)]
    assert len({folder for *_, folder in trained}) == 2
    rows = result["rows"]
    assert list(rows) == ["as it is", "Trained again!"] and list(rows["as it is"]) == ["1", "2"]
    assert set(rows["as it is"]["1"]) == {
        *("digit", "first_block", "identity", "color", "direction", "motion", "sharpness")
    }
    # The base is read and not changed; a row's own weights are its own.
    own = store.load_params(paths.stage_path(tmp_path / "out" / trained[0][3], "distill"))[0]
    before = store.load_params(paths.stage_path(base, "distill"))[0]
    assert any((a != b).any() for a, b in zip(store.flatten(own).values(), store.flatten(before).values(), strict=True))
    assert json.dumps(run()) == json.dumps(result) and len(trained) == 2  # some figures are NaN
    run(tiny_recipe(train_distill={"steps": 2, "samples": 0, "rollout": "self"}))  # finds no weights of one step
    assert len(trained) == 4

    table = experiment.markdown(json.loads(json.dumps(result)))
    assert table.count("| as it is |") == 2 and "94.7" in table and "1 cycles of 2 clips" in table
    experiment.draw(result, tmp_path / ".plot.png.tmp")  # its name says no format
    assert (tmp_path / ".plot.png.tmp").read_bytes().startswith(b"\x89PNG")


def test_rows_share_what_they_train_alike(base, tmp_path, monkeypatch):
    trained = []

    def record(name, recipe, folder):
        trained.append((name, folder.name))
        store.save_params(paths.stage_path(folder, name), random_transformer(recipe.student, seed=9, scale=0.05), {})

    monkeypatch.setattr(stages, "train", record)
    plan = Experiment(
        title="",
        claim="",
        rows=(
            Row("one", stages=("distill",), once=("init",), settings={"train_init.steps": "1"}),
            Row("the same under another name", stages=("distill",), once=("init",), settings={"train_init.steps": "1"}),
            Row("other settings", stages=("distill",), once=("init",), settings={"train_init.steps": "2"}),
        ),
    )
    for seed in (0, 1):
        for row in plan.rows:
            _, part = experiment.train_row(RECIPE, plan, row, seed, base, tmp_path / "out", lambda _: None)
            if row.name != "other settings":
                first = trained[0][1]
                assert (part / "init").resolve() == tmp_path / "out" / first / "init"
    assert [name for name, _ in trained] == ["init", "distill", "init", "distill", "distill", "distill"]
    assert len(set(trained)) == 6


def test_another_stage_stands_in(tmp_path):
    base = tmp_path / "base"
    for name in ("init", "causal", "distill", "data/latents"):
        (base / name).mkdir(parents=True)
    experiment.link(base, tmp_path / "part", ("distill",), {"init": "causal"})
    assert (tmp_path / "part" / "init").resolve() == (base / "causal").resolve()
    assert not (tmp_path / "part" / "distill").exists() and (tmp_path / "part" / "data" / "latents").is_symlink()


def test_every_experiment_of_the_clone_fits_the_digits_recipe():
    recipe = load_recipe("digits")
    assert len(experiment.names()) >= 5
    for name in experiment.names():
        plan = experiment.load(name)
        for row in plan.rows:
            own = experiment.row_recipe(recipe, plan, row, seed=1)
            if own.train_distill.gradient == "replay":
                continued = own.train_distill.continuation_prob > 0
                replay.check_positions(own, own.video.latent_frames * (1 + continued))  # type: ignore[arg-type]
            assert set(row.stages) <= {*experiment.TRAINED, "trajectories"}
    assert experiment.recolor("a red 3 moving left", recipe) == "a green 3 moving left"


def test_unknown_experiments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="experiment 'tab9' does not exist; accepted: ablation, "):
        experiment.load("tab9")
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no get_experiment function"):
        experiment.load(str(tmp_path / "mine.py"))


def test_the_interval_covers_seeds_and_clips():
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 0.1, 64) for mean in (0.0, 1.0, 2.0)]  # seeds differ far more than clips
    nested = frame_metrics.nested_interval(groups)
    assert nested["mean"] == pytest.approx(np.mean([group.mean() for group in groups]))
    # All resamples of three seeds: the extreme ones are three times the first or the last.
    assert nested["low"] == pytest.approx(0.0, abs=0.4) and nested["high"] == pytest.approx(2.0, abs=0.4)
    pooled = frame_metrics.interval(np.concatenate(groups))
    assert pooled["high"] - pooled["low"] < 0.3 * (nested["high"] - nested["low"])
    assert np.isnan(frame_metrics.nested_interval([np.array([np.nan])])["mean"])


def test_motion_of_frozen_and_moving_clips():
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[8:20, 10:14] = 255
    still = np.repeat(frame[None], 12, axis=0)
    moving = np.stack([np.roll(frame, -t, axis=1) for t in range(12)])
    peaks = frame_metrics.displacements(np.stack([still, moving]))
    np.testing.assert_allclose(frame_metrics.motion(peaks, speed=1), [0.0, 1.0], atol=0.1)
