"""Where weights are found: stages, published folders, the package; and what is loaded for a stage."""

import dataclasses

import jax
import numpy as np
import pytest

from causvid_jax.checkpoints import load, open_checkpoint, store, workdir
from causvid_jax.config import CLIPConfig, ConfigError
from tests.checkpoints.tiny_files import TINY, arrays, assert_states, published
from tests.tiny import RECIPE, changed, random_transformer


def test_publishing_copies_three_stages_in_half_precision_and_needs_all_of_them(tmp_path):
    for stage in ("vae", "teacher"):
        store.save_params(workdir.stage_path(tmp_path / "run", stage), {"a": np.float32([0.1, 2.0])}, {"stage": stage})
    with pytest.raises(ConfigError, match="distill/weights.safetensors does not exist"):
        workdir.publish("mine", tmp_path / "run", tmp_path / "assets")
    assert not (tmp_path / "assets").exists()
    store.save_params(workdir.stage_path(tmp_path / "run", "distill"), {"a": np.float32([0.3])}, {"stage": "distill"})
    written = workdir.publish("mine", tmp_path / "run", tmp_path / "assets")
    assert [path.relative_to(tmp_path / "assets").as_posix() for path in written] == [
        "mine/vae.safetensors",
        "mine/teacher.safetensors",
        "mine/distill.safetensors",
    ]
    # The tiny codec goes along where it was trained, and is found among the package's weights.
    store.save_params(workdir.stage_path(tmp_path / "run", "taehv"), {"a": np.float32([0.5])}, {"stage": "taehv"})
    # So is the record of the road.
    (tmp_path / "run" / workdir.ROAD_RECORD).write_text("{}")
    assert [path.name for path in workdir.publish("mine", tmp_path / "run", tmp_path / "assets")] == [
        "vae.safetensors", "taehv.safetensors", "teacher.safetensors", "distill.safetensors", "road.json",
    ]  # fmt: skip
    assert (tmp_path / "assets" / "mine" / "road.json").read_text() == "{}"
    params, metadata = store.load_params(written[0], dtype=None)
    assert params["a"].dtype == np.float16 and metadata["stage"] == "vae"
    np.testing.assert_array_equal(params["a"], np.float16([0.1, 2.0]))


@pytest.fixture
def pipeline(tmp_path, save):
    """Return a folder with the teacher, VAE and tiny codec of the tiny recipe as published, and their parameters."""
    folder, params = tmp_path / "published", {}
    for name, config, path in (
        ("teacher", RECIPE.teacher, "diffusion_pytorch_model.safetensors"),
        ("vae", dataclasses.replace(RECIPE.vae, latent_mean=(), latent_std=()), "Wan2.1_VAE.safetensors"),
        ("taehv", RECIPE.taehv, "taew2_1.safetensors"),
    ):
        params[name], state = published(config, "original")
        save(folder / path, state)
    return folder, params


def test_a_published_folder_serves_a_recipe_as_it_is(tmp_path, save, pipeline):
    folder, params = pipeline
    for stage in ("teacher", "causal", "vae", "taehv"):
        loaded, _ = workdir.load_stage(RECIPE, stage, folder)
        jax.tree.map(np.testing.assert_array_equal, loaded, params["teacher" if stage == "causal" else stage])
    decoders, _ = workdir.load_decoders(dataclasses.replace(RECIPE, decoder="taehv"), folder)
    assert decoders.keys() == {"vae", "taehv"}
    # A base transformer is no student, unless it is named.
    with pytest.raises(ConfigError, match="comes with no trained distill; train it with causvid train --stage=distill"):
        workdir.open_stage(dataclasses.replace(RECIPE, name="mine"), "distill", folder)
    assert workdir.resolve(folder, "init") == folder / "diffusion_pytorch_model.safetensors"
    # What a working directory has of its own goes first.
    own = random_transformer(RECIPE.teacher, 9)
    store.save_params(workdir.stage_path(folder, "teacher"), own, {"stage": "teacher"})
    np.testing.assert_array_equal(
        workdir.load_stage(RECIPE, "teacher", folder)[0]["head"]["modulation"], own["head"]["modulation"]
    )
    with pytest.raises(ConfigError, match="holds the weights of the stage 'teacher', not of a student"):
        workdir.open_stage(RECIPE, "distill", path=workdir.stage_path(folder, "teacher"))
    with pytest.raises(ConfigError, match="does not fit the configuration; the closest is transformer of"):
        workdir.open_stage(changed(RECIPE, teacher={"num_layers": 5}), "teacher", folder)


def test_folders_of_components(tmp_path, save, states, vae_states):
    original, pipeline = tmp_path / "original", tmp_path / "pipeline"
    save(original / "diffusion_pytorch_model.safetensors", states["original"])
    save(original / "Wan2.1_VAE.safetensors", vae_states["original"])
    (original / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
    (original / "config.json").write_text('{"num_heads": 2}')
    found = workdir.components(original)
    assert {name: place.name for name, place in found.items()} == {
        "transformer": "diffusion_pytorch_model.safetensors",
        "vae": "Wan2.1_VAE.safetensors",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    }
    transformer, vae = (open_checkpoint(found[name], num_heads=2) for name in ("transformer", "vae"))
    assert_states(arrays(transformer.source), states["original"])
    assert_states(arrays(vae.source), vae_states["original"])
    assert transformer.source.config == {"num_heads": 2} and vae.source.config == {}
    save(pipeline / "transformer" / "diffusion_pytorch_model.safetensors", states["diffusers"])
    save(pipeline / "vae" / "diffusion_pytorch_model.safetensors", vae_states["diffusers"])
    (pipeline / "scheduler").mkdir()
    assert workdir.components(pipeline) == {name: pipeline / name for name in ("transformer", "vae")}
    assert workdir.components(pipeline / "vae") == workdir.components(pipeline / "vae" / "none") == {}


def test_split_files_and_a_second_expert(tmp_path, save, states, vae_states):
    files = tmp_path / "comfy" / "split_files"
    save(files / "diffusion_models" / "wan2.1_t2v.safetensors", states["original"])
    save(files / "vae" / "wan_2.1_vae.safetensors", vae_states["original"])
    (files / "text_encoders").mkdir()
    (files / "text_encoders" / "umt5_xxl_fp16.safetensors").write_bytes(b"")
    inside = workdir.components(tmp_path / "comfy")
    assert {name: path.name for name, path in inside.items()} == {
        "transformer": "diffusion_models",
        "vae": "vae",
        "text_encoder": "text_encoders",
    }
    assert_states(arrays(open_checkpoint(inside["transformer"], num_heads=2).source), states["original"])
    for name in ("transformer", "transformer_2"):
        save(tmp_path / "wan22" / name / "diffusion_pytorch_model.safetensors", states["diffusers"])
    (sentence,) = workdir.left_out(tmp_path / "wan22")
    assert sentence.startswith("transformer_2: ") and "two experts, which are converted one at a time" in sentence
    assert workdir.left_out(tmp_path / "comfy") == []
    save(files / "model_patches" / "control.safetensors", states["original"])
    assert workdir.left_out(tmp_path / "comfy") == [
        f"{files} also holds weights in model_patches, which no network of this version reads"
    ]


def test_what_is_used_in_part_is_said_or_refused(tmp_path, save, caplog):
    """Two experts in three layouts, weights that nothing reads, and averages beside raw weights."""
    recipe = dataclasses.replace(RECIPE, name="mine")
    _, state = published(recipe.teacher, "original")
    _, coder = published(dataclasses.replace(RECIPE.vae, latent_mean=(), latent_std=()), "original")
    for names in (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")):
        folder = tmp_path / names[0]
        for name in names:
            save(folder / name / "diffusion_pytorch_model.safetensors", state)
        save(folder / "vae" / "Wan2.1_VAE.safetensors", coder)
        for stage in ("teacher", "causal"):
            with pytest.raises(ConfigError, match=f"holds two experts, {names[0]} and {names[1]}, and the recipe has"):
                workdir.open_stage(recipe, stage, folder)
        with pytest.raises(ConfigError, match="holds two experts"):
            workdir.resolve(folder, "init")
        with pytest.raises(ConfigError, match=f"holds 0 weights files and weights in {names[0]}, {names[1]}"):
            open_checkpoint(folder)
        assert workdir.open_stage(recipe, "teacher", path=folder / names[1]).format == "original"
        workdir.open_stage(recipe, "vae", folder)
    for noise in ("high", "low"):
        save(tmp_path / "comfy" / "diffusion_models" / f"wan2.2_t2v_{noise}_noise_14B_fp16.safetensors", state)
    with pytest.raises(ConfigError, match="holds 2 weights files .wan2.2_t2v_high_noise_14B_fp16.safetensors, wan2.2_"):
        workdir.open_stage(recipe, "teacher", tmp_path / "comfy")
    assert caplog.messages == []

    save(folder / "controlnet" / "model.safetensors", state)
    for _ in range(2):
        workdir.open_stage(recipe, "vae", folder)
    assert caplog.messages == [f"{folder} also holds weights in controlnet, which no network of this version reads"]
    for average, raw in (("model_ema", "model."), ("ema", "")):
        both = {raw + name: x for name, x in state.items()} | {f"{average}.{name}": x for name, x in state.items()}
        path = save(tmp_path / f"{average}.safetensors", both)
        opened = workdir.open_stage(recipe, "teacher", path=path)
        assert opened.source.part == average and f"part {average!r} of '', {average!r}" in str(opened)
        assert caplog.messages[-1] == f"{path}: uses part {average!r} of '', {average!r}"


def test_the_image_encoder_must_fit_the_teacher(tmp_path, save):
    config = CLIPConfig(image_size=8, patch_size=4, dim=80, ffn_dim=6, num_heads=1, num_layers=2, projection_dim=3)
    params, state = published(config, "original")
    save(tmp_path / "models_clip_open-clip.safetensors", state)
    teacher = dataclasses.replace(TINY, image_dim=80, image_tokens=5)
    jax.tree.map(np.testing.assert_array_equal, load(workdir.open_image_encoder(tmp_path, teacher))[0], params)
    with pytest.raises(ConfigError, match="gives 5 embeddings of width 80; the teacher reads 257 of 1280"):
        workdir.open_image_encoder(tmp_path, dataclasses.replace(TINY, image_dim=1280))
