"""Examples run, and the Gaussian one reaches the distribution that it distils."""

import runpy

import numpy as np

from causvid_jax import media

TINY_OWN = """
from tests import tiny_config

def get_config():
    config = tiny_config.get_config()
    config.data.name = "videos"
    for stage in ("train_vae", "train_teacher", "train_init", "train_distill"):
        config[stage].update(steps=2, samples=0)
    config.train_vae.curriculum = ()
    return config
"""


def test_dmd_moves_the_student_to_the_real_gaussian(tmp_path):
    example = runpy.run_path("examples/dmd_gaussian.py")
    student = example["main"]([f"--output={tmp_path / 'out.png'}"])
    assert (tmp_path / "out.png").stat().st_size > 10_000
    np.testing.assert_allclose(student["mean"], example["MEAN"], atol=0.25)
    np.testing.assert_allclose(example["covariance_of"](student), example["COVARIANCE"], atol=0.35)


def test_a_stage_of_your_own_learns():
    losses = runpy.run_path("examples/own_stage.py")["main"](60)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_stream_with_two_prompts(tmp_path):
    output = tmp_path / "switch.png"
    video = runpy.run_path("examples/switch_prompt.py")["main"](["--blocks=1", f"--output={output}"])
    assert video.shape == (2 * 12 - 3, 32, 32, 3) and output.stat().st_size > 100
    assert video.dtype == np.uint8 and video.max() > 100


def test_quickstart(tmp_path):
    video = runpy.run_path("examples/quickstart.py")["main"](["--blocks=2", f"--output={tmp_path}/out.mp4"])
    shown = media.read_video(tmp_path / "out.mp4", 32, 32)
    assert video.shape == shown.shape == (21, 32, 32, 3)
    assert np.abs(shown.astype(int) - video).mean() < 8  # what H.264 changes


def test_own_videos_go_through_every_stage(tmp_path):
    rng = np.random.default_rng(0)
    rows, clips = ["file,caption"], tmp_path / "clips"
    clips.mkdir()
    for i, word in enumerate(("red", "green", "blue", "cyan")):
        frames = np.repeat(rng.integers(0, 256, (1, 16, 16, 3), np.uint8), 20, axis=0)
        media.write_video(clips / f"{i}.mp4", frames, 16)
        rows.append(f"{i}.mp4,a {word} 3 moving left")
    (clips / "captions.csv").write_text("\n".join(rows))
    (tmp_path / "own.py").write_text(TINY_OWN)
    paths = [f"--config={tmp_path}/own.py", f"--videos={clips}", f"--captions={clips}/captions.csv"]
    prompt = "--prompt=a red 3 moving left"
    main = runpy.run_path("examples/own_videos.py")["main"]
    first = main([*paths, f"--workdir={tmp_path}/run", prompt])
    assert first.shape == (9, 16, 16, 3)
    # The same command finds everything finished and streams the same.
    np.testing.assert_array_equal(main([*paths, f"--workdir={tmp_path}/run", prompt]), first)
