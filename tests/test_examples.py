"""Examples run, and the Gaussian one reaches the distribution that it distils."""

import runpy

import numpy as np


def test_dmd_moves_the_student_to_the_real_gaussian(tmp_path):
    example = runpy.run_path("examples/dmd_gaussian.py")
    student = example["main"]([f"--output={tmp_path / 'out.png'}"])
    assert (tmp_path / "out.png").stat().st_size > 10_000
    np.testing.assert_allclose(student["mean"], example["MEAN"], atol=0.25)
    np.testing.assert_allclose(example["covariance_of"](student), example["COVARIANCE"], atol=0.35)
