"""Weights and datasets are compared with the VAE and the networks that they were made with."""

import dataclasses
import json

import pytest

from causvid_jax.checkpoints import lineage, open_checkpoint, store, wan_vae, workdir
from causvid_jax.config import ConfigError, to_json
from causvid_jax.data import arrays, generate, sources
from causvid_jax.sampling import weights
from tests import tiny
from tests.checkpoints.tiny_files import published
from tests.tiny import RECIPE, random_transformer, tiny_workdir

MEASURED = dataclasses.replace(RECIPE.vae, latent_mean=(0.5, 1, 2, 3.0), latent_std=(1, 2, 3, 4.0))


@pytest.fixture
def folder(tmp_path):
    return tiny_workdir(tmp_path / "run")


def save_vae(folder, seed, config=RECIPE.vae):
    params = tiny.random_params(tiny.vae.abstract(config), seed)
    metadata = wan_vae.metadata(config) if config.latent_mean else {}
    store.save_params(workdir.stage_path(folder, "vae"), params, metadata)
    return params


def test_a_digest_is_that_of_the_loaded_parameters_in_every_format(folder, save):
    params, state = published(RECIPE.teacher, "diffusers")
    save(folder / "published.safetensors", state)
    opened = open_checkpoint(folder / "published.safetensors", RECIPE.teacher)
    assert lineage.weights_digest(opened) == generate.weights_digest(params)
    own = workdir.open_stage(RECIPE, "distill", folder)
    assert lineage.weights_digest(own) == generate.weights_digest(random_transformer(RECIPE.student, 3, 0.05))


def test_a_student_runs_with_its_own_vae_alone(folder):
    """Statistics decide; where they are not measured, digests do."""
    vae, student = (workdir.stage_path(folder, stage) for stage in ("vae", "distill"))
    params = random_transformer(RECIPE.student, 3)
    for config, metadata in (
        (MEASURED, {"config": to_json(dataclasses.replace(RECIPE, vae=MEASURED))}),
        (RECIPE.vae, {"vae": generate.weights_digest(save_vae(folder, 1)), "config": to_json(RECIPE)}),
    ):
        save_vae(folder, 1, config)
        store.save_params(student, params, {"stage": "distill", **metadata})
        assert weights.find(RECIPE, "student", str(folder))[1].vae == config
        moved = dataclasses.replace(config, latent_mean=(0.6, 1, 2, 3.0)) if config.latent_mean else config
        save_vae(folder, 2, moved)
        with pytest.raises(ConfigError, match=f"{student} was trained on the latents of another VAE than {vae}; give"):
            weights.find(RECIPE, "student", str(folder))
    # The decoder may be trained on and the file may be rounded: neither changes a latent.
    store.save_params(student, params, {"config": to_json(dataclasses.replace(RECIPE, vae=MEASURED))})
    store.save_params(vae, save_vae(folder, 5, MEASURED), wan_vae.metadata(MEASURED), dtype="float16")
    weights.find(RECIPE, "student", str(folder))
    store.save_params(student, params, {})  # says nothing
    weights.find(RECIPE, "student", str(folder))


@pytest.mark.parametrize("key, stage", [("vae", "vae"), ("teacher", "teacher")])
def test_a_dataset_is_read_with_the_weights_that_made_it(folder, key, stage):
    name = {"vae": "latents", "teacher": "trajectories"}[key]
    path, read = folder / "data" / name, {"vae": sources.latents, "teacher": sources.trajectories}[key]
    digest = lineage.weights_digest(workdir.open_stage(RECIPE, stage, folder))
    stored = {"name": name, key: digest, "diffusion": to_json(RECIPE.diffusion), "config": to_json(RECIPE.vae)}
    (path / arrays.IDENTITY).write_text(json.dumps(stored))
    assert len(read(RECIPE, folder)) == 24
    if key == "teacher":
        other = tiny.tiny_recipe(diffusion={"shift": 5.0})
        with pytest.raises(ConfigError, match="diffusion.shift 3.0, and the recipe has 5.0; remove .* and run causvid"):
            read(other, folder)
        store.save_params(workdir.stage_path(folder, stage), random_transformer(RECIPE.teacher, 9), {})
    else:
        save_vae(folder, 9)
    sentence = (
        f"{path} was made with another {key} than {workdir.stage_path(folder, stage)}; remove {path} and run "
        f"causvid prepare --stage={name}"
    )
    with pytest.raises(ConfigError) as error:
        read(RECIPE, folder)
    assert str(error.value) == sentence
    (path / arrays.IDENTITY).write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        read(RECIPE, folder)


def test_a_stage_that_has_not_ended_is_not_replaced_by_the_package(tmp_path, caplog):
    (tmp_path / "vae").mkdir()
    assert workdir.is_packaged(workdir.find("digits", "vae", tmp_path))
    assert f"{tmp_path} holds no vae; the one of the package is used" in caplog.text
    (tmp_path / "vae" / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="the stage 'vae' in .* has not ended; end it with causvid train --stage=vae"):
        workdir.find("digits", "vae", tmp_path)


def test_a_published_window_counts_the_sink(folder, save):
    _, state = published(RECIPE.student, "original")
    student = save(folder / "student" / "model.safetensors", state)
    options = {"files": {"student": student}}
    for size, sink, window in ((4, 2, 2), (3, 0, 3), (-1, 0, 2)):
        (folder / "student" / "config.json").write_text(
            json.dumps({"num_heads": 2, "local_attn_size": size, "sink_size": sink})
        )
        fits = tiny.tiny_recipe(causal={"window": window, "sink": sink})
        weights.find(fits, "student", str(folder), **options)
        if size > 0:
            wrong = tiny.tiny_recipe(causal={"window": size, "sink": sink + 1})
            with pytest.raises(ConfigError, match=f"which is causal.window {window} and causal.sink {sink};"):
                weights.find(wrong, "student", str(folder), **options)
