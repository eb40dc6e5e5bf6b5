"""Two digits apart by colour: pictures mixed by hand and real clips."""

import dataclasses
import itertools

import numpy as np
import pytest

from causvid_jax.config import ConfigError, DataConfig, VideoConfig
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.evaluation import color_separation, metrics
from tests.refusals import refused

DATA = DataConfig(digits_per_clip=2, handwriting="upright")
VIDEO = VideoConfig(height=32, width=32, frames=33)
NAMES = tuple(digits.COLORS)


def mixed(u, v, pair):
    palette = [np.array(digits.COLORS[name]) / 255 for name in pair]
    return np.maximum(u[..., None] * palette[0], v[..., None] * palette[1])


def test_pictures_of_any_two_colors_come_back():
    """All of them where both colours have a channel of their own; else what the larger colour does not hide."""
    u, v = np.random.default_rng(0).uniform(size=(2, 6, 8, 8))
    for pair in itertools.permutations(NAMES, 2):
        given = np.array([[bool(x) for x in digits.COLORS[name]] for name in pair])
        seen_u, seen_v = np.moveaxis(color_separation.unmix(mixed(u, v, pair), *pair), -1, 0)
        alone_u, alone_v = (given[0] & ~given[1]).any(), (given[1] & ~given[0]).any()
        np.testing.assert_allclose(seen_u, u if alone_u else np.maximum(u - v, 0), atol=1e-12, err_msg=str(pair))
        np.testing.assert_allclose(seen_v, v if alone_v else np.maximum(v - u, 0), atol=1e-12, err_msg=str(pair))


def test_a_digit_that_is_not_there_has_no_color():
    """A white digit alone is no yellow one in front of a blue one."""
    rng = np.random.default_rng(1)
    one = dataclasses.replace(DATA, digits_per_clip=1)
    for color in NAMES:
        clip, _ = digits.sample_clip(rng, "test", one, VIDEO, f"a {color} 3 moving left")
        names, alone = color_separation.separate(clip, NAMES)
        assert sorted(names) == sorted((color, color_separation.NO_COLOR))
        np.testing.assert_array_equal(alone[names.index(color)], clip)
    assert color_separation.separate(np.zeros_like(clip), NAMES)[0] == (
        color_separation.NO_COLOR,
        color_separation.NO_COLOR,
    )


@pytest.mark.parametrize("noise", [0, 15])
def test_the_classifier_reads_real_clips_of_two_digits(noise):
    rng = np.random.default_rng(3)
    made = [digits.sample_clip(rng, "test", DATA, VIDEO) for _ in range(64)]
    video = np.stack([clip for clip, _ in made])
    if noise:
        video = np.clip(0.8 * video + rng.normal(0, noise, video.shape), 0, 255).astype(np.uint8)
    wanted = [classifiers.target_triples(caption) for _, caption in made]
    reading = classifiers.read(classifiers.load(DATA), video, data=DATA)
    assert len(reading.features) == 128 and len(reading.triples) == 64
    scores = metrics.accuracies(reading.triples, wanted)
    assert scores["digit"] >= 0.97 and scores["color"] >= 0.98 and scores["direction"] >= 0.97
    other = metrics.accuracies(reading.triples, wanted[1:] + wanted[:1])
    assert max(other.values()) < 0.5


def test_what_was_read_is_assigned_to_what_was_wanted():
    read = [((3, "red", "up"), (4, "blue", "left")), ((3, "red", "up"), (4, "blue", "none"))]
    want = [((4, "blue", "left"), (3, "red", "up")), ((3, "red", "up"), (9, "blue", "left"))]
    assert metrics.agreement(read, want).tolist() == [[[True] * 3] * 2, [[True] * 3, [False, True, False]]]
    assert metrics.accuracies(read, want) == {"digit": 0.75, "color": 1.0, "direction": 0.75, "all": 0.5}
    refused("2 digits were read in a clip whose caption names 1", metrics.agreement, read, [((3, "red", "up"),)] * 2)


def test_two_digits_of_one_color_or_a_palette_of_one_are_refused():
    with pytest.raises(ConfigError, match="two digits of one colour .red. cannot be told apart"):
        color_separation.unmix(np.zeros((2, 3)), "red", "red")
    with pytest.raises(ConfigError, match="two digits need two colours; the classifier has red"):
        color_separation.separate(np.zeros((5, 32, 32, 3), np.uint8), ("red",))
