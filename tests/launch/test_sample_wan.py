"""The sampling program on a checkpoint folder with a UMT5 encoder, as launch.convert writes it: student and teacher."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sample import call, call_all

from causvid_jax import video
from causvid_jax.data import encoder
from causvid_jax.data.prompts import NEGATIVE_PROMPT
from causvid_jax.models import numerics, taehv, transformer, umt5, vae
from causvid_jax.streaming import play
from causvid_jax.weights import stages, store
from causvid_jax.weights import taehv as published
from launch import common

sys.path.append("tests/golden")
import make_umt5

pytest.importorskip("tokenizers", reason="the extra 'text' is not installed")
pytest.importorskip("ftfy", reason="the extra 'text' is not installed")

RECIPE = f"""
NETWORK = dict(dim=32, ffn_dim=48, num_heads=2, num_layers=1, in_channels=4, out_channels=4, text_dim=16,
               text_length=32, freq_dim=16, dtype="bfloat16")


def get_config():
    return dict(
        name="tiny_wan",
        video=dict(height=32, width=32, frames=13, fps=16),
        text=dict(kind="umt5", length=32, dim=16, negative="word word"),
        umt5=dict(**{make_umt5.SIZES!r}, dtype="bfloat16"),
        vae=dict(base_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1, z_dim=4),
        taehv=dict(z_dim=4, encoder_dim=4, decoder_dims=(8, 6, 4, 4), blocks=1),
        teacher=NETWORK, student=NETWORK,
        causal=dict(frames_per_block=2),
        diffusion=dict(shift=8.0, teacher_steps=3, guidance=5.0),
    )
"""
PROMPT = "--prompt=warm neon"


def random_tree(abstract, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint folder: every component, TAEHV as published."""
    folder = tmp_path_factory.mktemp("wan")
    (folder / "tiny.py").write_text(RECIPE)
    recipe = common.load_recipe_file(str(folder / "tiny.py"))
    trees = {
        "text_encoder": umt5.init(jax.random.key(0), recipe.umt5),
        "teacher": random_tree(transformer.abstract(recipe.teacher), 1),
        "distill": random_tree(transformer.abstract(recipe.student), 2),
        "vae": random_tree(vae.abstract(recipe.vae), 3),
    }
    for stage, tree in trees.items():
        metadata = stages.vae_metadata(recipe.vae) if stage == "vae" else {}
        store.save_params(stages.stage_path(folder, stage), tree, metadata, dtype="bfloat16")
    tiny = published.to_published(random_tree(taehv.abstract(recipe.taehv), 4), recipe.taehv)
    store.files.write_safetensors(
        folder / "taew2_1.safetensors",
        {name: (value.shape, value.dtype) for name, value in tiny.items()},
        lambda name: (tiny[name],),
        {"format": "pt"},
        checksum=False,
    )
    (folder / "text_encoder" / "tokenizer.json").write_text(make_umt5.small_tokenizer(), encoding="utf-8")
    return folder


def test_student_and_teacher_from_a_checkpoint_folder(place):
    student = [PROMPT, "--switch=6:neon", f"--output={place}/student.gif", "--upscale=1"]
    teacher = [PROMPT, "--teacher", "--exact", "--config.diffusion.solver=unipc", f"--output={place}/teacher.mp4"]
    tiny = [PROMPT, "--frames=13", "--exact", "--config.decoder=taehv", f"--output={place}/tiny.gif"]
    first, second, third = call(place, student, teacher, tiny)
    assert "1. encode the prompts" in first and "2. stream" in first and "13 frames in" in first
    # The teacher's unconditional branch is the recipe's negative prompt, which no one has encoded before.
    assert "1. encode the prompts" in second and "3. decode" in second
    assert "1. stream" in third and "TAEHV" in third and "VAE " not in third
    assert len(list((place / "prompts").rglob("*.safetensors"))) == 3
    assert len(video.read_video(place / "teacher.mp4", 32, 32)) == 13
    assert video.read_video(place / "tiny.gif", 32, 32).std() > 1

    # The same stream by hand, on float32 parameters.
    recipe = common.load_recipe_file(str(place / "tiny.py"))
    reader = encoder.open_encoder(recipe, place, compute=False)
    rows = {p: encoder.encode(reader, [p]) for p in ("warm neon", "neon")}
    params = {"student": stages.load_transformer(stages.stage_path(place, "distill"), recipe.student, "student")}
    params["vae"], _ = stages.load_vae(stages.stage_path(place, "vae"), recipe.vae)
    params = jax.tree.map(jnp.asarray, params)
    made = play.play(params, rows["warm neon"], config=recipe, frames=13, switches={1: rows["neon"]})
    video.write_video(place / "expected.gif", np.concatenate(list(made), axis=1)[0], 16)
    a, b, other = (video.read_video(place / f"{x}.gif", 32, 32).astype(int) for x in ("student", "expected", "tiny"))
    # Rounding may move a pixel to its neighbour in the file's palette.
    assert a.shape == b.shape and np.abs(a - b).mean() <= 1 < np.abs(a - other).mean()


def test_what_is_missing_is_named(place, tmp_path):
    cases = [
        ([PROMPT, f"--checkpoint={tmp_path}"], "text_encoder/weights.safetensors does not exist"),
        ([PROMPT, f"--checkpoint={tmp_path}", f"--text_encoder={place}"], "distill/weights.safetensors does not exist"),
        ([PROMPT, f"--tokenizer={tmp_path}/none.json"], "tokenizer file"),
        ([PROMPT, "--config.umt5.num_layers=9"], "text encoder weights"),
        ([PROMPT, "--config.decoder=taehv", "--config.taehv.blocks=3"], "TAEHV weights do not fit"),
    ]
    results = call_all(place, [given for given, _ in cases], compute=False)
    for (given, words), result in zip(cases, results, strict=True):
        assert result["error"] is not None and words in result["error"], (given, result)


def test_the_published_recipe_has_the_published_negative_prompt_and_columns():
    recipe = common.load_recipe_file(str(pathlib.Path(__file__).parents[2] / "configs" / "wan_1_3b.py"))
    assert recipe.text.negative == NEGATIVE_PROMPT
    teacher, student = numerics.exact(recipe, True), numerics.exact(recipe, False)
    assert (teacher.teacher.numerics, student.student.numerics) == ("wan", "causvid")
    assert (teacher.vae.dtype, student.vae.dtype) == ("float32", "bfloat16")
