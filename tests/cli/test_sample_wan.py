"""From published files to video: launch.convert on tiny random ones, then the sampling program on the folders it made.

An original Wan folder with a student added, and a diffusers folder of the model with an image branch.
"""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import make_umt5
import numpy as np
import pytest
import safetensors.numpy
from test_sample import call, refusal

from causvid_jax import media
from causvid_jax.checkpoints import load, state_dict, workdir
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.cli import common, sample
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import decoder, precision, transformer, umt5
from causvid_jax.sampling import image_to_video, player, stream
from causvid_jax.sampling import teacher as teacher_sampler
from causvid_jax.text import encoder
from configs.wan_1_3b import NEGATIVE_PROMPT
from tests.tiny import CLIP, random_params

pytest.importorskip("tokenizers", reason="the extra 'text' is not installed")
pytest.importorskip("ftfy", reason="the extra 'text' is not installed")

RECIPE = f"""
from tests.tiny import BRANCH, NETWORK


def get_config(variant="t2v"):
    network = NETWORK | dict(num_layers=1, text_dim=16, text_length=32, dtype="bfloat16")
    network |= BRANCH if variant == "i2v" else {{}}
    return dict(
        name="tiny_wan",
        video=dict(height=32, width=32, frames=13, fps=16),
        text=dict(kind="umt5", length=32, dim=16, negative_prompt="word word"),
        umt5=dict(**{make_umt5.SIZES!r}, dtype="bfloat16"),
        vae=dict(base_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1, z_dim=4),
        taehv=dict(z_dim=4, encoder_dim=4, decoder_dims=(8, 6, 4, 4)),
        teacher=network, student=network,
        causal=dict(frames_per_block=2),
        diffusion=dict(shift=8.0, num_inference_steps=3, guidance_scale=5.0),
    )
"""
PROMPT = "--prompt=warm neon"


def publish(path, config, naming, seed, *, prefix="", tree=None):
    """A safetensors file of random weights, named and laid out as others write it."""
    params = random_params(network_of(config).abstract(config), seed, 0.2) if tree is None else tree
    state = {prefix + name: value for name, value in state_dict(params, config, naming).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(state, path, {"format": "pt"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The converted folder: ``place``; that of image to video: ``place / "i2v"``."""
    folder = tmp_path_factory.mktemp("wan")
    inputs, place = folder / "published", folder / "run"
    (folder / "recipe.py").write_text(RECIPE)
    recipe, branch = (load_recipe(f"{folder}/recipe.py{v}") for v in ("", ":i2v"))
    text, tokenizer = umt5.init(jax.random.key(0), recipe.umt5), make_umt5.small_tokenizer()
    wan, other = inputs / "wan", inputs / "diffusers"
    publish(wan / "diffusion_pytorch_model.safetensors", recipe.teacher, "original", 1)
    publish(wan / "Wan2.1_VAE.safetensors", recipe.vae, "original", 3)
    publish(wan / "models_t5_umt5-xxl-enc-bf16.safetensors", recipe.umt5, "original", 0, tree=text)
    publish(wan / "taew2_1.safetensors", recipe.taehv, "original", 4)
    publish(inputs / "student.safetensors", recipe.student, "original", 2, prefix="generator_ema.model.")
    publish(other / "transformer" / "diffusion_pytorch_model.safetensors", branch.teacher, "diffusers", 5)
    publish(other / "vae" / "diffusion_pytorch_model.safetensors", recipe.vae, "diffusers", 3)
    publish(other / "text_encoder" / "model.safetensors", recipe.umt5, "diffusers", 0, tree=text)
    publish(other / "image_encoder" / "model.safetensors", CLIP, "diffusers", 6)
    (wan / "config.json").write_text(json.dumps({"num_heads": 2}))
    (other / "transformer" / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    for where in (wan / "google" / "umt5-xxl", other / "tokenizer"):
        where.mkdir(parents=True)
        (where / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    requests = [
        [f"--input={wan}", f"--output={place}"],
        [f"--input={inputs}/student.safetensors", f"--output={place}/distill/weights.safetensors", "--num_heads=2"],
        [f"--input={other}", f"--output={place}/i2v"],
    ]
    for request in requests:
        common.call("convert", [*request, "--dtype=bfloat16"])
    (folder / "recipe.py").rename(place / "recipe.py")
    return place


@pytest.fixture(scope="module")
def made(place):
    """What was said while the student's stream, the teacher's clip and a stream through TAEHV were made."""
    student = [PROMPT, "--switch=6:neon", f"--output={place}/student.gif", "--upscale=1"]
    teacher = [PROMPT, "--teacher", "--exact", "--config.diffusion.solver=unipc", f"--output={place}/teacher.mp4"]
    tiny = [PROMPT, "--frames=13", "--exact", "--config.decoder=taehv", f"--output={place}/tiny.gif"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "LARGE", 0)  # shows the memory of tiny networks too
        return call(place, student, teacher, tiny)


def test_student_and_teacher_from_a_checkpoint_folder(place, made):
    first, second, third = made
    assert "1. encode the prompts" in first and "2. stream" in first and "13 frames in" in first
    # The teacher's unconditional branch is the recipe's negative prompt, which no one has encoded before.
    assert "1. encode the prompts" in second and "3. decode" in second
    assert "1. stream" in third and "TAEHV" in third and "VAE " not in third
    assert len(list((place / "prompts").rglob("*.safetensors"))) == 3
    assert len(media.read_video(place / "teacher.mp4", 32, 32)) == 13
    assert media.read_video(place / "tiny.gif", 32, 32).std() > 1

    # The same stream by hand, on float32 parameters.
    recipe = load_recipe(str(place / "recipe.py"))
    reader = encoder.open_encoder(recipe, place, compute=False)
    rows = {p: encoder.encode(reader, [p]) for p in ("warm neon", "neon")}
    params = {"student": workdir.load_stage(recipe, "distill", place)[0]}
    params["vae"], _ = workdir.load_stage(recipe, "vae", place)
    params = jax.tree.map(jnp.asarray, params)
    made = player.play(params, rows["warm neon"], config=recipe, frames=13, switches={1: rows["neon"]})
    media.write_video(place / "expected.gif", np.concatenate(list(made), axis=1)[0], 16)
    a, b, other = (media.read_video(place / f"{x}.gif", 32, 32).astype(int) for x in ("student", "expected", "tiny"))
    # Rounding may move a pixel to its neighbour in the file's palette.
    assert a.shape == b.shape and np.abs(a - b).mean() <= 1 < np.abs(a - other).mean()


def test_an_image_becomes_a_video(place, monkeypatch):
    """The program's frames against the same steps by hand, from a picture of another shape than the video."""
    rng = np.random.default_rng(7)
    media.write_video(place / "wide.gif", rng.integers(0, 256, (1, 20, 60, 3), np.uint8), 16)
    monkeypatch.setattr(sample, "LARGE", 0)
    common_flags = [f"--config={place}/recipe.py:i2v", f"--checkpoint={place}/i2v", "--teacher", "--upscale=1"]
    image = [f"--image={place}/wide.gif"]
    many = ["--prompt=neon", PROMPT, "--config.diffusion.solver=unipc", "--seed=3"]
    (said,) = call(place, [*common_flags, *image, *many, f"--output={place}/shown.gif"])
    for words in (
        "embed the picture",
        "image encoder",
        "encode the picture",
        "denoise",
        "picture's embeddings and latents",
    ):
        assert words in said, said
    recipe = load_recipe(f"{place}/recipe.py:i2v")
    recipe = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, solver="unipc"))
    reader = encoder.open_encoder(recipe, place / "i2v", compute=False)
    rows = encoder.encode(reader, ["neon", "warm neon"])
    shapes = {
        "teacher": transformer.inference(recipe.teacher),
        "vae": decoder.vae_shapes(recipe)["vae"],
        "image_encoder": decoder.image_encoder_shapes(CLIP),
    }
    params = {k: load(workdir.stage_path(place / "i2v", k), dtype=v)[0] for k, v in shapes.items()}
    whole = media.to_float(media.read_picture(place / "wide.gif"))[None]
    assert whole.shape == (1, 20, 60, 3)
    square = media.to_float(media.read_image(place / "wide.gif", 32, 32))[None]
    sees = image_to_video.image_embeds(params["image_encoder"], whole, config=CLIP)
    given = image_to_video.image_latents(params["vae"], square, config=recipe)
    null, seeds = encoder.negative_prompt_embeds(reader), np.array([3, 4], np.uint32)
    twice = [np.repeat(x, 2, axis=0) for x in (sees, given)]
    latents = teacher_sampler.sample_clip(params["teacher"], rows, null, *twice, seeds=seeds, config=recipe)
    frames = np.concatenate([media.to_uint8(x) for x in decoder.decode_clip(params, latents, config=recipe)], axis=1)
    assert frames.shape == (2, 13, 32, 32, 3) and frames.std() > 1
    for i in range(2):
        media.write_video(place / f"expected_{i}.gif", frames[i], 16)
        a, b = (media.read_video(place / f"{name}_{i}.gif", 32, 32) for name in ("shown", "expected"))
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("made")
def test_a_program_is_built_once_and_runs_without_the_model(place, monkeypatch, capsys):
    """The flags of student.gif, which was made by tracing: the same file, bit for bit."""
    build = ["--stage=stream", "--platform=cpu", f"--checkpoint={place}", f"--output={place}/stream.program"]
    common.call("compile", [f"--config={place}/recipe.py", *build])
    assert "tiny_wan for cpu, 1 video(s) at once, attention by xla" in capsys.readouterr().out
    for module, name in ((transformer, "cached"), (decoder, "decode_chunk"), (stream, "_next_block")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the model was traced"))
    program, switch = f"--program={place}/stream.program", "--switch=6:neon"
    (printed,) = call(place, [PROMPT, switch, "--upscale=1", program, f"--output={place}/loaded.gif"])
    assert "stream.program, attention by xla" in printed
    assert (place / "loaded.gif").read_bytes() == (place / "student.gif").read_bytes()
    built = "stream.program was built for"
    for arguments, words in (
        ([PROMPT, PROMPT, program], f"{built} 1 video(s) at once, and 2 prompt(s) are given"),
        ([PROMPT, "--config.video.width=48", program], f"{built} video.width = 32, and the recipe has 48"),
        ([PROMPT, "--frames=14", program], f"{built} at most 4 latent frames, and 6 are requested"),
        ([PROMPT, "--exact", program], f"{built} student.precision = 'default', and the recipe has 'causvid'"),
        ([PROMPT, "--teacher", program], "--teacher is given with --program, which supports text to video only"),
        ([PROMPT, f"--program={place}/recipe.py"], "recipe.py is not a readable program of causvid compile"),
    ):
        assert words in refusal(place, arguments)


def test_what_is_missing_is_named(place, tmp_path):
    for name in ("teacher", "vae", "text_encoder"):
        (tmp_path / "half" / name).mkdir(parents=True)
        (tmp_path / "half" / name / "weights.safetensors").symlink_to(workdir.stage_path(place / "i2v", name))
    (tmp_path / "half" / workdir.TOKENIZER).symlink_to(place / workdir.TOKENIZER)
    image = np.zeros((1, 8, 8, 3), np.uint8)
    media.write_video(place / "wide.gif", image, 16)
    picture = [PROMPT, f"--config={place}/recipe.py:i2v", f"--checkpoint={tmp_path}/half", "--teacher"]
    picture.append(f"--image={place}/wide.gif")
    cases = [
        ([PROMPT, f"--checkpoint={tmp_path}"], "text_encoder/weights.safetensors does not exist"),
        (picture, "comes with no trained image_encoder; copy the published one to"),
        (
            [*picture[:3], "--teacher"],
            "recipe 'tiny_wan' has an image branch; it starts from a picture, which --image gives",
        ),
        ([PROMPT, "--teacher", f"--image={place}/wide.gif"], "--image is given with --teacher, which cannot stream"),
        ([PROMPT, "--config.umt5.num_layers=9"], "text_encoder/weights.safetensors does not fit the configuration"),
        ([PROMPT, "--config.decoder=taehv", "--config.taehv.blocks=2"], "unexpected: decoder/levels/0/blocks/2"),
    ]
    for arguments, words in cases:
        assert words in refusal(place, arguments)


def test_the_published_recipe_has_the_published_negative_prompt_and_columns():
    recipe = load_recipe(str(pathlib.Path(__file__).parents[2] / "configs" / "wan_1_3b.py"))
    assert recipe.text.negative_prompt == NEGATIVE_PROMPT
    teacher, student = precision.exact(recipe, True), precision.exact(recipe, False)
    assert (teacher.teacher.precision, student.student.precision) == ("wan", "causvid")
    assert (teacher.vae.dtype, student.vae.dtype) == ("float32", "bfloat16")


@pytest.mark.usefixtures("made")
def test_published_files_as_they_are_give_the_same_stream(place):
    """The flags of student.gif, on the folder and the student's file that were converted for it."""
    inputs = place.parent / "published"
    files = [f"--checkpoint={inputs}/wan", f"--student={inputs}/student.safetensors"]
    (said,) = call(place, [PROMPT, "--switch=6:neon", "--upscale=1", *files, f"--output={place}/published.gif"])
    assert "Reads" in said and "part 'generator_ema'" in said and "original names" in said
    a, b = (media.read_video(place / f"{name}.gif", 32, 32).astype(int) for name in ("student", "published"))
    # The converted folder is in bfloat16; biases and norms of the published files are in float32.
    assert a.shape == b.shape and np.abs(a - b).mean() <= 1
    for arguments, words in (
        ([f"--student={place}/absent.pt"], "student weights"),
        ([f"--student={inputs}/student.safetensors", "--teacher"], "--student is given with --teacher"),
        ([f"--taehv={inputs}/wan/taew2_1.safetensors"], "but the recipe decodes with 'vae'"),
    ):
        assert words in refusal(place, [PROMPT, *arguments])


def test_the_example_of_published_weights_streams_what_the_program_does(place):
    inputs = place.parent / "published"
    files = f"--student={inputs}/student.safetensors"
    main = runpy.run_path("examples/published_weights.py")["main"]
    flags = [f"--wan={inputs}/wan", files, f"--config={place}/recipe.py", f"--output={place}/example.mp4"]
    assert main([*flags, "--prompts", "warm neon", "neon", "--blocks=1", "--window=4"]) == 13
    flags = [PROMPT, "--switch=5:neon", "--upscale=1", "--config.causal.window=4", files]
    call(place, [*flags, f"--checkpoint={inputs}/wan", f"--output={place}/program.mp4"])
    a, b = (media.read_video(place / f"{name}.mp4", 32, 32).astype(int) for name in ("example", "program"))
    assert a.shape == b.shape and np.abs(a - b).mean() < 0.5
