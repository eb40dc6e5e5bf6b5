"""Measures frame by frame on clips that are wrong in a known way."""

import numpy as np
import pytest

from causvid_jax.config import ConfigError, DataConfig, VideoConfig
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.evaluation import frame_metrics

DATA, VIDEO = DataConfig(handwriting="upright"), VideoConfig(height=32, width=32, frames=81)
CAPTIONS = [
    *("a red 3 moving up left", "a blue 7 moving up right"),
    *("a green 0 moving down right", "a white 1 moving down left"),
]


def clips(captions, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([digits.sample_clip(rng, "test", DATA, VIDEO, caption)[0] for caption in captions])


@pytest.fixture(scope="module")
def classifier():
    return classifiers.load(DATA)


def scores(classifier, video, captions=CAPTIONS):
    return {k: v["mean"] for k, v in frame_metrics.frame_scores(classifier, video, captions, DATA, 9).items()}


def test_real_clips_are_right_and_their_neighbours_captions_are_wrong(classifier):
    right = scores(classifier, clips(CAPTIONS))
    assert right["digit"] > 0.97 and right["color"] == right["identity"] == right["direction"] == 1.0
    wrong = scores(classifier, clips(CAPTIONS), CAPTIONS[1:] + CAPTIONS[:1])
    assert wrong["digit"] < 0.05 and wrong["color"] == wrong["direction"] == 0.0 and wrong["identity"] == 1.0


def test_a_clip_that_changes_its_digit_is_right_by_its_mean_and_wrong_by_its_frames(classifier):
    video, other = clips(CAPTIONS), clips([c.replace(d, "5") for c, d in zip(CAPTIONS, "3701", strict=True)], seed=1)
    video[:, 60:] = other[:, 60:]
    values = scores(classifier, video)
    assert values["identity"] == 0.0 and values["first_block"] > 0.95
    assert 0.65 < values["digit"] < 0.85  # 60 of 81 frames
    triples = classifiers.read(classifier, video, data=DATA).triples
    assert sum(triple[0][0] == int(d) for triple, d in zip(triples, "3701", strict=True)) >= 3


def test_colours_and_directions_count_by_frame_and_by_pair(classifier):
    video = clips(CAPTIONS)
    video[:, ::3] = video[:, ::3].max(axis=-1, keepdims=True)  # every third frame is white
    values = scores(classifier, video)
    assert values["color"] == pytest.approx((3 * 54 / 81 + 1) / 4)  # the last caption is white
    video = clips(CAPTIONS)
    video[:, 41:] = video[:, 40:41]  # stands still: of 77 pairs the last 40 do not move as they should
    assert scores(classifier, video)["direction"] == pytest.approx(40 / 77, abs=2 / 77)


def test_only_fully_visible_digits_are_counted(classifier):
    visible = frame_metrics.read_frames(classifier, clips(CAPTIONS)).visible
    assert (
        visible.any(axis=1).all() and 0.05 < visible.mean() < 0.5
    )  # 16 of 32 pixels: a quarter of all places, or more
    video = clips(CAPTIONS[:1])
    first = int(np.argmax(visible[0]))
    assert video[0, first, [0, -1]].max() < 64 and video[0, first, :, [0, -1]].max() < 64


def test_sharpness_is_gradient_energy_by_its_formula():
    video = np.zeros((1, 1, 8, 8, 3), np.uint8)
    video[0, 0, 2:6, 2:6] = 100  # 16 pixels of 100; 4 edges of 4 steps of 100
    np.testing.assert_allclose(frame_metrics.sharpness(video), [16 * 100**2 / (16 * 100**2)])
    video[0, 0, 3, 3] = 0  # 15 pixels, 20 steps
    np.testing.assert_allclose(frame_metrics.sharpness(video), [20 / 15])


def test_psnr_by_frame():
    reference = np.zeros((2, 3, 4, 4, 3), np.uint8)
    video = reference.copy()
    video[:, 1] = 51
    np.testing.assert_allclose(
        frame_metrics.psnr(frame_metrics.error_by_frame(video, reference))[1], 20 * np.log10(5), rtol=1e-6
    )


def test_an_interval_is_that_of_the_normal_approximation_and_ignores_missing_clips():
    values = np.array([0.0, 1.0] * 200)
    found = frame_metrics.interval(np.append(values, np.nan))
    assert found["mean"] == 0.5
    half = 1.96 * 0.5 / np.sqrt(400)
    assert found["low"] == pytest.approx(0.5 - half, abs=0.01) and found["high"] == pytest.approx(0.5 + half, abs=0.01)
    assert np.isnan(frame_metrics.interval(np.array([np.nan]))["mean"])


def test_two_digits_are_refused(classifier):
    with pytest.raises(ConfigError, match="clips of one digit; these have 2"):
        frame_metrics.frame_scores(classifier, clips(CAPTIONS), CAPTIONS, DataConfig(digits_per_clip=2), 9)
