import numpy as np
import pytest
from PIL import Image

from causvid_jax.config import ConfigError
from causvid_jax.training import curves
from causvid_jax.training.metrics import MetricsWriter
from causvid_jax.training.stages import TRAINERS


def test_draws_the_stages_that_have_metrics(tmp_path):
    with MetricsWriter(tmp_path / "teacher") as writer:
        for step in range(1, 20):
            writer.write(step, {"loss": 1.0 / step, "hours": step / 60})
        writer.write(19, {"sample_digit": 0.5})
    assert curves.draw(tmp_path, tmp_path / "curves.png") == ["teacher"]
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert picture.shape[:2] == (480, 320) and picture.std() > 10


def test_every_stage_has_a_curve():
    assert list(curves.LOSSES) == list(TRAINERS)


def test_smoothing_keeps_a_constant_and_means_the_middle():
    np.testing.assert_allclose(curves._smooth(np.full(20, 3.0)), 3.0)
    values = np.arange(20.0)
    assert curves._smooth(values)[10] == values[6:15].mean()


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no metrics of any stage"):
        curves.draw(tmp_path, tmp_path / "curves.png")
