"""Pixels and rates: conversions between files and arrays."""

from fractions import Fraction

import numpy as np
from PIL import Image

from causvid_jax.config import require

MAX_PIXELS = 2**27
"""Largest frame or picture that is decoded (134 megapixels), checked against the file's header."""


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Return float pixels in [-1, 1] as uint8: ``round(127.5 (x + 1))``, clipped.

    Raises:
        ConfigError: NaN or infinity, which would become black.
    """
    video = np.asarray(video, np.float32)
    require(
        np.isfinite(video).all(),
        "the frames are not finite (NaN or infinity); the weights or the latents that made them are damaged",
    )
    return np.clip(np.rint((video + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_float(video: np.ndarray) -> np.ndarray:
    """Return uint8 pixels as float32 in [-1, 1]: ``x / 127.5 - 1``."""
    return np.asarray(video, np.float32) / 127.5 - 1.0


def frame_rate(fps: float) -> Fraction:
    """Return frames per second as a fraction; 23.976, 29.97 and 59.94 are 24000/1001, 30000/1001 and 60000/1001."""
    whole = round(fps * 1.001)
    if fps != round(fps) and whole and abs(fps * 1.001 - whole) < 1e-3:
        return Fraction(1000 * whole, 1001)
    return Fraction(fps).limit_denominator(1001)


def cover(image: Image.Image, height: int, width: int, aspect: float = 1.0) -> np.ndarray:
    """Return the picture scaled to cover ``height x width`` and cropped at the centre, uint8 ``[height, width, 3]``.

    ``aspect`` is a pixel's width over its height.
    """
    scale = max(height / image.height, width / (image.width * aspect))
    size = max(width, round(image.width * aspect * scale)), max(height, round(image.height * scale))
    # Area averaging inverts ``upscale`` exactly.
    image = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)), np.uint8)
