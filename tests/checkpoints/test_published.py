"""Published models: every row of the table is a recipe, and files in the published layouts become frames."""

import dataclasses
import json

import numpy as np
import pytest

import causvid_jax as cv
from causvid_jax.checkpoints import open_checkpoint, state_dict
from causvid_jax.cli import common
from causvid_jax.config import ConfigError, from_config_dict, published
from causvid_jax.config.recipes import load_recipe
from causvid_jax.diffusion import flow
from causvid_jax.models import transformer, vae
from causvid_jax.sampling import player
from causvid_jax.sampling.request import SampleRequest
from tests.tiny import random_params

NETWORK = {
    "dim": 24,
    "ffn_dim": 32,
    "num_heads": 2,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "text_length": 3,
    "freq_dim": 8,
    "dtype": "float32",
}
READABLE = [model for model in published.MODELS if model.readable]


def tiny_recipe(name):
    """Return the recipe of a published model with its settings and tiny networks."""
    values = dataclasses.asdict(load_recipe(f"published:{name}"))
    values["video"] |= {"height": 32, "width": 32}
    values["text"] = {"kind": "words", "vocabulary": tuple("abcdefg"), "length": 3, "dim": 10}
    values["vae"] = {"base_dim": 4, "dim_mult": (1, 1, 1, 1), "num_res_blocks": 1, "z_dim": 4}
    if published.get(name).network == "5b":
        values["video"] |= {"height": 64, "width": 64}
        values["vae"] |= {"decoder_base_dim": 4, "patch_size": 2, "is_residual": True}
    for role in ("teacher", "student"):
        values[role] |= NETWORK
    return from_config_dict(values)


@pytest.mark.parametrize("model", READABLE, ids=lambda model: model.name)
def test_every_row_is_a_recipe_with_its_settings_and_is_found_by_its_file(model):
    recipe = load_recipe(f"published:{model.name}")
    assert recipe.name == f"published:{model.name}" and not published.differences(model, recipe)
    assert recipe.student.dim == {"1.3b": 1536, "14b": 5120, "5b": 3072}[model.network]
    found = published.find(f"/data/{model.files[0][0]}")
    assert found is None or found.files[0] == model.files[0]
    assert found or model.kind == "teacher"
    if found == model:
        request = {"student": model.files[0][0]}
        assert SampleRequest.config_of(request) == recipe.name


def test_settings_are_those_of_the_publications():
    """Numbers of the published configs, written down here a second time."""
    recipe = {model.name: load_recipe(f"published:{model.name}") for model in READABLE}
    steps = {name: flow.student_timesteps(r.diffusion) for name, r in recipe.items()}
    np.testing.assert_allclose(steps["self_forcing_dmd"], [1000, 937.5, 833.333, 625], atol=1e-3)
    np.testing.assert_allclose(steps["causvid_autoregressive"], [1000, 757, 522])
    np.testing.assert_allclose(steps["causvid_autoregressive_4step"], [1000, 960, 888.889, 727.273], atol=1e-3)
    np.testing.assert_allclose(steps["causal_rcm_c3_4step"], [1600e3 / 1601, 937.5, 833.333, 625], atol=1e-3)
    np.testing.assert_allclose(steps["causal_rcm_c1_2step"], [999.375, 833.333], atol=1e-3)
    np.testing.assert_allclose(steps["causal_forcing_2step"], [1000, 833.333], atol=1e-3)
    first = flow.first_block_timesteps(recipe["causal_forcing_1step"].diffusion)
    assert (len(steps["causal_forcing_1step"]), [len(block) for block in first]) == (1, [4])
    causal = recipe["longlive"].causal
    assert (causal.window + causal.sink, causal.sink, causal.positions) == (12, 3, "absolute")
    causal = recipe["sgf_frame"].causal
    assert (causal.frames_per_block, causal.sink + causal.window, causal.positions) == (1, 4 + 16 + 1, "relative")
    assert (recipe["krea_14b"].causal.window, recipe["krea_14b"].student.num_layers) == (6, 40)
    causal = recipe["rolling_forcing"].causal
    assert (causal.sink + causal.window, causal.sink, recipe["rolling_forcing"].rolling_blocks) == (21, 3, 5)
    np.testing.assert_allclose(steps["rolling_forcing"], [1000, 952.381, 882.353, 769.231, 555.556], atol=1e-3)
    assert recipe["wan22_ti2v_5b"].latent_shape == (31, 44, 80, 48)
    assert recipe["longlive2_5b"].causal.block_sizes(32) == (8, 8, 8, 8)


def published_layout(state, layout):
    """Return a state dict as ``layout`` stores it."""
    if layout == "rcm":
        state = {f"net.{name}": value for name, value in state.items()}
        kernel = state["net.patch_embedding.weight"]
        state["net.patch_embedding.weight"] = kernel.reshape(len(kernel), -1)
        return state | {"net.accum_video_sample_counter": np.zeros(1, np.float32)}
    other = {f"critic.model.{name}": np.zeros_like(value) for name, value in state.items()}
    both = {} if layout == "model." else other
    return both | {f"{layout}{name}": value for name, value in state.items()}


LAYOUTS = {
    "self_forcing_dmd": "generator_ema.model.",
    "causvid_autoregressive": "generator.model.",
    "causvid_bidirectional": "generator.model.",
    "causal_forcing_2step": "generator_ema.model._fsdp_wrapped_module.",
    "causal_rcm_c1_2step": "rcm",
    "sgf_chunk": "generator_ema.model.",
    "krea_14b": "model.",
    "rolling_forcing": "generator_ema.model.",
    "longlive2_5b": "generator.model.",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_in_the_published_layout_becomes_frames(name, tmp_path, save):
    recipe, model = tiny_recipe(name), published.get(name)
    params = random_params(transformer.abstract(recipe.student), 1)
    state = published_layout(state_dict(params, recipe.student, "original"), LAYOUTS[name])
    file = save((tmp_path / model.files[0][0]).with_suffix(".safetensors"), state)
    assert published.find(file).files == model.files
    opened = open_checkpoint(file, recipe.student)
    assert opened.format == "original" and opened.ignored == (LAYOUTS[name] == "rcm")
    codec = save(
        tmp_path / "vae.safetensors", state_dict(random_params(vae.abstract(recipe.vae), 2), recipe.vae, "original")
    )
    pipe = cv.load(recipe, student=file, vae=codec)
    kernel = np.asarray(pipe.params["student"]["blocks"][1]["ffn"]["fc1"]["kernel"])
    np.testing.assert_array_equal(kernel, params["blocks"]["ffn"]["fc1"]["kernel"][1])
    np.testing.assert_array_equal(
        pipe.params["student"]["patch_embedding"]["kernel"], params["patch_embedding"]["kernel"]
    )
    length = 1 + 4 * (2 * recipe.causal.frames_per_block - 1)
    if recipe.rolling_blocks:
        parts = list(player.play(pipe.params, pipe.encode_prompt("a b"), config=pipe.config, frames=length))
    else:
        parts = [part for part, _ in pipe.frames(pipe.stream("a b", seed=0), blocks=2)]
    assert all(part.dtype == np.uint8 and part.std() > 0 for part in parts)
    assert sum(part.shape[1] for part in parts) == length


def test_authors_part_and_differing_settings(tmp_path, save, tiny, params, caplog):
    """LongLive's authors sample ``generator``, others the average; a recipe with other settings is told so."""
    state = state_dict(params, tiny, "original")
    both = {f"{part}.model.{name}": value for part in ("generator", "generator_ema") for name, value in state.items()}
    for file, part in (("longlive_base", "generator"), ("self_forcing_dmd", "generator_ema")):
        assert open_checkpoint(save(tmp_path / f"{file}.safetensors", both), tiny).source.part == part
    recipe = load_recipe("wan_1_3b")
    assert published.differences(published.get("self_forcing_dmd"), recipe) == [
        "causal.window 21 (the recipe has 0)",
        "diffusion.shift 5.0 (the recipe has 8.0)",
    ]


def test_names_that_several_files_share_need_their_folder():
    assert published.find("model.pt") is None and published.find("causal_forcing.pt") is None
    assert published.find("x/autoregressive_checkpoint/model.pt").name == "causvid_autoregressive"
    assert published.find("framewise/causal_forcing.safetensors").name == "causal_forcing_frame"
    assert published.find("student.safetensors") is None
    with pytest.raises(ConfigError, match="no published model is called 'self_forcing_dmt'; did you mean"):
        load_recipe("published:self_forcing_dmt")
    with pytest.raises(ConfigError, match="AnyFlow-FAR.* cannot be sampled by this version"):
        load_recipe("published:anyflow_far")


def test_the_program_prints_the_table(capsys):
    common.call("models", ["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [model.name for model in published.MODELS]
    assert all(row["licence"] and row["known_from"] and row["not_known"] for row in rows)
    files = [file for row in rows for file in row["files"]]
    assert all(file["file"] and (file["bytes"] is None or file["bytes"] > 10**8) for file in files)
    assert all(bool(row["settings"]) == (row["config"] is not None) and row["repository"] for row in rows)
    common.call("models", [])
    text = capsys.readouterr().out
    assert text.count("size not known") == sum(file["bytes"] is None for file in files)
    assert text.count("settings: not known") == 1 and "rolling_blocks=5" in text  # AnyFlow-FAR is not sampled
    common.call("models", ["--name=longlive"])
    text = capsys.readouterr().out
    assert "models/lora.pt (2.80 GB)" in text and "causal.window=9 causal.sink=3" in text
    with pytest.raises(ConfigError, match="no published model"):
        common.call("models", ["--name=nothing"])
