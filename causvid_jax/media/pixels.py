"""Convert pixels and frame rates between files and arrays."""

import functools
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from causvid_jax.config import require

if TYPE_CHECKING:
    import jax

MAX_PIXELS = 2**27
"""Largest frame or picture that is decoded (134 megapixels), checked against the file's header."""


def to_uint8(video: "np.ndarray | jax.Array", what: str = "the frames") -> np.ndarray:
    """Return float pixels in [-1, 1], of any shape, as uint8: ``round(127.5 (x + 1))``, clipped to [0, 255].

    An array on an accelerator is converted there, since this copies a quarter of the bytes. ``what`` is the name of the
    array in the error.

    Raises:
        ConfigError: a NaN or an infinity.
    """
    if accelerated := _is_accelerated(video):
        pixels, finite = _device_conversion()(video)
    else:
        video = np.asarray(video, np.float32)
        finite = np.isfinite(video).all()
    require(
        bool(finite),
        f"{what} are not finite (NaN or infinity); the weights or the latents that made them are damaged",
    )
    # A copy: callers write to it, and an array of JAX is read-only.
    return np.array(pixels) if accelerated else _scale(video, np)


def _scale(video: Any, numpy: Any) -> Any:
    """Scale finite pixels to uint8 by ``numpy`` or ``jax.numpy``; both give the same bits."""
    return numpy.clip(numpy.rint((video + 1.0) * 127.5), 0, 255).astype(numpy.uint8)


def _is_accelerated(video: Any) -> bool:
    devices = getattr(video, "devices", None)
    return callable(devices) and any(device.platform != "cpu" for device in devices())


@functools.cache
def _device_conversion() -> Any:
    # Imported here: reading and writing files needs no JAX.
    import jax
    import jax.numpy as jnp

    def convert(video: Any) -> tuple[Any, Any]:
        video = video.astype(jnp.float32)
        return _scale(video, jnp), jnp.isfinite(video).all()

    return jax.jit(convert)


def to_float(video: np.ndarray) -> np.ndarray:
    """Return uint8 pixels, of any shape, as float32 in [-1, 1]: ``x / 127.5 - 1``.

    Raises:
        ConfigError: pixels of another type, such as floats in [0, 1].
    """
    kind = np.asarray(video).dtype
    require(kind == np.uint8, f"the pixels are of type {kind}; they must be uint8, from 0 to 255")
    return np.asarray(video, np.float32) / 127.5 - 1.0


def frame_rate(fps: float) -> Fraction:
    """Return frames per second as a fraction, at least 1/1001.

    23.976, 29.97 and 59.94 are 24000/1001, 30000/1001 and 60000/1001.
    """
    whole = round(fps * 1.001)
    if fps != round(fps) and whole and abs(fps * 1.001 - whole) < 1e-3:
        return Fraction(1000 * whole, 1001)
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))


def cover(image: Image.Image, height: int, width: int, aspect: float = 1.0) -> np.ndarray:
    """Return the RGB picture scaled to cover ``height x width`` and cropped at the centre, uint8 [height, width, 3].

    ``aspect`` is the width of a pixel of the picture divided by its height. Reduction averages by area, enlargement is
    bicubic.
    """
    scale = max(height / image.height, width / (image.width * aspect))
    size = max(width, round(image.width * aspect * scale)), max(height, round(image.height * scale))
    # Area averaging inverts ``upscale`` exactly.
    image = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)), np.uint8)
