"""The classifier: the committed classifier on real clips, direction and colour on motion made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import ConfigError, DataConfig, VideoConfig
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.evaluation import train_classifier
from tests.refusals import refused

DATA = DataConfig(handwriting="upright")
VIDEO = VideoConfig(height=32, width=32, frames=17)


@pytest.fixture(scope="module")
def blob():
    """A frame [32, 32, 3] with an irregular bright shape."""
    frame = np.zeros((32, 32, 3), np.uint8)
    frame[3:15, 5:9] = frame[11:15, 5:17] = 200
    return frame


def moving(frame, dy, dx, frames=24):
    return np.stack([np.roll(frame, (dy * t, dx * t), (0, 1)) for t in range(frames)])


def clips_of(split, count, seed):
    rng = np.random.default_rng(seed)
    pairs = [digits.sample_clip(rng, split, DATA, VIDEO) for _ in range(count)]
    return np.stack([video for video, _ in pairs]), [caption for _, caption in pairs]


def test_committed_classifier_reads_real_clips_of_every_attribute():
    """Read 96 clips in handwriting of the test split, and 96 in that of the generators; the classifier saw neither."""
    trained = classifiers.load(DATA)
    for split, least in (("test", 0.94), ("train", 0.94)):
        video, captions = clips_of(split, 96, seed=5)
        right = np.array(
            [
                [a == b for a, b in zip(read, classifiers.target_triples(c)[0], strict=True)]
                for (read,), c in zip(classifiers.read(trained, video, data=DATA).triples, captions, strict=True)
            ]
        )
        assert right[:, 0].mean() >= least
        assert right[:, 1:].all()


def test_digit_does_not_depend_on_position_on_the_torus():
    """A shift by a multiple of the network's stride of 4 pixels changes nothing but rounding."""
    trained = classifiers.load(DATA)
    video, _ = clips_of("test", 4, seed=1)
    log_probs, features = classifiers.read_digits(trained, video)
    for shift in ((4, 12), (-8, 20)):
        again, features_again = classifiers.read_digits(trained, np.roll(video, shift, axis=(2, 3)))
        np.testing.assert_allclose(again, log_probs, atol=1e-4)
        np.testing.assert_allclose(features_again, features, atol=1e-4)


@pytest.mark.parametrize("name", digits.DIRECTIONS)
@pytest.mark.parametrize("speed", [1, 2])
def test_direction_of_motion_round_the_edges(blob, name, speed):
    """24 frames at 2 pixels per frame leave the 32-pixel frame and come back at the other side."""
    dy, dx = digits.DIRECTIONS[name]
    video = moving(blob, speed * dy, speed * dx)[None]
    assert classifiers.read_directions(video, speed) == (name,)
    noisy = np.clip(video + np.random.default_rng(0).normal(0, 20, video.shape), 0, 255).astype(np.uint8)
    assert classifiers.read_directions(noisy, speed) == (name,)


def test_no_direction_where_nothing_moves_as_a_caption_says(blob):
    still = moving(blob, 0, 0)
    fast = moving(blob, 0, 3)
    rng = np.random.default_rng(0)
    jumping = np.stack([np.roll(blob, tuple(rng.integers(32, size=2)), (0, 1)) for _ in range(24)])
    back_and_forth = np.concatenate([moving(blob, 0, 1, 12), moving(blob, 0, 1, 12)[::-1]])
    # A jump at every border of 12-frame blocks: inside each block the motion is right.
    parts = np.concatenate([np.roll(moving(blob, 0, 1, 12), (9 * i, 14 * i), (1, 2)) for i in range(2)])
    video = np.stack([still, fast, jumping, back_and_forth, parts, np.zeros_like(still)])
    assert classifiers.read_directions(video, 1) == ("none",) * len(video)


def test_direction_needs_room_on_the_torus(blob):
    refused("speed 4 moves 16 pixels", classifiers.read_directions, moving(blob, 0, 4)[None], 4)
    refused("more than 4 frames", classifiers.read_directions, moving(blob, 0, 1, 4)[None], 1)


def test_color_is_read_dim_noisy_and_blurred(blob):
    names = tuple(digits.COLORS)
    shape = blob[None, None, ..., :1].astype(np.float32) / 255
    blurred = (np.roll(shape, 1, 2) + shape + np.roll(shape, -1, 3)) / 3
    colors = np.array([digits.COLORS[n] for n in names], np.float32)[:, None, None, None]
    noise = np.random.default_rng(0).normal(0, 10, (len(names), 8, 32, 32, 3))
    video = np.clip(0.6 * blurred * colors + 5 + noise, 0, 255).astype(np.uint8)
    assert classifiers.read_colors(video, names) == names


def test_wanted_is_what_the_caption_says():
    assert classifiers.target_triples("a red 3 moving up left") == ((3, "red", "up left"),)
    assert classifiers.target_triples("a red 3 moving left and a blue 1 moving up") == (
        (3, "red", "left"),
        (1, "blue", "up"),
    )


def test_saved_classifier_is_the_same_and_refuses_other_data(tmp_path):
    params = classifiers.init(0, 2)
    path = tmp_path / "classifier.safetensors"
    classifiers.save(path, classifiers.Classifier(params, ("red", "blue"), 16))
    data = DataConfig(colors=("red", "blue"))
    again = classifiers.load(data, path)
    assert again.colors == ("red", "blue")
    np.testing.assert_allclose(again.params["conv1"]["kernel"], params["conv1"]["kernel"], rtol=1e-3, atol=1e-6)
    with pytest.raises(ConfigError, match="digits of 16 pixels, the recipe has 20"):
        classifiers.load(DataConfig(colors=("red", "blue"), digit_size=20), path)
    refused("'white'", classifiers.load, DataConfig(colors=("red", "white")), path)
    upright = DataConfig(colors=("red", "blue"), handwriting="upright")
    refused("reads 'mnist' handwriting, the recipe has 'upright'", classifiers.load, upright, path)
    classifiers.save(path, dataclasses.replace(again, handwriting="upright"))
    assert classifiers.load(upright, path).handwriting == "upright"


def test_training_is_deterministic():
    first = train_classifier.train(DATA, VIDEO, steps=4, log=lambda step, loss: None)
    second = train_classifier.train(DATA, VIDEO, steps=4, log=lambda step, loss: None)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_augmented_digit_keeps_its_ink_on_the_torus():
    """Placed anywhere, also across edges, a square of ink covers its area times the drawn stretch."""
    mask = jnp.pad(jnp.ones((8, 8)), 4)
    place = jax.jit(jax.vmap(lambda k: train_classifier.place(k, mask, 32, 32)))
    ink = np.asarray(place(jax.random.split(jax.random.key(0), 64))).sum(axis=(1, 2))
    assert np.all((ink > 64 * np.exp(-0.35)) & (ink < 64 * np.exp(0.35)))
    assert abs(np.log(ink / 64).mean()) < 0.08
