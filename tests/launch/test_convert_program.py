"""The conversion program: what it writes and says, and the one sentence for what it cannot do."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from causvid_jax.config import TransformerConfig, VAEConfig
from causvid_jax.models import transformer, vae
from causvid_jax.weights import layouts, sources, stages, store, wan_transformer, wan_vae

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=3, in_channels=4, out_channels=4, text_dim=10, freq_dim=8
)
CODER = VAEConfig(base_dim=4, z_dim=2)
# Another test process may have imported another program, whose flags have the same names.
DRIVER = """
import contextlib, io, json, sys

from absl import flags
from causvid_jax.config import ConfigError
from launch import common, convert

results = []
for arguments in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()["launch.convert"]:
        flag.unparse()
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            common._parse_flags(["convert", *arguments])
            convert.main()
        except ConfigError as caught:
            error = str(caught)
    results.append({"printed": printed.getvalue(), "error": error})
print(json.dumps(results))
"""
UPDATE = {
    "blocks.0.ffn.2.lora_A.weight": np.ones((1, 40), np.float32),
    "blocks.0.ffn.2.lora_B.weight": np.ones((24, 1), np.float32),
}
GOOD = {
    "dry": ["--input=wan", "--output=never", "--dry_run"],
    "run": ["--input=wan", "--output=run"],
    "original": ["--input=wan", "--output=original", "--to=original"],
    "diffusers": ["--input=wan", "--output=diffusers", "--to=diffusers"],
    "vae": ["--input=diffusers", "--output=coder.safetensors", "--component=vae"],
    "student": ["--input=student.safetensors", "--output=student", "--lora=lora.safetensors:0.5", "--num_heads=2"],
    "layers": [
        *("--input=student.safetensors", "--output=layers.safetensors", "--num_heads=2"),
        *("--lora=lora.safetensors", "--lora_layers=1-2", "--dtype=bfloat16", "--part=generator"),
    ],
}
W = "--input=w.safetensors"
BAD = [
    ([], "no --input is given"),
    (["--input=x"], "no --output is given"),
    (["--input=nowhere", "--output=y"], "nowhere does not exist"),
    (["--input=wan", "--output=y.safetensors"], "--output is the file y.safetensors, but the input holds transformer,"),
    ([W, "--output=y.pth", "--num_heads=2"], "--output is 'y.pth', a pickle; accepted: a .safetensors file, a folder"),
    ([W, "--output=y", "--to=onnx"], "--to is 'onnx'; accepted: original, diffusers, causvid_jax"),
    ([W, "--output=y", "--dtype=int8"], "storage type is 'int8'; accepted: float32"),
    ([W, "--output=y"], "does not tell the number of heads"),
    ([W, "--output=y", "--lora=no.safetensors:2"], "no.safetensors does not exist; accepted: FILE or FILE:STRENGTH"),
    ([W, "--output=y", "--lora_layers=1-x"], "--lora_layers is '1-x'; accepted: numbers and ranges, as 0-9,20"),
    ([W, "--output=y", "--stage=vae"], "--stage is 'vae'; accepted: teacher, init, distill"),
    ([W, "--output=y", "--component=clip"], "--component is 'clip'; accepted: transformer, vae"),
    ([W, "--output=wan", "--num_heads=2"], "wan exists and is not empty"),
    (["--input=student.safetensors", "--output=y", "--part=critic"], "has no part 'critic'; accepted: 'generator'"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, results by name, errors in order), after one process that served every request."""
    folder = tmp_path_factory.mktemp("convert")
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    params, coder = (jax.tree.map(draw, tree) for tree in (transformer.abstract(CONFIG), vae.abstract(CODER)))
    (folder / "wan").mkdir()
    state = dict(wan_transformer.to_published(params, CONFIG))
    save = safetensors.numpy.save_file
    save(state, folder / "wan" / "diffusion_pytorch_model.safetensors")
    save(wan_vae.to_original(coder, CODER), folder / "wan" / "Wan2.1_VAE.safetensors")
    (folder / "wan" / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
    (folder / "wan" / "config.json").write_text('{"num_heads": 2, "dim": 24}')
    save(state, folder / "w.safetensors")
    save({f"generator.model.{name}": value for name, value in state.items()}, folder / "student.safetensors")
    save(UPDATE, folder / "lora.safetensors")
    requests = [*GOOD.values(), *(arguments for arguments, _ in BAD)]
    process = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(requests),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    return folder, params, coder, dict(zip(GOOD, results, strict=False)), results[len(GOOD) :]


def states_of(place):
    out = {}
    for name, tensor in sources.open_source(place).tensors.items():
        with tensor.view() as view:
            out[name] = np.array(view)
    return out


def same(have, want):
    assert have.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(have[name], value)


def test_an_original_folder_becomes_a_working_directory(done):
    folder, params, coder, results, _ = done
    assert [r["error"] for r in results.values()] == [None] * len(GOOD)
    said = results["dry"]["printed"]
    assert "Left out: text_encoder" in said and said.endswith("Nothing is written (--dry_run).\n")
    assert "wan/diffusion_pytorch_model.safetensors: transformer of 3 layers, width 24, 2 heads, 4 channels, " in said
    assert "27,352 parameters, float32, 109.41 kB -> causvid_jax names, float32, 109.41 kB; about 32 MiB" in said
    assert not (folder / "never").exists()
    teacher = stages.load_transformer(stages.stage_path(folder / "run", "teacher"), CONFIG, "teacher")
    jax.tree.map(np.testing.assert_array_equal, teacher, params)
    loaded, _ = stages.load_vae(stages.stage_path(folder / "run", "vae"), CODER)
    jax.tree.map(np.testing.assert_array_equal, loaded, coder)
    assert "100 %" in results["run"]["printed"] and results["run"]["printed"].endswith("Wrote run\n")


def test_published_folders(done):
    folder, params, coder, _, _ = done
    found = sources.components(folder / "original")
    assert found["transformer"] == folder / "original" and found["vae"].name == "Wan2.1_VAE.safetensors"
    same(states_of(found["transformer"]), wan_transformer.to_published(params, CONFIG, "original"))
    same(states_of(found["vae"]), wan_vae.to_original(coder, CODER))
    assert json.loads((folder / "original" / "config.json").read_text())["_class_name"] == "WanModel"
    found = sources.components(folder / "diffusers")
    same(states_of(found["transformer"]), wan_transformer.to_published(params, CONFIG, "diffusers"))
    same(states_of(found["vae"]), wan_vae.to_diffusers(coder, CODER))
    match = layouts.detect(sources.open_source(folder / "coder.safetensors"))
    assert (match.network, match.naming) == (layouts.VAE, "causvid_jax")


def test_a_student_with_a_lora(done):
    folder, params, _, results, _ = done
    assert ", without model.: " in results["student"]["printed"]
    assert ", plus 0.5 x lora.safetensors" in results["student"]["printed"]
    student = stages.load_transformer(stages.stage_path(folder / "student", "distill"), CONFIG, "student")
    kernel = params["blocks"]["ffn"]["fc2"]["kernel"]
    np.testing.assert_allclose(student["blocks"]["ffn"]["fc2"]["kernel"][0], kernel[0] + 0.5, atol=1e-6)
    # Layer 0, the only one the LoRA has, is not among the chosen ones.
    untouched, _ = store.load_params(folder / "layers.safetensors", dtype=None)
    np.testing.assert_array_equal(
        untouched["blocks"]["ffn"]["fc2"]["kernel"], kernel.astype(untouched["blocks"]["ffn"]["fc2"]["kernel"].dtype)
    )


def test_bad_requests_are_one_sentence_and_write_nothing(done):
    folder, _, _, _, errors = done
    for result, (arguments, sentence) in zip(errors, BAD, strict=True):
        assert result["error"] is not None and sentence in result["error"], (arguments, result["error"])
        assert "\n" not in result["error"]
    assert not list(folder.glob("y*")) and not list(folder.glob(".*"))


def test_the_program_as_a_process_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.convert", "--input=nowhere", f"--output={tmp_path / 'y'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nowhere does not exist\n")
