import dataclasses

import numpy as np
import pytest

from causvid_jax.config import ConfigError, DataConfig, VideoConfig
from causvid_jax.data import digits

DATA = DataConfig()
VIDEO = VideoConfig(height=32, width=32, frames=9)


def _shift(before, after):
    """Circular displacement (dy, dx) from one frame to another: the peak of their cross-correlation."""
    a, b = (np.fft.fft2(f.sum(-1).astype(np.float64)) for f in (before, after))
    correlation = np.fft.ifft2(b * a.conj()).real
    peak = np.unravel_index(correlation.argmax(), correlation.shape)
    return tuple(int((p + n // 2) % n - n // 2) for p, n in zip(peak, correlation.shape, strict=True))


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
@pytest.mark.parametrize("speed", [1, 2])
def test_a_digit_moves_by_its_direction_times_speed(direction, speed):
    config = dataclasses.replace(DATA, speed=speed)
    video = VideoConfig(height=32, width=48, frames=9)
    clip, _ = digits.sample_clip(np.random.default_rng(3), "train", config, video, f"a white 7 moving {direction}")
    expected = tuple(speed * d for d in digits.DIRECTIONS[direction])
    assert [_shift(clip[t], clip[t + 1]) for t in range(8)] == [expected] * 8


def test_frame_equals_a_rolled_first_frame_and_repeats_after_one_tour():
    clip = digits.sample_clip(
        np.random.default_rng(1), "train", DATA, VideoConfig(height=32, width=48, frames=97), "a red 5 moving up right"
    )[0]
    for t in (1, 20, 31, 50):
        np.testing.assert_array_equal(clip[t], np.roll(clip[0], (-t, t), axis=(0, 1)))
    assert (clip[32] != clip[0]).any()
    np.testing.assert_array_equal(clip[96], clip[0])  # 96 is the least common multiple of 32 and 48


def test_start_and_size_place_the_digit():
    images = np.ones((1, 8, 8), np.float32)
    clip = digits.render(images, digits.parse_caption("a white 8 moving left"), [(30, 2)], DATA, 1, 32, 32)[0]
    rows, columns = np.nonzero(clip.sum(-1))
    assert sorted(set(rows)) == sorted((30 + np.arange(16)) % 32)
    assert sorted(set(columns)) == list(range(2, 18))


def test_scaling_by_area_averages_and_keeps_ink_and_centre():
    weights = digits._area_matrix(20, 16)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights.sum(0), 16 / 20, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)
    np.testing.assert_allclose(digits._area_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(digits._area_matrix(8, 8), np.eye(8), atol=1e-7)


def test_all_ink_of_a_scan_is_inside_its_crop_and_centred():
    scan = np.zeros((28, 28), np.float32)
    scan[8:28, 9:17] = 1.0
    crop = digits._crop(scan)
    assert crop.shape == (20, 20) and crop.sum() == scan.sum()
    rows, columns = np.nonzero(crop)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 19, 6, 13)
    every = np.concatenate([digits.handwriting(split)[0] for split in digits.SPLITS])
    assert every[:, [0, -1]].any(axis=(1, 2)).mean() > 0.9  # nearly every digit fills the height of its box


@pytest.mark.parametrize("color", digits.COLORS)
def test_pixels_have_the_named_colour(color):
    clip = digits.sample_clip(np.random.default_rng(0), "test", DATA, VIDEO, f"a {color} 0 moving down")[0]
    assert clip.dtype == np.uint8 and clip.shape == (9, 32, 32, 3)
    peak = clip.reshape(-1, 3).max(0)
    np.testing.assert_array_equal(peak > 0, np.array(digits.COLORS[color]) > 0)
    assert peak.max() > 200  # edges are averaged by area, so few pixels are wholly ink
    assert (clip.max(-1) == 0).mean() > 0.5  # black background


def test_colours_are_far_apart():
    rgb = np.array(list(digits.COLORS.values()), float)
    gaps = np.abs(rgb[:, None] - rgb[None]).max(-1) + 255 * np.eye(len(rgb))
    assert gaps.min() == 255


def test_two_digits_overlap_by_the_brighter_channel():
    specs = digits.parse_caption("a red 3 moving left and a cyan 1 moving down")
    images = digits.handwriting("train")[0][:2]
    starts = [(0, 0), (4, 4)]
    both = digits.render(images, specs, starts, DATA, 5, 32, 32)
    alone = [digits.render(images[i : i + 1], specs[i : i + 1], starts[i : i + 1], DATA, 5, 32, 32) for i in range(2)]
    np.testing.assert_array_equal(both, np.maximum(*alone))


def test_handwriting_splits_are_disjoint_stratified_and_fixed():
    parts = {split: digits.handwriting(split) for split in digits.SPLITS}
    indices = np.concatenate([p[2] for p in parts.values()])
    assert len(indices) == len(set(indices)) == 5000
    total = np.bincount(np.concatenate([p[1] for p in parts.values()]))
    for share, (images, labels, _) in zip((0.5, 0.35, 0.15), parts.values(), strict=True):
        counts = np.bincount(labels, minlength=10)
        assert images.shape == (len(labels), 20, 20) and images.max() <= 1
        np.testing.assert_allclose(counts, share * total, atol=1)
    # No picture of one split occurs in another under another index either.
    flat = {split: {image.tobytes() for image in p[0]} for split, p in parts.items()}
    assert (
        not flat["train"] & flat["classifier"]
        and not flat["train"] & flat["test"]
        and not flat["classifier"] & flat["test"]
    )
    assert int(parts["test"][2].sum()) == 1868675


def test_upright_handwriting_has_no_slant_and_keeps_the_split_of_a_scan():
    for split in digits.SPLITS:
        images, labels, indices = digits.handwriting(split, "upright")
        _, before, every = digits.handwriting(split)
        assert set(indices) < set(every) and 0.75 < len(indices) / len(every) < 0.9
        np.testing.assert_array_equal(labels, before[np.searchsorted(every, indices)])
        assert images.shape == (len(labels), 20, 20) and images.min() >= 0 and images.max() <= 1
    rows, columns = np.indices((28, 28))
    for slope in (-0.6, 0.0, 0.4):  # a stroke of three pixels whose row y is at column 14 + slope (y - 14)
        scan = np.clip(1.5 - np.abs(columns - 14 - slope * (rows - 14)), 0, 1) * (np.abs(rows - 14) < 9)
        sheared = digits._sheared_upright(scan)
        weights = sheared / sheared.sum()
        np.testing.assert_allclose(sheared.sum(), scan.sum(), rtol=1e-6)
        np.testing.assert_allclose([(weights * rows).sum(), (weights * columns).sum()], 14, atol=1e-6)
        np.testing.assert_allclose((weights * (rows - 14) * (columns - 14)).sum(), 0, atol=1e-5)


def test_a_scan_is_legible_if_its_nearest_scans_show_its_digit():
    values = np.concatenate([np.arange(6) / 10, 5 + np.arange(6) / 10, [0.25]])  # the last is a 1 among zeros
    images = np.zeros((13, 20, 20), np.float32)
    images[:, 0, 0] = values
    labels = np.repeat([0, 1, 1], [6, 6, 1])
    np.testing.assert_array_equal(digits._legible(images, labels), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0])
    # Independently: all pairs of the real scans, one after the other.
    images, labels = digits._scans(upright=True)
    kept = digits._legible(images, labels)
    for i in range(0, 5000, 250):
        order = np.argsort(((images - images[i]) ** 2).sum((1, 2)))
        assert kept[i] == (labels[order[1:6]] == labels[i]).all()


def test_settings_are_chosen_on_captions_that_neither_training_nor_reports_have():
    config = dataclasses.replace(DATA, validation_fraction=0.05)
    parts = {split: set(digits.captions(config, split)) for split in ("train", "validation", "test", "all")}
    assert len(parts["all"]) == 560 and parts["test"] == set(digits.captions(DATA, "test"))
    assert [len(parts[split]) for split in ("train", "validation", "test")] == [476, 28, 56]
    assert parts["train"] | parts["validation"] | parts["test"] == parts["all"]
    assert digits.captions(DATA, "validation") == []
    two = dataclasses.replace(config, digits_per_clip=2)
    for caption in digits.captions(two, "validation")[::50]:
        combinations = {digits.caption_of((spec,)) for spec in digits.parse_caption(caption)}
        assert combinations & parts["validation"] and not combinations & parts["test"]


def test_held_out_combinations_never_occur_in_training_captions():
    train, test, every = (digits.captions(DATA, split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(every)) == (504, 56, 560)
    assert not set(train) & set(test) and set(train) | set(test) == set(every)
    # Every word still occurs in training, with every digit.
    assert {(s.digit, s.color) for c in train for s in digits.parse_caption(c)} == {
        (d, c) for d in range(10) for c in DATA.colors
    }
    rng = np.random.default_rng(0)
    drawn = {digits.sample_clip(rng, "train", DATA, VideoConfig(height=16, width=16, frames=1))[1] for _ in range(2000)}
    assert not drawn & set(test) and len(drawn) > 480


def test_two_digit_captions_differ_in_colour_and_respect_the_hold_out():
    config = dataclasses.replace(DATA, colors=("red", "blue", "white"), digits_per_clip=2)
    single = dataclasses.replace(config, digits_per_clip=1)
    forbidden = set(digits.captions(single, "test"))
    train, test = digits.captions(config, "train"), digits.captions(config, "test")
    assert len(train) + len(test) == 240 * 160
    assert all(not set(c.split(" and ")) & forbidden for c in train)
    assert all(set(c.split(" and ")) & forbidden for c in test)
    assert all(len({s.color for s in digits.parse_caption(c)}) == 2 for c in train[::97])


def test_captions_are_a_round_trip_in_the_vocabulary():
    words = digits.vocabulary(DATA)
    assert len(words) == len(set(words)) == 24
    for caption in digits.captions(DATA, "all"):
        assert digits.caption_of(digits.parse_caption(caption)) == caption
        assert set(caption.split()) <= set(words)
    assert digits.parse_caption("a green 7 moving up and a blue 1 moving down right") == [
        digits.Digit(7, "green", "up"),
        digits.Digit(1, "blue", "down right"),
    ]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("red 3 moving left", "must look like 'a red 3 moving left'"),
        ("", "must look like"),
        ("a red 3 moving left and", "unknown direction 'left and'"),
        ("a rde 3 moving left", "unknown color 'rde' .* did you mean 'red'"),
        ("a red 12 moving left", "unknown digit '12'"),
        ("a red 3 moving left up", "unknown direction 'left up'"),
    ],
)
def test_malformed_captions_are_refused(caption, message):
    with pytest.raises(ConfigError, match=message):
        digits.parse_caption(caption)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colors": ("red", "brown")}, "brown"),
        ({"colors": ("red", "red")}, "distinct"),
        ({"digits_per_clip": 3}, "digits_per_clip is 3; accepted: at least 1 and at most 2"),
        ({"held_out_fraction": 0.9}, "held_out_fraction is 0.9"),
        ({"held_out_fraction": 0.0008}, "held_out_fraction is 0.0008, less than one of 560 combinations; .* 0.0018"),
        ({"validation_fraction": 0.0008}, "validation_fraction is 0.0008, less than one"),
        ({"speed": 0}, "speed is 0"),
        ({"digit_size": 64}, "digit_size is 64"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        digits.sample_clip(np.random.default_rng(0), "train", dataclasses.replace(DATA, **change), VIDEO)
