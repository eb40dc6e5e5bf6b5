"""Separate the two digits of a clip by their colours.

A clip of two digits is ``max(u a, v b)`` for each channel: ``a`` and ``b`` are two colours of the palette, vectors of
zeros and ones, and ``u`` and ``v`` in [0, 1] are the digits' pictures. For known colours this has a closed solution. A
channel of only one colour contains the picture of that colour. If all channels of a are also channels of b (red and
yellow), u is the part of these channels above v, and the part behind b is hidden.
"""

import itertools

import numpy as np

from causvid_jax.config import require
from causvid_jax.data import digits

FRAMES_READ = 8
# Penalty per unit of coverage, added to the reconstruction error. Without it white is explained as yellow over blue.
INK = 0.2
# A layer with less than this share of the other layer's coverage is ignored.
FAINT = 0.1
NO_COLOR = "none"


def spread(total: int, count: int = FRAMES_READ) -> np.ndarray:
    """Return the indices of ``count`` frames spread over a clip of ``total``, the first and the last included."""
    return np.round(np.linspace(0, total - 1, count)).astype(int)


def unmix(video: np.ndarray, first: str, second: str) -> np.ndarray:
    """Separate the digits of two colours: pixels ``[..., 3]`` in [0, 1] -> the pictures u and v ``[..., 2]`` in [0, 1].

    ``first`` and ``second`` are names in ``digits.COLORS``, with channels A and B. u is the mean of the channels that
    only A has, v that of the channels that only B has. If all channels of B are also in A, v is the mean of its
    channels minus u, at least 0. If all channels of A are also in B, the roles change.

    Raises:
        ConfigError: twice the same colour.
    """
    require(first != second, f"two digits of one colour ({first}) cannot be told apart")
    a, b = (np.array(digits.COLORS[name]) > 0 for name in (first, second))
    own_a, own_b = a & ~b, b & ~a
    if not own_a.any():
        return unmix(video, second, first)[..., ::-1]
    u = video[..., own_a].mean(axis=-1)
    v = video[..., own_b].mean(axis=-1) if own_b.any() else np.maximum(video[..., b].mean(axis=-1) - u, 0.0)
    return np.stack([u, v], axis=-1)


def find_colors(clip: np.ndarray, colors: tuple[str, ...]) -> tuple[str, str]:
    """Return the two colours with the least mean error plus coverage penalty, over frames spread over a clip.

    Only pixels at least half as bright as the brightest pixel of their frame count, because any two colours without a
    common channel would explain the noise around the digits.

    Args:
        clip: ``[T, H, W, 3]`` in [0, 1].
        colors: names in ``digits.COLORS``, at least two.

    Raises:
        ConfigError: fewer than two colours.
    """
    require(len(colors) > 1, f"two digits need two colours; the classifier has {', '.join(colors)}")
    frames = clip[spread(len(clip))]
    value = frames.max(axis=-1)
    bright = frames[value >= np.maximum(0.5 * value.max(axis=(1, 2), keepdims=True), 1.0 / 255.0)]  # [N, 3]
    costs = {}
    for pair in itertools.combinations(colors, 2):
        layers = unmix(bright, *pair)
        palette = np.array([digits.COLORS[name] for name in pair], np.float32) / 255.0
        error = np.abs((layers[..., None] * palette).max(axis=-2) - bright).sum()
        costs[pair] = float(error / 3 + INK * layers.sum() / 2)
    return min(costs, key=costs.__getitem__)


def separate(clip: np.ndarray, colors: tuple[str, ...]) -> tuple[tuple[str, str], np.ndarray]:
    """Return the colours of a clip's two digits, and a clip of each digit alone on black.

    Args:
        clip: uint8 ``[T, H, W, 3]``.
        colors: names in ``digits.COLORS``, at least two.

    Returns:
        two names, :data:`NO_COLOR` for an absent digit, and uint8 ``[2, T, H, W, 3]``.
    """
    video = clip.astype(np.float32) / 255.0
    pair = find_colors(video, colors)
    layers = unmix(video, *pair)
    ink = layers.mean(axis=(0, 1, 2)).tolist()
    names = tuple(name if own >= FAINT * max(ink) > 0 else NO_COLOR for name, own in zip(pair, ink, strict=True))
    palette = np.array([digits.COLORS[name] for name in pair], np.float32)
    alone = np.stack([np.round(layers[..., i, None] * palette[i]) for i in range(2)]).astype(np.uint8)
    return (names[0], names[1]), alone
