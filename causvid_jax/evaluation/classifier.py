"""Classify moving-digits clips: digit, colour and direction.

A small convolutional network reads the digit. It was trained on handwriting of the split ``"classifier"``, which
neither the generators nor the real test clips show. Two formulas without learning read the rest: the colour is that of
the brightest pixels, and the direction is the peak of a circular cross-correlation. Frames wrap around at their edges,
so the convolutions are circular. Two digits of a clip are separated by colour first and then read one by one
(:mod:`causvid_jax.evaluation.color_separation`).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from causvid_jax.checkpoints import store
from causvid_jax.config import DataConfig, require
from causvid_jax.data import digits
from causvid_jax.evaluation import color_separation

DEFAULT_PATH = pathlib.Path(__file__).resolve().parent.parent / "assets" / "classifier.safetensors"

# (name, output channels, stride); the input is 2x2 pixels folded into channels, so strides 1, 2, 1, 1 end at H / 4.
LAYERS = (("conv0", 32, 1), ("conv1", 64, 2), ("conv2", 64, 1), ("conv3", 64, 1))
FEATURES = 32
# Direction is read between frames this far apart, and at least this share of the pairs must agree.
GAP = 4
AGREE = 0.85
NO_DIRECTION = "none"


def init(seed: int, colors: int) -> dict[str, dict[str, np.ndarray]]:
    """Return He-normal weights of the classifier for 10 digits and ``colors`` colours: layer to kernel and bias.

    Kernels are N(0, 2 / fan_in) (He et al. 2015, arXiv 1502.01852), biases 0.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    width = 12
    for name, channels, _ in LAYERS:
        shapes[name], width = (3, 3, width, channels), channels
    shapes |= {"features": (2 * width, FEATURES), "digit": (FEATURES, 10), "color": (FEATURES, colors)}
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": (rng.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[:-1]))).astype(np.float32),
            "bias": np.zeros(shape[-1], np.float32),
        }
        for name, shape in shapes.items()
    }


def classify(params: dict[str, Any], frames: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logits and features of single frames.

    Args:
        params: as from :func:`init`.
        frames: ``[N, H, W, 3]`` in [0, 1]; H and W are multiples of 4.

    Returns:
        digit logits ``[N, 10]``, colour logits ``[N, colors]``, features ``[N, FEATURES]`` (the penultimate layer).
    """
    x = rearrange(frames, "n (h p) (w q) c -> n h w (p q c)", p=2, q=2)
    for name, _, stride in LAYERS:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[name]["bias"])
    pooled = jnp.concatenate([reduce(x, "n h w c -> n c", "max"), reduce(x, "n h w c -> n c", "mean")], axis=-1)

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"] + params[name]["bias"]

    features = jax.nn.relu(dense("features", pooled))
    return dense("digit", features), dense("color", features), features


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier.

    Attributes:
        params: as in :func:`init`.
        colors: names of the colours that it was trained on.
        digit_size: side in pixels of the digits that it was trained on.
        handwriting: kind of handwriting (``data.handwriting``) that it was trained on.
    """

    params: dict[str, Any]
    colors: tuple[str, ...]
    digit_size: int
    handwriting: str = "mnist"


Triple = tuple[int, str, str]
"""A digit, its colour, its direction."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Predictions of the classifier for B clips of n digits, one row per digit; the digits of a clip are adjacent.

    Attributes:
        digits: int ``[B n]``, 0 to 9.
        colors: B n names.
        directions: B n names, ``"none"`` where no caption describes the motion.
        features: means over frames ``[B n, FEATURES]``.
        log_probs: means over frames of the digits' log-probabilities ``[B n, 10]``.
        count: the number n of digits of a clip.
    """

    digits: np.ndarray
    colors: tuple[str, ...]
    directions: tuple[str, ...]
    features: np.ndarray
    log_probs: np.ndarray
    count: int

    @property
    def triples(self) -> list[tuple[Triple, ...]]:
        """The n triples of each clip."""
        flat = list(zip(self.digits.tolist(), self.colors, self.directions, strict=True))
        return [tuple(flat[i : i + self.count]) for i in range(0, len(flat), self.count)]


def target_triples(caption: str) -> tuple[Triple, ...]:
    """Return the triples (digit, colour, direction) that ``caption`` names, in its order.

    Raises:
        ConfigError: a text that is no caption of moving digits.
    """
    return tuple((spec.digit, spec.color, spec.direction) for spec in digits.parse_caption(caption))


def save(path: str | pathlib.Path, classifier: Classifier) -> None:
    """Write a classifier as safetensors, in half precision."""
    metadata = {
        "colors": " ".join(classifier.colors),
        "digit_size": str(classifier.digit_size),
        "handwriting": classifier.handwriting,
    }
    store.save_params(path, classifier.params, metadata, dtype="float16")


def load(data: DataConfig, path: str | pathlib.Path = DEFAULT_PATH) -> Classifier:
    """Load a classifier for the digits and colours of ``data``; the default is that of the package.

    Raises:
        ConfigError: no such file, one that is no classifier, or one for other digits or fewer colours.
    """
    params, metadata = store.load_params(path)
    require({"colors", "digit_size"} <= set(metadata), f"weights file {path} is not a classifier")
    handwriting = metadata.get("handwriting", "mnist")  # older files do not say it
    classifier = Classifier(params, tuple(metadata["colors"].split()), int(metadata["digit_size"]), handwriting)
    train_one = "train one with causvid evaluate --train_classifier"
    require(
        classifier.digit_size == data.digit_size,
        f"the classifier {path} reads digits of {classifier.digit_size} pixels, the recipe has {data.digit_size}; "
        f"{train_one}",
    )
    require(
        classifier.handwriting == data.handwriting,
        f"the classifier {path} reads {classifier.handwriting!r} handwriting, the recipe has {data.handwriting!r}; "
        f"{train_one}",
    )
    unknown = [name for name in data.colors if name not in classifier.colors]
    require(
        not unknown,
        f"the classifier {path} knows the colours {', '.join(classifier.colors)}; the recipe also has {unknown}",
    )
    return classifier


_classify = jax.jit(classify)


def frame_logits(classifier: Classifier, frames: np.ndarray) -> jax.Array:
    """Return the digit logits ``[N, 10]`` of float frames ``[N, H, W, 3]`` in [0, 1]."""
    return _classify(classifier.params, frames)[0]


def read_digits(classifier: Classifier, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean log-probabilities of the digits ``[B, 10]`` and mean features ``[B, FEATURES]`` of clips.

    The mean is over ``color_separation.FRAMES_READ`` frames spread over each uint8 clip ``[B, T, H, W, 3]``.
    """
    frames = rearrange(
        video[:, color_separation.spread(video.shape[1])].astype(np.float32) / 255.0, "b t h w c -> (b t) h w c"
    )
    logits, _, features = _classify(classifier.params, frames)
    log_probs, features = (
        np.asarray(reduce(x, "(b t) d -> b d", "mean", t=color_separation.FRAMES_READ))
        for x in (jax.nn.log_softmax(logits), features)
    )
    return log_probs, features


def read_colors(video: np.ndarray, colors: tuple[str, ...]) -> tuple[str, ...]:
    """Return the colour of each clip's digit: of ``colors``, the one at the smallest angle to the mean bright pixel.

    Bright is at least half of the frame's brightest value. Angles ignore brightness, so a dim digit keeps its colour.

    Args:
        video: uint8 ``[B, T, H, W, 3]``.
        colors: names in ``digits.COLORS``.
    """
    frames = video[:, color_separation.spread(video.shape[1])].astype(np.float32)
    return tuple(colors[i] for i in nearest_colors(frames, colors, axis=(-4, -3, -2)))


def nearest_colors(frames: np.ndarray, colors: Sequence[str], axis: tuple[int, ...]) -> np.ndarray:
    """Return the index into ``colors`` at the smallest angle to the mean bright pixel, the mean taken over ``axis``.

    Args:
        frames: float ``[..., H, W, 3]``. Bright is at least half of the frame's brightest value.
        colors: names in ``digits.COLORS``.
        axis: ``(-3, -2)`` reads every frame, ``(-4, -3, -2)`` every clip ``[..., T, H, W, 3]``.
    """
    value = frames.max(axis=-1, keepdims=True)
    bright = value >= np.maximum(0.5 * value.max(axis=(-3, -2), keepdims=True), 1.0)
    mean = (frames * bright).sum(axis=axis) / np.maximum(bright.sum(axis=axis), 1)
    palette = np.array([digits.COLORS[name] for name in colors], np.float32)
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    return np.argmax(mean @ palette.T, axis=-1)


def _peak(surface: np.ndarray) -> np.ndarray:
    """Return the displacement ``[..., 2]`` (dy, dx) of the highest point of circular correlations ``[..., H, W]``."""
    height, width = surface.shape[-2:]
    flat = np.argmax(surface.reshape(*surface.shape[:-2], height * width), axis=-1)
    shift = np.stack(np.unravel_index(flat, (height, width)), axis=-1)
    size = np.array([height, width])
    return (shift + size // 2) % size - size // 2


def _correlations(clip: np.ndarray) -> np.ndarray:
    """Return the circular cross-correlations of frames :data:`GAP` apart: ``[T, H, W, 3]`` -> ``[T - GAP, H, W]``."""
    gray = clip.astype(np.float32).mean(axis=-1)
    spectra = np.fft.rfft2(gray - gray.mean(axis=(1, 2), keepdims=True))
    return np.fft.irfft2(spectra[GAP:] * spectra[:-GAP].conj(), s=gray.shape[1:])


def displacements(clip: np.ndarray) -> np.ndarray:
    """Return the displacement (dy, dx) in pixels of frames :data:`GAP` apart: ``[T, H, W, 3]`` -> ``[T - GAP, 2]``.

    It is the peak of the circular cross-correlation of their gray values, which frames that wrap around make exact.
    """
    return _peak(_correlations(clip))


def read_directions(video: np.ndarray, speed: int) -> tuple[str, ...]:
    """Return the direction of each clip's motion, or ``"none"`` where no caption describes it.

    The circular cross-correlation of two frames ``GAP`` apart has its peak at the displacement between them. A
    direction is accepted if the peak of the mean over all such pairs is near ``GAP * speed`` pixels along it, and if at
    least ``AGREE`` of the pairs have their own peak there. A digit that does not move, or jumps, gives ``"none"``.

    Args:
        video: uint8 ``[B, T, H, W, 3]``, T > GAP.
        speed: pixels per frame along each moving axis.

    Raises:
        ConfigError: a clip of at most GAP frames, or a displacement of half the frame or more.
    """
    reach = GAP * speed
    require(video.shape[1] > GAP, f"direction needs more than {GAP} frames; the clip has {video.shape[1]}")
    require(
        2 * reach < min(video.shape[2:4]),
        f"a digit of speed {speed} moves {reach} pixels in {GAP} frames, too far to tell its direction on a torus of "
        f"{video.shape[2]}x{video.shape[3]}",
    )
    names = list(digits.DIRECTIONS)
    targets = reach * np.array([digits.DIRECTIONS[name] for name in names])  # [8, 2]
    result = []
    for clip in video:  # one clip at a time: the spectra of a long clip are large
        surfaces = _correlations(clip)
        distance = np.abs(_peak(surfaces.mean(axis=0)) - targets).max(axis=-1)
        best = int(np.argmin(distance))
        near = np.abs(_peak(surfaces) - targets[best]).max(axis=-1) <= reach / 4
        moves = distance[best] <= reach / 4 and near.mean() >= AGREE
        result.append(names[best] if moves else NO_DIRECTION)
    return tuple(result)


def read(classifier: Classifier, video: np.ndarray, *, data: DataConfig) -> Reading:
    """Read digits, colours and directions of clips.

    Args:
        classifier: of :func:`load`.
        video: uint8 ``[B, T, H, W, 3]``.
        data: gives ``speed`` in pixels per frame, and ``digits_per_clip``.

    Raises:
        ConfigError: clips of more than two digits, and the errors of :func:`read_directions`.
    """
    count = data.digits_per_clip
    require(count in (1, 2), f"the classifier reads clips of one or two digits; data.digits_per_clip is {count}")
    if count == 1:
        colors = read_colors(video, classifier.colors)
    else:
        apart = [color_separation.separate(clip, classifier.colors) for clip in video]
        colors = tuple(name for names, _ in apart for name in names)
        video = np.concatenate([alone for _, alone in apart])
    log_probs, features = read_digits(classifier, video)
    return Reading(
        digits=log_probs.argmax(axis=-1),
        colors=colors,
        directions=read_directions(video, data.speed),
        features=features,
        log_probs=log_probs,
        count=count,
    )
