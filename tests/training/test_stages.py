"""The four stages in order on the tiny recipe: each trains, and a resumed run has the bits of an uninterrupted one."""

import dataclasses
import functools
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.checkpoints import store
from causvid_jax.config import ConfigError, VAEStageConfig
from causvid_jax.data import pipeline, prepare, sources
from causvid_jax.models import taehv, vae
from causvid_jax.training import autoencoder, checkpoint, export, stages, weights
from causvid_jax.training.metrics import read_metrics
from causvid_jax.training.run import Run
from tests.tiny import RECIPE, tiny_recipe

PREPARED = {"vae": "data", "teacher": "latents", "init": "trajectories"}


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> pathlib.Path:
    """Return a working directory in which every stage ran once, uninterrupted."""
    workdir = tmp_path_factory.mktemp("road")
    for name in stages.TRAINERS:
        if name in PREPARED:
            prepare.STAGES[PREPARED[name]](RECIPE, workdir)
        stages.train(name, RECIPE, workdir)
    return workdir


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(at)``: a Ctrl-C comes during step ``at`` of the next run."""

    def install(at: int) -> None:
        original = Run.after_step

        def after_step(run, state, metrics):
            if run.step + 1 == at:
                os.kill(os.getpid(), signal.SIGINT)
            return original(run, state, metrics)

        monkeypatch.setattr(Run, "after_step", after_step)

    yield install


@pytest.fixture
def first_state(monkeypatch):
    """``first_state(...)`` of ``stages.train``: the state that a run begins with, on the host."""

    class Began(Exception):
        pass

    def restore(run, state):
        raise Began(jax.device_get(state))

    def begin(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "restore", restore)
            with pytest.raises(Began) as began:
                stages.train(*arguments)
        return began.value.args[0]

    return begin


def linked(folder, road, *names):
    """Return ``folder`` as a working directory with some folders of ``road``."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(road / name)
    return folder


def ema(state):
    return state.student.ema if hasattr(state, "student") else state.network.ema


@pytest.mark.parametrize("name", stages.TRAINERS)
def test_stopped_and_resumed_ends_bit_for_bit_the_same(road, tmp_path, name, monkeypatch, interrupt):
    # What earlier stages left is read from the finished road; the stage itself starts afresh.
    linked(tmp_path, road, "data", *(other for other in stages.TRAINERS if other != name))
    interrupt(at=3)
    with pytest.raises(KeyboardInterrupt):
        stages.train(name, RECIPE, tmp_path)
    monkeypatch.undo()
    assert [record["step"] for record in read_metrics(tmp_path / name)] == [1, 2, 3]
    stages.train(name, RECIPE, tmp_path)

    weights = f"{name}/weights.safetensors"
    once, twice = (store.flatten(store.load_params(folder / weights)[0]) for folder in (road, tmp_path))
    assert once.keys() == twice.keys()
    for key in once:
        np.testing.assert_array_equal(twice[key], once[key], err_msg=key)
    assert [r["step"] for r in read_metrics(tmp_path / name) if "gradient_norm" in r or "generator_loss" in r] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("name", stages.TRAINERS)
def test_training_moves_every_parameter_that_can_move(road, tmp_path, name, first_state):
    linked(tmp_path, road, "data", *(other for other in stages.TRAINERS if other != name))
    before = store.flatten(ema(first_state(name, RECIPE, tmp_path)))
    after = store.flatten(store.load_params(road / name / "weights.safetensors")[0])
    still = [key for key in before if np.array_equal(before[key], after[key])]
    # A key's bias moves no softmax, so nothing pulls at it.
    assert not [key for key in still if not key.endswith("k/bias")]


def test_what_a_stage_leaves_behind(road):
    for name in stages.TRAINERS:
        folder = road / name
        assert (folder / "samples" / "000005.mp4").stat().st_size > 0
        assert json.loads((folder / "config.json").read_text())["steps"] == 5
        assert list((folder / "tensorboard").iterdir())
        assert store.load_params(folder / "weights.safetensors")[1]["stage"] == name


def test_what_is_cut_out_of_latents_and_frames_shows_the_same_moments():
    latents, frames = np.arange(7.0)[None], np.arange(25.0)[None]
    starts = set()
    for seed in range(40):
        z, video = autoencoder.random_crop(latents, frames, jax.random.key(seed), 3, 4)
        start = int(z[0, 0])
        starts.add(start)
        np.testing.assert_array_equal(z[0], start + np.arange(3))
        # Latent s > 0 holds frames 4s - 3 to 4s; as the first of a video it gives one frame, the last of them.
        np.testing.assert_array_equal(video[0], 4 * start + np.arange(9))
    assert starts == {0, 1, 2, 3, 4}
    cuts = jax.vmap(
        lambda key: autoencoder.random_crop(jnp.arange(21.0)[None], jnp.arange(81.0)[None], key, 4, 4)[0][0, 0]
    )
    starts = np.bincount(np.asarray(cuts(jax.random.split(jax.random.key(0), 4800)), int))
    np.testing.assert_allclose(starts, [1400, *[200] * 17], rtol=0.3)  # 6 + 1 and 17 shares of 24
    z, video = autoencoder.random_crop(latents, frames, jax.random.key(0), 9, 4)
    assert z.shape == (1, 7) and video.shape == (1, 25)


def test_the_loss_of_a_cut_is_that_of_the_cut_alone(road):
    params, recipe = weights.measured_vae(RECIPE, road)
    mean, _ = np.split(params["conv1"]["bias"], 2)
    params["conv1"]["bias"] = np.concatenate([mean, np.full_like(mean, -100.0)])  # the least noise there is, exp(-10)
    video = np.random.default_rng(0).uniform(-1, 1, (2, 9, 16, 16, 3)).astype(np.float32)
    key = jax.random.key(3)
    stage = VAEStageConfig(kl_weight=0.0, crop_frames=2)
    _, metrics = autoencoder.vae_loss(params, video, key, config=recipe.vae, stage=stage)
    noise_key, start_key = jax.random.split(key)
    posterior = vae.encode_moments(params, video, config=recipe.vae)[0]
    drawn = posterior + np.exp(-10) * jax.random.normal(noise_key, posterior.shape)
    latents, shown = autoencoder.random_crop(vae.normalize(drawn, recipe.vae), video, start_key, 2, 4)
    error = np.asarray(vae.decode(params, latents, config=recipe.vae, clamp=False) - shown)
    assert error.shape == (2, 5, 16, 16, 3)
    np.testing.assert_allclose(metrics["l2"], np.mean(error**2), rtol=1e-3)
    np.testing.assert_allclose(metrics["l1"], np.mean(np.abs(error)), rtol=1e-3)


def test_the_last_steps_of_the_vae_train_the_decoder_alone(road, tmp_path):
    """After one step of all and two of the decoder the encoder has the bits of a run that ends with the first step."""
    linked(tmp_path, road, "data/moving_digits")
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 1, "ema_decay": 0.0}
    changes = {"steps": 3, "decoder_from": 1, "crop_frames": 2, "curriculum": (), "optimizer": optimizer}
    recipe = tiny_recipe(train_vae=changes)
    stages.train("vae", recipe, tmp_path)
    trained, _ = store.load_params(tmp_path / "vae" / "weights.safetensors")
    once = tmp_path / "once"
    linked(once, road, "data/moving_digits")
    whole = dataclasses.replace(recipe.train_vae, steps=1)
    stages.train("vae", dataclasses.replace(recipe, train_vae=whole), once)
    params, _ = store.load_params(once / "vae" / "weights.safetensors")
    different = lambda group: any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, group), strict=True))  # noqa: E731
    assert {k for k in params if different((params[k], trained[k]))} == {"decoder", "conv2"}


def test_the_loss_of_the_decoder_alone_is_of_the_whole_clip_and_has_no_gradient_of_the_encoder(road):
    params, recipe = weights.measured_vae(RECIPE, road)
    video = np.random.default_rng(0).uniform(-1, 1, (2, 9, 16, 16, 3)).astype(np.float32)
    cropped = VAEStageConfig(crop_frames=2)
    loss = functools.partial(autoencoder.vae_loss, batch=video, key=jax.random.key(3), config=recipe.vae)
    alone = functools.partial(loss, stage=cropped, decoder_only=True)
    (value, _), gradient = jax.value_and_grad(alone, has_aux=True)(params)
    whole, expected = jax.value_and_grad(functools.partial(loss, stage=VAEStageConfig()), has_aux=True)(params)
    np.testing.assert_array_equal(value, whole[0])
    for group in params:
        is_encoder = group in autoencoder.ENCODER
        wanted = jax.tree.map(np.zeros_like, expected[group]) if is_encoder else expected[group]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), gradient[group], wanted)


def test_the_vae_file_carries_the_statistics_of_its_latents(road):
    params, recipe = weights.measured_vae(RECIPE, road)
    mean, std = recipe.vae.latent_mean, recipe.vae.latent_std
    assert len(mean) == 4 and len(set(std)) == 1 and std[0] > 0


def test_a_student_learns_from_a_causal_teacher(road, tmp_path):
    linked(tmp_path, road, "vae", "causal", "data/latents")
    changes = {"teacher": "causal", "extra_trajectories": ((1, 6),), "curriculum": ((3, 1, 4),)}
    recipe = tiny_recipe(train_init=changes)
    with pytest.raises(ConfigError, match=r"no finished dataset at .*causal_trajectories"):
        stages.train("init", recipe, tmp_path)
    said = prepare.STAGES["trajectories"](recipe, tmp_path).splitlines()
    assert said[0].endswith("causal_trajectories: 4 examples")
    assert said[1].endswith("causal_trajectories_1: 6 examples")
    (tmp_path / "teacher").symlink_to(road / "teacher")
    stages.train("init", recipe, tmp_path)
    assert read_metrics(tmp_path / "init")[0]["noisy_fraction"] == 1


def test_a_student_of_another_size_than_the_teacher(road, tmp_path):
    linked(tmp_path, road, "data", "vae", "teacher")
    recipe = tiny_recipe(student={"dim": 24, "num_layers": 2})
    for name in ("init", "distill"):
        stages.train(name, recipe, tmp_path)
    kernel = store.load_params(tmp_path / "distill" / "weights.safetensors")[0]["blocks"]["ffn"]["fc1"]["kernel"]
    assert kernel.shape == (2, 24, 16)


def test_any_checkpoint_exports_what_a_run_that_ended_there_would_have(road, tmp_path):
    for name in stages.TRAINERS:
        output = tmp_path / f"{name}.safetensors"
        assert export.export_checkpoint(road, name, output) == 5
        assert output.read_bytes() == (road / name / "weights.safetensors").read_bytes()
    assert export.export_checkpoint(road, "distill", tmp_path / "earlier.safetensors", 4) == 4
    earlier, later = (store.load_params(tmp_path / f"{name}.safetensors")[0] for name in ("earlier", "distill"))
    assert store.flatten(earlier).keys() == store.flatten(later).keys()
    assert (earlier["head"]["proj"]["kernel"] != later["head"]["proj"]["kernel"]).any()
    with pytest.raises(ConfigError, match="there is no checkpoint 3 in .*; accepted: 4, 5"):
        export.export_checkpoint(road, "distill", tmp_path / "none.safetensors", 3)


def test_a_checkpoint_holds_networks_optimizers_averages_and_recipe(road):
    folder = road / "distill" / "checkpoints"
    for part in ("student.params", "student.ema", "student.opt", "critic.params", "critic.opt", "step", "history"):
        assert jax.tree.leaves(checkpoint.read(folder, part)[1])
    _, _, progress = checkpoint.read(folder, "step")
    assert progress["step"] == 5
    assert min(progress["iterator"]["iterator"].values()) > 0
    assert json.loads(progress["config"])["train_distill"]["seed"] == 0


def test_a_stage_starts_with_the_weights_of_another_recipe(road, tmp_path, first_state):
    for name, given in (("teacher", road), ("init", road / "distill" / "weights.safetensors")):
        state = first_state(name, RECIPE, linked(tmp_path / name, road, "data", "vae"), given)
        path = road / "teacher" / "weights.safetensors" if given is road else given
        expected = store.load_params(path)[0]
        for tree in (state.network.params, state.network.ema):
            jax.tree.map(np.testing.assert_array_equal, tree, expected)
    state = first_state("distill", RECIPE, linked(tmp_path / "distill", road, "data", "vae", "teacher"), road)
    expected = store.load_params(road / "distill" / "weights.safetensors")[0]
    jax.tree.map(np.testing.assert_array_equal, state.student.params, expected)


def test_weights_to_start_with_that_do_not_fit_are_refused_by_name(road, tmp_path):
    recipe = tiny_recipe(teacher={"ffn_dim": 24})
    with pytest.raises(
        ConfigError, match=r"does not fit the configuration.*misshapen: blocks/ffn/fc1/bias \(1, 16\) instead of"
    ):
        stages.train("teacher", recipe, road, road)
    with pytest.raises(ConfigError, match="holds 0 weights files; accepted: one, or shards with an index"):
        stages.train("teacher", RECIPE, road, tmp_path)
    with pytest.raises(ConfigError, match="does not fit the configuration: none of its tensors is known"):
        stages.train("vae", RECIPE, road, road / "teacher" / "weights.safetensors")


def test_the_tiny_decoder_learns_from_streams_of_the_student(road, tmp_path):
    """The loss of the first step, computed by hand, shows that the stage reads what was written."""
    linked(tmp_path, road, "vae", "distill", "data/moving_digits")
    recipe = tiny_recipe(train_taehv={"rollouts": ((1, 3), (2, 2)), "noise": 0.0})
    with pytest.raises(ConfigError, match=r"no finished dataset at .*streams_1"):
        stages.train("taehv", recipe, tmp_path)
    with pytest.raises(ConfigError, match="train_taehv.rollouts is empty"):
        prepare.STAGES["streams"](RECIPE, tmp_path)
    said = prepare.STAGES["streams"](recipe, tmp_path).splitlines()
    assert [line.split("data/")[1] for line in said] == ["streams_1: 3 examples", "streams_2: 4 examples"]
    stages.train("taehv", recipe, tmp_path, road / "taehv" / "weights.safetensors")
    records = [record for record in read_metrics(tmp_path / "taehv") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    rollouts = [sources.streams(recipe, tmp_path, clips) for clips in (1, 2)]
    batch = next(pipeline.stream_batches(pipeline.Mixture(rollouts, [3, 4]), batch_size=2, frames=0, seed=0))
    assert batch["video"].shape == (2, 9, 16, 16, 3) and batch["latents"].shape == (2, 3, 4, 4, 4)
    params = store.load_params(road / "taehv" / "weights.safetensors")[0]
    shown = taehv.decode(params, batch["latents"], config=recipe.taehv, clamp=False) - batch["video"]
    read = taehv.encode(params, batch["video"], config=recipe.taehv) - batch["latents"]
    expected = np.mean(shown**2) + 0.1 * np.mean(np.abs(shown)) + np.mean(read**2)
    assert records[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["vae", "taehv"])
def test_a_codec_starts_with_the_weights_it_is_given(road, tmp_path, name, first_state):
    workdir = linked(tmp_path / "run", road, "data", *(["vae"] if name == "taehv" else []))
    given = store.load_params(road / name / "weights.safetensors")[0]
    network = first_state(name, RECIPE, workdir, road).network
    for tree in (network.params, network.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, given)
