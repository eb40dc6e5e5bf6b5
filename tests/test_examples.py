"""Examples run, and the Gaussian one reaches the distribution that it distils."""

import runpy

import numpy as np


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
