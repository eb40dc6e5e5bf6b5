"""The sampling program: what it writes and says, and the one sentence for what it cannot do."""

import contextlib
import io
import shutil

import numpy as np
import pytest
import safetensors.numpy

from causvid_jax import media
from causvid_jax.checkpoints import store, workdir
from causvid_jax.cli import common
from causvid_jax.cli import sample as cli_sample
from causvid_jax.config import ConfigError
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import transformer, vae
from causvid_jax.sampling import session
from causvid_jax.serve import film
from tests.programs import write_recipe
from tests.refusals import refused
from tests.tiny import changed, random_params, stream_recipe

PROMPT = "--prompt=a red 3 moving left"
CUT = "--config.causal.on_prompt_switch=reset"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe and random weights of its three networks."""
    folder = tmp_path_factory.mktemp("sample")
    recipe = stream_recipe(window=4)
    write_recipe(folder, recipe)
    shapes = {"vae": vae.abstract(recipe.vae)}
    shapes |= dict.fromkeys(("teacher", "distill"), transformer.abstract(recipe.student))
    for seed, stage in enumerate(shapes):
        store.save_params(workdir.stage_path(folder, stage), random_params(shapes[stage], seed, 0.3), {"stage": stage})
    (folder / "empty").mkdir()
    shutil.copytree(workdir.ASSETS / "digits", folder / "digits" / "vae")
    (folder / "digits" / "vae" / "vae.safetensors").rename(folder / "digits" / "vae" / "weights.safetensors")
    clip = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), np.uint8)
    media.write_video(folder / "clip.gif", clip, 16)
    up, down = np.full((recipe.student.dim, 1), 0.3, np.float32), np.full((1, recipe.student.dim), 0.3, np.float32)
    names = {"blocks.0.self_attn.o.lora_A.weight": down, "blocks.0.self_attn.o.lora_B.weight": up}
    safetensors.numpy.save_file(names, folder / "lora.safetensors")
    (folder / "broken.safetensors").write_bytes(workdir.stage_path(folder, "distill").read_bytes()[:500])
    (folder / "broken.png").write_text("no picture")
    return folder


def call(place, *cases):
    """Return what the program prints for each list of flags."""
    printed = []
    for arguments in cases:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            common.call("sample", with_defaults(place, arguments))
        printed.append(text.getvalue())
    return printed


def with_defaults(place, arguments):
    usual = {"--config": f"{place}/recipe.py", "--checkpoint": place}
    return [*(f"{k}={v}" for k, v in usual.items() if not any(a.startswith(f"{k}=") for a in arguments)), *arguments]


def refusal(place, arguments):
    """Return the sentence with which the program refuses ``arguments`` before it computes anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "run", lambda *_: pytest.fail("computed"))
        with pytest.raises(ConfigError) as error, contextlib.redirect_stdout(io.StringIO()):
            common.call("sample", with_defaults(place, arguments))
    return str(error.value)


@pytest.fixture(scope="module")
def made(place):
    """Every kind of video, and what was said: {file: printed}."""
    cases = {
        "switched.gif": [PROMPT, "--frames=30", "--switch=14:a blue 7 moving up"],
        "plain.gif": [PROMPT, "--frames=30"],
        "many.gif": [PROMPT, "--prompt=a blue 7", "--frames=9", "--seed=4", "--upscale=1"],
        "alone.gif": ["--prompt=a blue 7", "--frames=9", "--seed=5", "--upscale=1"],
        "follows.mp4": [PROMPT, f"--video={place}/clip.gif", "--strength=0.25"],
        "cut.mp4": [
            PROMPT,
            f"--video={place}/clip.gif",
            "--switch=5:a blue 7",
            f"--lora={place}/lora.safetensors",
            CUT,
        ],
        "starts.mp4": [PROMPT, f"--image={place}/clip.gif", "--frames=6"],
        "teacher.mp4": [PROMPT, "--teacher"],
    }
    printed = call(place, *([*flags, f"--output={place}/{name}"] for name, flags in cases.items()))
    return dict(zip(cases, printed, strict=True))


def test_a_switch_leaves_the_frames_before_it(place, made):
    a, b = (media.read_video(place / name, 16, 16) for name in ("switched.gif", "plain.gif"))
    assert a.shape == (30, 16, 16, 3)
    # Frame 14 is in latent 4, block 2, which starts at frame 13.
    np.testing.assert_array_equal(a[:13], b[:13])
    assert (a[13:] != b[13:]).any()
    said = made["switched.gif"]
    assert "From frame 13 on (block 2): a blue 7 moving up" in said
    for words in ("First frame after", "of compilation", "30 frames in", "times real time", "switched.gif"):
        assert words in said


def test_several_prompts_are_numbered_and_each_has_its_own_seed(place, made):
    assert "many_0.gif" in made["many.gif"] and (place / "many_0.gif").is_file() and not (place / "many.gif").exists()
    a, b = (media.read_video(place / name, 16, 16).astype(int) for name in ("many_1.gif", "alone.gif"))
    assert len(a) == 9 and np.abs(a - b).mean() <= 1


def test_other_ways_to_start(place, made):
    assert len(media.read_video(place / "follows.mp4", 16, 16)) == 11
    assert media.read_video(place / "starts.mp4", 256, 256).shape == (6, 256, 256, 3)
    assert len(media.read_video(place / "teacher.mp4", 16, 16)) == 21 and "21 frames in" in made["teacher.mp4"]


def test_a_replay_is_the_same_video(place, made):
    lora = f"--lora={place}/lora.safetensors"
    for name, given in (("follows.mp4", []), ("starts.mp4", []), ("cut.mp4", [lora])):
        call(place, [f"--replay={place}/{name}", f"--output={place}/again_{name}", *given])
        first, again = (media.read_video(place / file, 16, 16) for file in (name, f"again_{name}"))
        np.testing.assert_array_equal(again, first)
    assert "holds no script" in refusal(place, [f"--replay={place}/teacher.mp4"])
    replay = f"--replay={place}/cut.mp4"
    assert "--seed is given with --replay" in refusal(place, [replay, "--seed=3"])
    assert "--decode_device is given with --replay" in refusal(place, [replay, "--decode_device=0"])
    refused("no recipe of the package; give its --config", common.call, "sample", [replay])
    before = (place / "cut.mp4").read_bytes()
    onto_itself = f"--output={place}/cut.mp4"
    for given, words in (
        ([], "made by other weights"),
        ([lora, "--config.video.height=32"], "has 16x16 pixels, this recipe 16x32; add --config.video.width=16"),
        ([lora, "--config.video.fps=8"], "has 16 frames per second, this recipe 8; add --config.video.fps=16"),
    ):
        assert words in refusal(place, [replay, onto_itself, *given])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="differ"):
        patch.setattr(film, "replay", broken)
        call(place, [replay, onto_itself, lora])
    assert (place / "cut.mp4").read_bytes() == before


def test_a_replay_of_an_interrupted_video_ends_where_it_ends(place, monkeypatch):
    whole = session.student_blocks

    def interrupted(*given):
        parts = whole(*given)
        yield next(parts)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "student_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(place, [PROMPT, "--frames=30", f"--output={place}/short.mp4"])
    monkeypatch.undo()
    call(place, [f"--replay={place}/short.mp4", f"--output={place}/again_short.mp4"])
    first, again = (media.read_video(place / file, 16, 16) for file in ("short.mp4", "again_short.mp4"))
    assert 0 < len(first) < 30
    np.testing.assert_array_equal(again, first)


def broken(*_):
    """A replay that fails after some frames."""
    yield from np.zeros((2, 4, 16, 16, 3), np.uint8)
    raise ConfigError("the frames differ")


def test_a_mesh_that_is_not_used_is_said(place):
    request = cli_sample.Options(config=changed(load_recipe("digits"), parallel={"tensor": 2}), prompt=("a red 3",))
    assert cli_sample.unused_mesh(load_recipe("digits")) == []
    assert "(tensor 2) is not used" in cli_sample.unused_mesh(request.config)[0]


def test_prompts_unlike_every_caption_are_said(capsys):
    request = cli_sample.Options(
        config=load_recipe("digits"),
        prompt=("A red 3, moving left!", "3 moving a left red", "red"),
        switch=("30:a blue 7 moving up", "60:up"),
    )
    opened = session.open_session(request)
    lines = cli_sample.unlike_captions(opened)
    assert [line.split("the video of ")[1] for line in lines] == [
        f"{prompt!r} may be anything." for prompt in ("3 moving a left red", "red", "up")
    ]


REFUSED = [
    ([], "no --prompt is given"),
    (["--prompt=a purple 3"], "unknown word 'purple'"),
    ([PROMPT, "--teacher", "--frames=20"], "no block structure of the teacher fits; nearest: 13 and 21"),
    ([PROMPT, "--teacher", "--frames=9"], "nearest: 5 and 13"),
    ([PROMPT, "--teacher", "--switch=14:a blue 7"], "--switch is given with --teacher"),
    ([PROMPT, "--output=a.avi"], "accepted: .mp4, .gif"),
    ([PROMPT, "--output=/proc/nowhere/a.mp4"], "cannot write output"),
    ([PROMPT, "--switch=soon:a blue 7"], "accepted: FRAME:PROMPT"),
    ([PROMPT, "--switch=99:a blue 7"], "--switch is at frame 99; accepted: 1 to 20"),
    ([PROMPT, "--switch=3:a blue 7"], "in the first block; accepted: from frame 5 on"),
    ([PROMPT, "--switch=14:a purple 7"], "unknown word 'purple'"),
    ([PROMPT, "--switch=14:a blue 7", "--switch=15:a red 7"], "two --switch"),
    ([PROMPT, "--image={place}/broken.png"], "cannot read image"),
    ([PROMPT, "--video={place}/broken.png"], "cannot read video"),
    ([PROMPT, "--video={place}/clip.gif", "--frames=40"], "--video has only 11"),
    ([PROMPT, "--video={place}/clip.gif", "--strength=0.1"], "strength is 0.1; accepted: 0.25"),
    ([PROMPT, "--video={place}/clip.gif", "--image={place}/clip.gif"], "--image and --video"),
    ([PROMPT, "--checkpoint={place}/nothing"], "does not exist"),
    ([PROMPT, "--checkpoint={place}/empty"], "empty holds no weights; accepted: a working directory"),
    ([PROMPT, "--checkpoint={place}/digits", "--config=digits"], "holds no student; give a folder that has one"),
    ([PROMPT, "--student={place}/teacher/weights.safetensors"], "weights of the stage 'teacher', not of a student"),
    ([PROMPT, "--checkpoint={place}/broken.safetensors"], "not a readable safetensors file"),
    ([PROMPT, "--checkpoint={place}/vae/weights.safetensors"], "does not fit the configuration"),
    ([PROMPT, "--switch=\u00b3\u00b2:a blue 7"], "accepted: FRAME:PROMPT"),
    ([PROMPT, "--switch=14: "], "accepted: FRAME:PROMPT"),
    (["--prompt= "], "--prompt is empty"),
    ([PROMPT, "--strength=0.5"], "--strength=0.5 is given without --video"),
]


@pytest.mark.parametrize("arguments,words", REFUSED)
def test_bad_input_is_refused_in_one_sentence_before_any_compute(place, tmp_path, arguments, words):
    given = [f"--output={tmp_path}/out.mp4", *(a.format(place=place) for a in arguments)]
    message = refusal(place, given)
    assert words in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []
