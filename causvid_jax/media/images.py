"""Pictures, read as a viewer shows them: upright, in sRGB, without transparency."""

import io
import logging
import pathlib
import struct
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms, ImageOps

from causvid_jax.config import ConfigError, require
from causvid_jax.media.pixels import MAX_PIXELS, cover

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
"""Formats that are opened. Pillow decodes some others by external programs."""
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, struct.error,
)  # fmt: skip
"""Exceptions of Pillow for damaged files."""
_LOG = logging.getLogger(__name__)


def read_image(path: str | pathlib.Path, height: int, width: int) -> np.ndarray:
    """Return a picture scaled to cover the size and cropped at the centre, uint8 ``[height, width, 3]`` in sRGB.

    EXIF orientation and colour profile are applied. Transparency is composited over white, and only the first frame of
    an animation is read; both are logged.

    Raises:
        ConfigError: no such file, a format that is not in :data:`FORMATS`, more than :data:`MAX_PIXELS` pixels, values
            that are not finite, or a damaged file.
    """
    return _read(path, lambda image: cover(image, height, width))


def read_picture(path: str | pathlib.Path) -> np.ndarray:
    """Return a picture at its own size, uint8 ``[h, w, 3]``; colours and errors as in :func:`read_image`."""
    return _read(path, lambda image: np.asarray(image, np.uint8))


def _read(path: str | pathlib.Path, use: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    path = pathlib.Path(path)
    require(path.is_file(), f"image {str(path)!r} does not exist")
    try:
        with warnings.catch_warnings():
            # The size is checked here, more strictly than by Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _check_size(path, image.width * image.height)
                if getattr(image, "n_frames", 1) > 1:
                    _LOG.warning("image %s is animated; its first frame is read", path)
                return use(_display(image, path))
    except Image.DecompressionBombError:
        _check_size(path, None)
        raise
    except ConfigError:
        raise
    except _DAMAGE as error:
        raise ConfigError(
            f"cannot read image {str(path)!r}: it is damaged or not one of the accepted kinds ({', '.join(FORMATS)})"
        ) from error


def _check_size(path: pathlib.Path, pixels: int | None) -> None:
    count = "too many" if pixels is None else f"{pixels / 1e6:.0f} million"
    require(
        pixels is not None and 0 < pixels <= MAX_PIXELS,
        f"image {str(path)!r} has {count} pixels; at most {MAX_PIXELS // 10**6} million are accepted",
    )


def _display(image: Image.Image, path: pathlib.Path) -> Image.Image:
    """Return the RGB picture that a viewer shows."""
    profile = image.info.get("icc_profile")
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I") or picture.mode == "F":
        return _from_high_depth(picture, path)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            _LOG.warning("image %s is transparent; it is composited over white", path)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return _to_srgb(picture.convert("RGB"), profile)
    if picture.mode == "CMYK" and profile:
        return _to_srgb(picture, profile)
    return _to_srgb(picture.convert("RGB"), profile)


def _from_high_depth(picture: Image.Image, path: pathlib.Path) -> Image.Image:
    """Return a grey picture of 16 bits or floats (in [0, 1]) as RGB; Pillow's own conversion clips at 255."""
    values = np.asarray(picture, np.float64)
    require(np.isfinite(values).all(), f"image {str(path)!r} has values that are not finite")
    scale = 255.0 if picture.mode == "F" else 255.0 / 65535.0
    grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the picture in sRGB, from the colours of ``profile``; a profile that does not fit is ignored."""
    if profile:
        try:
            own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(picture, own, srgb, outputMode="RGB")
            return converted or picture.convert("RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            return picture.convert("RGB")
    return picture.convert("RGB")
