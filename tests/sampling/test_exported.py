"""Programs as files: what they are refused for, and that an independent first frame has a program of its own."""

import dataclasses
import json
import re
import zipfile

import jax
import numpy as np
import pytest

import causvid_jax
from causvid_jax.config import ConfigError
from causvid_jax.sampling import exported, player, stream, weights
from tests.refusals import refused
from tests.sampling.conftest import FIRST, PLAIN, prompt
from tests.tiny import changed

HEADER = {
    "format": exported.FORMAT,
    "version": causvid_jax.__version__,
    "platform": "cpu",
    "streams": 1,
    "frames": 6,
    "jax": "0.1",
    "machine": "",
    "recipe": exported.identity(PLAIN),
}
TINY = dataclasses.replace(PLAIN, decoder="taehv")


ENTRIES = {f"{name}.stablehlo": b"no program at all" for name in ("start", "next_frames", "change_prompt")}


def write(path, entries=ENTRIES, **changes):
    exported.write(path, HEADER | changes, entries)
    return path


def refusal(path, recipe=PLAIN, **given):
    with pytest.raises(ConfigError) as caught:
        exported.load(path, recipe, **{"batch": 1, "latents": 6, **given})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes,recipe,given,words",
    [
        ({"format": 1}, PLAIN, {}, "is of format 1; accepted: 5; build it again"),
        ({"version": "0.0.1"}, PLAIN, {}, "was built for causvid_jax 0.0.1; this is .*: build it again"),
        ({"platform": "tpu"}, PLAIN, {}, "was built for tpu; this machine is cpu"),
        ({}, changed(PLAIN, student={"num_layers": 3}), {}, "student.num_layers = 2, and the recipe has 3"),
        ({}, changed(PLAIN, causal={"window": 4}), {}, "causal.window = 0, and the recipe has 4"),
        ({}, changed(PLAIN, vae={"latent_std": (1.0,) * 4}), {}, r"vae.latent_std = \[\], and the recipe has \[1.0, "),
        ({}, TINY, {}, "decoder = 'vae', and the recipe has 'taehv'"),
        ({}, PLAIN, {"batch": 3}, r"1 video\(s\) at once, and 3 prompt\(s\) are given"),
        ({}, PLAIN, {"latents": 8}, "at most 6 latent frames, and 8 are requested"),
        ({}, PLAIN, {}, "cannot be read by JAX .*; it was built by 0.1"),
    ],
)
def test_what_is_built_for_something_else_is_refused(tmp_path, changes, recipe, given, words):
    assert re.search(words, refusal(write(tmp_path / "x.program", **changes), recipe, **given))


def test_a_changed_or_foreign_program_is_refused(tmp_path):
    """Entries of another file, an entry that is missing, a header that was edited, a byte that flipped."""
    path = write(tmp_path / "x.program")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(parts["header.json"])

    def again(**changes):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (parts | changes).items():
                archive.writestr(name, data)
        return refusal(path)

    assert "start.stablehlo was changed" in again(**{"start.stablehlo": b"another program"})
    assert "its header was changed" in again(**{"header.json": json.dumps(header | {"streams": 2})})
    for name in ("streams", "checksum", "sha256"):
        rest = {key: value for key, value in header.items() if key != name}
        assert "is not a readable program" in again(**{"header.json": json.dumps(rest)})
        assert "is not a readable program" in again(**{"header.json": json.dumps(header | {name: None})})
    few = {"start.stablehlo": b""}
    assert "holds start.stablehlo; it must hold change_prompt, next_frames" in refusal(write(path, few))
    whole, rng = write(path).read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)])
        refusal(path)


def test_what_is_no_program_is_refused(tmp_path):
    (tmp_path / "text.program").write_text("no archive")
    with pytest.raises(ConfigError, match="text.program is not a readable program of causvid compile"):
        exported.load(tmp_path / "text.program", PLAIN, batch=1, latents=6)
    with pytest.raises(ConfigError, match="none.program does not exist; causvid compile --platform builds one"):
        exported.load(tmp_path / "none.program", PLAIN, batch=1, latents=6)
    for platform, batch, words in (("gpu", 1, "platform is 'gpu'; accepted: cpu, cuda, tpu"), ("cpu", 0, "batch is 0")):
        refused(words, exported.build, PLAIN, platform, batch=batch)


def test_settings_of_training_do_not_matter():
    trained = changed(PLAIN, diffusion={"guidance_scale": 3.0, "num_inference_steps": 7}, student={"remat": "full"})
    assert exported.identity(trained) == exported.identity(PLAIN) != exported.identity(FIRST)

    assert exported.identity(changed(TINY, vae={"latent_std": (2.0,) * 4})) == exported.identity(TINY)


@pytest.mark.slow
def test_an_independent_first_frame_and_two_streams(params, tmp_path, monkeypatch):
    header, made = exported.build(FIRST, "cpu", batch=2)
    assert list(made) == ["start", "first_frames", "next_frames", "change_prompt"]
    exported.save(tmp_path / "x.program", header, made)
    text, other = np.asarray(prompt(0, 2)), np.asarray(prompt(1, 2))
    unstacked = weights.for_stream(params, FIRST)
    given = {"config": FIRST, "frames": 17, "seed": 5, "switches": {2: other}}
    expected = list(player.play(unstacked, text, **given))
    jax.clear_caches()
    for name in ("_next_block", "_decode", "encode_prompt", "network_pass"):
        monkeypatch.setattr(stream, name, lambda *_, **__: pytest.fail("the model was traced"))
    loaded = exported.load(tmp_path / "x.program", FIRST, batch=2, latents=5)
    for a, b in zip(player.play(unstacked, text, loaded=loaded, **given), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="accepted: no image and no video"):
        next(player.play(unstacked, text, config=FIRST, frames=5, image=np.zeros((16, 16, 3), np.uint8), loaded=loaded))


@pytest.mark.slow
@pytest.mark.parametrize("platform,kernel", [("cuda", "__cudnn$fmhaSoftmax"), ("tpu", "tpu_custom_call")])
def test_programs_for_platforms_that_are_not_here(platform, kernel, monkeypatch, tmp_path):
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    recipe = changed(PLAIN, student={"dtype": "bfloat16", "attention": "auto"})
    if kernels.cuda_versions is None:
        if platform == "cuda":
            refused("can be lowered only where cuDNN is installed", exported.build, recipe, platform)
        monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)  # all that lowering asks of it
    header, made = exported.build(recipe, platform)
    assert header["attention"] == {"cuda": "cudnn", "tpu": "splash"}[platform]
    assert all(kernel in str(made[name].mlir_module()) for name in ("next_frames", "change_prompt"))
    exported.save(tmp_path / "x.program", header, made)
    with pytest.raises(ConfigError, match=f"was built for {platform}; this machine is cpu"):
        exported.load(tmp_path / "x.program", recipe, batch=1, latents=6)
