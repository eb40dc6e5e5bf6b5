"""Decode pictures and videos of clients. Sizes are checked before decoding, and file names are not used."""

import contextlib
import io
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from causvid_jax import media
from causvid_jax.config import ConfigError, require
from causvid_jax.media.images import FORMATS


def decode_picture(data: bytes, height: int, width: int, most_pixels: int) -> np.ndarray:
    """Return a picture of at most ``most_pixels`` pixels, scaled to cover the size, uint8 ``[height, width, 3]``.

    Raises:
        ConfigError: the picture is too large, damaged, or in a format that is not accepted.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = most_pixels + 1
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ConfigError(f"the picture is damaged or none of {', '.join(FORMATS)}") from error
    require(pixels <= most_pixels, f"the picture has more than {most_pixels // 10**6} million pixels")
    with _file(data, "image", "picture") as path:
        return media.read_image(path, height, width)


def is_video(data: bytes) -> bool:
    """Return whether an upload is a video by its first bytes: MP4 and MOV (except pictures in them), or Matroska."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    return data.startswith(b"\x1a\x45\xdf\xa3") or (bool(brand) and brand not in (b"avif", b"avis", b"heic", b"mif1"))


def decode_video(data: bytes, height: int, width: int, frames: int, fps: float) -> np.ndarray:
    """Return at most ``frames`` frames of a video at ``fps``, scaled to cover the size, uint8 ``[T, H, W, 3]``.

    Raises:
        ConfigError: the video is damaged, or in a format that is not accepted.
    """
    with _file(data, "video", "video") as path:
        return media.read_video(path, height, width, frames, fps)


@contextlib.contextmanager
def _file(data: bytes, kind: str, word: str) -> Iterator[pathlib.Path]:
    """Yield a temporary file of ``data``; an error about the ``kind`` of that name becomes one about "the ``word``"."""
    with tempfile.TemporaryDirectory(prefix="causvid_upload_") as folder:
        path = pathlib.Path(folder) / word
        path.write_bytes(data)
        try:
            yield path
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{kind} {str(path)!r}", f"the {word}")) from error
