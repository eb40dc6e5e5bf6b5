"""Measure clips of one digit frame by frame.

The mean over the frames of a clip hides single frames of another digit. Here every frame with a fully visible digit
counts: no stroke touches the frame's edge, where the digit wraps around.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from causvid_jax.config import DataConfig, require
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as classifiers

BLOCK = 12
"""Frames of the windows of :func:`identity_kept`."""
RESAMPLES = 1000
"""Resamples of a bootstrap interval."""
EDGE_INK = 64
"""Minimum brightness (0 to 255) of a pixel at the frame's edge that counts as stroke."""


@dataclasses.dataclass(frozen=True, eq=False)
class FrameReading:
    """Predictions of the classifier for every frame of B clips.

    Attributes:
        log_probs: of the digits, ``[B, T, 10]``.
        colors: index into the classifier's colours, ``[B, T]``.
        visible: whether the digit is fully visible, ``[B, T]``.
    """

    log_probs: np.ndarray
    colors: np.ndarray
    visible: np.ndarray


def read_frames(classifier: classifiers.Classifier, video: np.ndarray) -> FrameReading:
    """Read every frame of uint8 clips ``[B, T, H, W, 3]``."""
    edge = [video[:, :, [0, -1]].max(axis=(2, 3, 4)), video[:, :, :, [0, -1]].max(axis=(2, 3, 4))]
    log_probs, colors = [], []
    for clip in video:  # one clip at a time: a long stream has thousands of frames
        frames = clip.astype(np.float32)
        logits = classifiers.frame_logits(classifier, frames / 255.0)
        log_probs.append(np.asarray(jax.nn.log_softmax(logits)))
        colors.append(classifiers.nearest_colors(frames, classifier.colors, axis=(-3, -2)))
    return FrameReading(np.stack(log_probs), np.stack(colors), np.maximum(*edge) < EDGE_INK)


def displacements(video: np.ndarray) -> np.ndarray:
    """Return ``classifiers.displacements`` in pixels of every uint8 clip ``[B, T, H, W, 3]``: ``[B, T - GAP, 2]``."""
    return np.stack([classifiers.displacements(clip) for clip in video])


def direction_pairs(peaks: np.ndarray, directions: Sequence[str], speed: int) -> np.ndarray:
    """Return the share ``[B]`` of frame pairs, ``classifiers.GAP`` apart, that move in the clip's direction.

    ``peaks`` are those of :func:`displacements`, ``directions`` one name per clip, ``speed`` pixels per frame. The
    peak of a pair may differ from the expected displacement by a quarter of its length.
    """
    reach = classifiers.GAP * speed
    targets = reach * np.array([digits.DIRECTIONS[direction] for direction in directions])
    return (np.abs(peaks - targets[:, None]).max(axis=-1) <= reach / 4).mean(axis=1)


def motion(peaks: np.ndarray, speed: int) -> np.ndarray:
    """Return the mean length ``[B]`` of :func:`displacements` over that of ``speed`` pixels per frame; 0 is frozen.

    The length of a displacement is its larger component, as digits move ``speed`` pixels along each moving axis.
    """
    return np.abs(peaks).max(axis=-1).mean(axis=1) / (classifiers.GAP * speed)


def sharpness(video: np.ndarray) -> np.ndarray:
    """Return the gradient energy of the strokes ``[B]`` of uint8 clips: ``sum |grad g|^2 / sum g^2``, g gray values.

    Blur lowers it, noise raises it. :func:`relative_sharpness` compares it with real clips.
    """
    values = []
    for clip in video:
        gray = clip.astype(np.float32).mean(axis=-1)
        energy = sum((np.roll(gray, 1, axis=axis) - gray) ** 2 for axis in (1, 2))
        values.append(float(np.sum(energy)) / max(float(np.sum(gray**2)), 1.0))
    return np.array(values)


def relative_sharpness(values: np.ndarray, digits: Sequence[int], real: Mapping[int, float]) -> np.ndarray:
    """Return sharpness values ``[B]`` divided by those of real clips: 1 is as sharp as real handwriting.

    Each clip is compared with real clips of its own digit. The digits differ: the gradient energy of a real 5 is 1.3
    times that of a real 0.

    Args:
        values: of :func:`sharpness`.
        digits: one per clip.
        real: mean of :func:`sharpness` over real clips of each digit.
    """
    return values / np.array([real[digit] for digit in digits])


def identity_kept(reading: FrameReading) -> np.ndarray:
    """Return for each clip whether all of its windows of :data:`BLOCK` frames are read as one digit, bool ``[B]``."""
    same = []
    for log_probs, visible in zip(reading.log_probs, reading.visible, strict=True):
        read = set()
        for start in range(0, len(visible), BLOCK):
            part = slice(start, start + BLOCK)
            if visible[part].any():
                read.add(int(log_probs[part][visible[part]].mean(axis=0).argmax()))
        same.append(len(read) <= 1)
    return np.array(same)


def error_by_frame(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the mean square error of every frame index ``[T]`` over all clips ``[B, T, H, W, 3]``."""
    return np.mean((video.astype(np.float32) - reference.astype(np.float32)) ** 2, axis=(0, 2, 3, 4))


def psnr(error: np.ndarray, span: float = 255.0) -> np.ndarray:
    """Return the PSNR in dB of mean square errors, ``10 log10(span^2 / error)``; ``span`` is the range of values."""
    return 10 * np.log10(span**2 / np.maximum(error, 1e-12 * span**2))


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean of one value per clip and its 95 % bootstrap interval over clips (Efron 1979).

    NaN marks a clip without a value.
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return _summary(np.nan, [np.nan])
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return _summary(values.mean(), values[picks].mean(axis=1))


def nested_interval(groups: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the mean over groups (training seeds) of clips, and its 95 % bootstrap interval over both levels.

    Each resample draws groups with replacement, then clips within each of them (Davison and Hinkley 1997, section 3.8).
    NaN marks a clip without a value.
    """
    values = [np.asarray(group, np.float64) for group in groups]
    values = [group[~np.isnan(group)] for group in values]
    values = [group for group in values if len(group)]
    if not values:
        return _summary(np.nan, [np.nan])
    rng = np.random.default_rng(0)
    means = [
        np.mean([rng.choice(values[i], len(values[i])).mean() for i in rng.integers(len(values), size=len(values))])
        for _ in range(RESAMPLES)
    ]
    return _summary(np.mean([group.mean() for group in values]), means)


def _summary(mean: Any, resampled: Any) -> dict[str, float]:
    """Return a mean with the 95 % interval of its resampled values."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def frame_scores(
    classifier: classifiers.Classifier, video: np.ndarray, captions: Sequence[str], data: DataConfig, first_block: int
) -> dict[str, dict[str, float]]:
    """Return the mean of every measure of :func:`frame_values` with its interval; arguments as there."""
    values = frame_values(classifier, video, captions, data, first_block)
    return {name: interval(value) for name, value in values.items()}


def frame_values(
    classifier: classifiers.Classifier, video: np.ndarray, captions: Sequence[str], data: DataConfig, first_block: int
) -> dict[str, np.ndarray]:
    """Return every measure of a row of clips, one value per clip ``[B]``.

    Args:
        classifier: the classifier.
        video: uint8 ``[B, T, H, W, 3]``.
        captions: one per clip, each of one digit.
        data: gives the speed.
        first_block: pixel frames of the first block.

    Returns:
        ``digit`` and ``first_block``: share of frames with a visible digit, of all and of the first block, that are
        read as the caption's digit (NaN without such a frame). ``identity``: whether all windows are read as one digit.
        ``color``: share of frames of the caption's colour. ``direction``, ``motion`` and ``sharpness``: the functions
        of these names.

    Raises:
        ConfigError: clips of two digits.
    """
    require(data.digits_per_clip == 1, f"frames are read in clips of one digit; these have {data.digits_per_clip}")
    targets = [classifiers.target_triples(caption)[0] for caption in captions]
    reading = read_frames(classifier, video)
    right = reading.log_probs.argmax(axis=-1) == np.array([digit for digit, _, _ in targets])[:, None]
    color = reading.colors == np.array([classifier.colors.index(name) for _, name, _ in targets])[:, None]
    peaks = displacements(video)
    return {
        "digit": _share(right, reading.visible),
        "first_block": _share(right[:, :first_block], reading.visible[:, :first_block]),
        "identity": identity_kept(reading),
        "color": color.mean(axis=1),
        "direction": direction_pairs(peaks, [direction for _, _, direction in targets], data.speed),
        "motion": motion(peaks, data.speed),
        "sharpness": sharpness(video),
    }


def _share(right: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the share of ``right`` among the frames that count ``[B]``; NaN where none does."""
    total = counts.sum(axis=1)
    return np.where(total > 0, (right & counts).sum(axis=1) / np.maximum(total, 1), np.nan)
