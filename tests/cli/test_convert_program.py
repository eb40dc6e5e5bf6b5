"""The conversion program: what it writes and says, and the one sentence for what it cannot do."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from causvid_jax.checkpoints import load, open_checkpoint, state_dict, store, workdir
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.checkpoints.source import open_source
from causvid_jax.cli import common
from causvid_jax.config import ConfigError
from causvid_jax.models import transformer, vae
from tests.checkpoints.tiny_files import EVERY, TINY, TINY_VAE, arrays, assert_states
from tests.tiny import random_params

CONFIG, CODER = TINY, TINY_VAE
T5, VISION = "models_t5_umt5-xxl-enc-bf16", "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
OTHERS = {T5: EVERY[3], VISION: EVERY[4], "taew2_1": dataclasses.replace(EVERY[5], z_dim=2)}
TOKENIZER = {"tokenizer.json": '{"model": 1}', "spiece.model": "pieces"}
ENCODERS = "--component=transformer,vae,text_encoder,image_encoder"
UPDATE = {
    "blocks.0.ffn.2.lora_A.weight": np.ones((1, 40), np.float32),
    "blocks.0.ffn.2.lora_B.weight": np.ones((24, 1), np.float32),
}
GOOD = {
    "dry": ["--input=wan", "--output=never", "--dry_run"],
    "run": ["--input=wan", "--output=run"],
    "original": ["--input=wan", "--output=original", "--to=original"],
    "diffusers": ["--input=wan", "--output=diffusers", "--to=diffusers", ENCODERS],
    "back": ["--input=run", "--output=back", "--to=original"],
    "again": ["--input=diffusers", "--output=again"],
    "text": [f"--input=wan/{T5}.safetensors", "--output=text", "--dtype=bfloat16"],
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
    ([W, "--output=y"], "the number of heads does not follow from the width"),
    ([W, "--output=y", "--lora=no.safetensors:2"], "no.safetensors does not exist; accepted: FILE or FILE:STRENGTH"),
    ([W, "--output=y", "--lora_layers=1-x"], "--lora_layers is '1-x'; accepted: numbers and ranges, as 0-9,20"),
    ([W, "--output=y", "--lora_layers=9-0"], "--lora_layers is '9-0'; accepted: numbers and ranges, as 0-9,20"),
    ([W, "--output=y", "--stage=vae"], "--stage is 'vae'; accepted: teacher, init, distill"),
    ([W, "--output=y", "--component=clip"], "--component is 'clip'; accepted: transformer, vae, text_encoder, image"),
    (["--input=diffusers", "--output=y", "--component=taehv"], "has no taehv; accepted: transformer, vae"),
    (
        ["--input=wan", "--output=y", "--to=diffusers"],
        "TAEHV of widths 10 and (14, 12, 8, 6), 2 latent channels, origi",
    ),
    ([W, "--output=wan", "--num_heads=2"], "wan exists and is not empty"),
    (["--input=student.safetensors", "--output=y", "--part=critic"], "has no part 'critic'; accepted: 'generator'"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the folder, the parameters, results by name and errors in order, after every request."""
    folder = tmp_path_factory.mktemp("convert")
    rng = np.random.default_rng(0)
    params, coder = random_params(transformer.abstract(CONFIG)), random_params(vae.abstract(CODER), 1)
    (folder / "wan").mkdir()
    state = state_dict(params, CONFIG, "original")
    save = safetensors.numpy.save_file
    save(state, folder / "wan" / "diffusion_pytorch_model.safetensors")
    save(state_dict(coder, CODER, "original"), folder / "wan" / "Wan2.1_VAE.safetensors")
    for name, config in OTHERS.items():
        shapes = network_of(config).shapes(config, "original")
        state_of = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
        save(state_of, folder / "wan" / f"{name}.safetensors")
    (folder / "wan" / "google" / "umt5-xxl").mkdir(parents=True)
    for name, content in TOKENIZER.items():
        (folder / "wan" / "google" / "umt5-xxl" / name).write_text(content)
    (folder / "wan" / "config.json").write_text('{"num_heads": 2, "dim": 24}')
    save(state, folder / "w.safetensors")
    save({f"generator.model.{name}": value for name, value in state.items()}, folder / "student.safetensors")
    save(UPDATE, folder / "lora.safetensors")
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in (*GOOD.values(), *(arguments for arguments, _ in BAD)):
            error = None
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                try:
                    common.call("convert", arguments)
                except ConfigError as caught:
                    error = str(caught)
            results.append({"printed": printed.getvalue(), "error": error})
    return folder, params, coder, dict(zip(GOOD, results, strict=False)), results[len(GOOD) :]


def arrays_of(place):
    return arrays(open_source(place))


def test_an_original_folder_becomes_a_working_directory(done):
    folder, params, coder, results, _ = done
    assert [r["error"] for r in results.values()] == [None] * len(GOOD)
    said = results["dry"]["printed"]
    assert f"wan/{T5}.safetensors: umT5 text encoder of 3 layers, width 6, 11 tokens, original names, float32; " in said
    assert (
        f"wan/{VISION}.safetensors: CLIP image encoder of 2 layers, width 80, 1 heads, original names, float32; "
        in said
    )
    assert "wan/google/umt5-xxl/tokenizer.json: copied to text_encoder/tokenizer.json\n" in said
    assert said.endswith("Nothing is written (--dry_run).\n")
    assert "wan/diffusion_pytorch_model.safetensors: transformer of 3 layers, width 24, 2 heads, 4 channels, " in said
    assert "27,352 parameters, 109.41 kB -> causvid_jax names, float32, 109.41 kB\n" in said
    assert not (folder / "never").exists()
    teacher = load(workdir.stage_path(folder / "run", "teacher"), config=CONFIG)[0]
    jax.tree.map(np.testing.assert_array_equal, teacher, params)
    loaded, _ = load(workdir.stage_path(folder / "run", "vae"), config=CODER)
    jax.tree.map(np.testing.assert_array_equal, loaded, coder)
    assert results["run"]["printed"].endswith("Wrote run\n")


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_working_directory_holds_everything_under_its_name(done):
    folder = done[0]
    own = {
        workdir.place(name): file for name, file in zip(("text_encoder", "image_encoder", "taehv"), OTHERS, strict=True)
    }
    everything = {"teacher/weights.safetensors", "vae/weights.safetensors", *own, workdir.TOKENIZER}
    assert files_of(folder / "run") == everything
    assert files_of(folder / "again") == everything - {"taehv/weights.safetensors"}
    assert (folder / "run" / workdir.TOKENIZER).read_text() == TOKENIZER["tokenizer.json"]
    for name, published in own.items():
        config = OTHERS[published]
        state = arrays_of(folder / "wan" / f"{published}.safetensors")
        expected = load(state, config=config)[0]
        for place in ("run", "again"):
            if name in files_of(folder / place):
                jax.tree.map(np.testing.assert_array_equal, store.load_params(folder / place / name)[0], expected)
    assert files_of(folder / "text") == {"text_encoder/weights.safetensors", workdir.TOKENIZER}


def test_a_working_directory_goes_back_to_the_published_one(done):
    folder = done[0]
    tokenizer = {"google/umt5-xxl/tokenizer.json"}
    assert files_of(folder / "back") == files_of(folder / "wan") - {"google/umt5-xxl/spiece.model"}
    for name in files_of(folder / "back") - tokenizer - {"config.json"}:
        assert_states(arrays_of(folder / "back" / name), arrays_of(folder / "wan" / name))
    weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "vae")}
    weights |= {f"{name}/model.safetensors" for name in ("text_encoder", "image_encoder")}
    described = {f"{name.partition('/')[0]}/config.json" for name in weights}
    assert files_of(folder / "diffusers") == weights | described | {f"tokenizer/{name}" for name in TOKENIZER}
    assert "Ignored: taehv (wan/taew2_1.safetensors).\n" in done[3]["diffusers"]["printed"]


def test_published_folders(done):
    folder, params, coder, _, _ = done
    found = workdir.components(folder / "original")
    assert (
        found["transformer"] == folder / "original" / "diffusion_pytorch_model.safetensors"
        and found["vae"].name == "Wan2.1_VAE.safetensors"
    )
    assert_states(arrays_of(found["transformer"]), state_dict(params, CONFIG, "original"))
    assert_states(arrays_of(found["vae"]), state_dict(coder, CODER, "original"))
    assert json.loads((folder / "original" / "config.json").read_text())["_class_name"] == "WanModel"
    found = workdir.components(folder / "diffusers")
    assert_states(arrays_of(found["transformer"]), state_dict(params, CONFIG, "diffusers"))
    assert_states(arrays_of(found["vae"]), state_dict(coder, CODER, "diffusers"))
    opened = open_checkpoint(folder / "coder.safetensors")
    assert (opened.network.component, opened.format) == ("vae", "causvid_jax")


def test_a_student_with_a_lora(done):
    folder, params, _, results, _ = done
    assert ", part 'generator', without model.; " in results["student"]["printed"]
    assert ", plus 0.5 x lora.safetensors" in results["student"]["printed"]
    student = load(workdir.stage_path(folder / "student", "distill"), config=CONFIG)[0]
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
