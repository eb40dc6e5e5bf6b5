"""Convert pictures of videos to 8-bit sRGB: matrices, ranges, wide gamuts, HDR and transparency."""

import functools

import av
import numpy as np
from PIL import Image

BT709, BT601, BT2020 = 1, 5, 9
"""Matrices of colours (ITU-T H.273)."""
P3 = 12
"""Primaries P3 with the white D65 (SMPTE EG 432-1). The tag of those of BT.2020 is that of its matrix."""
UNSPECIFIED = 2
LIMITED = 1
"""Range of samples from 16 (black) to 235 (white)."""
PQ, HLG = 16, 18
"""Transfer characteristics of HDR video (ITU-T H.273)."""
WHITE = 203.0
"""Luminance in cd/m2 of reference white (ITU-R BT.2408)."""
KNEE = 0.6
"""Light, in units of reference white, above which highlights are compressed."""
DISPLAY = 2.4
"""Exponent of an SDR display (ITU-R BT.1886)."""

_EXPANDED = [min(max(round((value - 16) * 255 / 219), 0), 255) for value in range(256)]
_HD = (1280, 576)
"""Untagged video is BT.709 from this width or above this height, and BT.601 below, as in players."""
_TO_709 = {
    BT2020: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32),
    P3: np.array([[1.2249, -0.2249, 0], [-0.0420, 1.0420, 0], [-0.0197, -0.0786, 1.0983]], np.float32),
}
"""Tag of wide primaries to the matrix from their linear RGB to that of BT.709: BT.2020 (ITU-R BT.2087) and P3 D65."""
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)


def to_srgb(picture: av.VideoFrame) -> Image.Image:
    """Return the RGB picture that a player shows on an sRGB display, without its transparency (:func:`alpha`)."""
    primaries, transfer = int(picture.color_primaries), int(picture.color_trc)
    if transfer in (PQ, HLG):
        return _tone_map(picture, transfer)
    if picture.format.name.startswith("gray"):
        image = picture.to_image()
        return image.point(_EXPANDED * 3) if _is_limited_grey(picture) else image
    if primaries in _TO_709:
        return _narrow(picture, primaries)
    if picture.format.is_rgb or int(picture.colorspace) != UNSPECIFIED:
        return picture.to_image()
    large = picture.width >= _HD[0] or picture.height > _HD[1]
    return picture.to_image(src_colorspace=BT709 if large else BT601)


def alpha(picture: av.VideoFrame) -> Image.Image | None:
    """Return the opacity of every pixel, from 0 to 255; None if the whole picture is opaque."""
    form = picture.format
    if not (form.has_palette or any(part.is_alpha for part in form.components)):
        return None
    opacity: np.ndarray = picture.to_ndarray(format="rgba")[..., 3]
    return Image.fromarray(opacity) if (opacity < 255).any() else None


def _narrow(picture: av.VideoFrame, primaries: int) -> Image.Image:
    """Return an SDR picture of wide ``primaries`` in those of BT.709; colours outside them are clipped.

    An SDR display makes the light ``signal ** DISPLAY``. Grey keeps its values.
    """
    matrix = int(picture.colorspace)
    if matrix == UNSPECIFIED:
        matrix = BT709 if primaries == P3 else BT2020
    light = _display_light()[_deep(picture, matrix)] @ _TO_709[primaries].T
    return _image(np.maximum(light, 0.0) ** (1 / DISPLAY))


def _tone_map(picture: av.VideoFrame, transfer: int) -> Image.Image:
    """Return an HDR picture of BT.2020 primaries as sRGB.

    Light in units of reference white (:data:`WHITE`) is converted to BT.709 primaries. Above the knee K it is
    compressed: ``K + (1 - K) (1 - exp(-(x - K) / (1 - K)))``. Reference white becomes 238, infinite light 255.
    Sources: ITU-R BT.2100 (PQ, HLG), BT.2087 (primaries), BT.2408 (reference white).
    """
    light = _hdr_light(transfer)[_deep(picture, BT2020)]
    if transfer == HLG:
        # The system gamma of a display of 1000 cd/m2 (ITU-R BT.2100) acts on luminance.
        light = light * np.maximum(light @ _LUMA, 1e-6)[..., None] ** 0.2 * (1000.0 / WHITE)
    light = np.maximum(light @ _TO_709[BT2020].T, 0.0)
    above = np.maximum(light - KNEE, 0.0)
    light = np.minimum(light, KNEE) + (1 - KNEE) * (1 - np.exp(-above / (1 - KNEE)))
    return _image(np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055))


def _deep(picture: av.VideoFrame, matrix: int) -> np.ndarray:
    """Return the picture's RGB signals, uint16 ``[H, W, 3]``."""
    signals = picture.reformat(format="rgb48le", src_colorspace=matrix, dst_colorspace=matrix).to_ndarray()
    if not _is_limited_grey(picture):
        return signals
    bits, most = picture.format.components[0].bits, 2**16 - 1
    unit = 2 ** (bits - 8) * most / (2**bits - 1)  # of 8-bit samples
    return np.clip(np.rint((signals - 16 * unit) * most / (219 * unit)), 0, most).astype(np.uint16)


def _is_limited_grey(picture: av.VideoFrame) -> bool:
    """Return whether FFmpeg's scaler reads the picture wrongly: it reads every grey one as one of full range."""
    return picture.format.name.startswith("gray") and int(picture.color_range) == LIMITED


def _image(signal: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(255 * signal), 0, 255).astype(np.uint8))


@functools.cache
def _display_light() -> np.ndarray:
    """Return the light of every 16-bit signal on an SDR display, in [0, 1]."""
    return (np.linspace(0.0, 1.0, 2**16) ** DISPLAY).astype(np.float32)


@functools.lru_cache(maxsize=2)
def _hdr_light(transfer: int) -> np.ndarray:
    """Return the light of every 16-bit signal: in units of reference white for PQ, scene light in [0, 1] for HLG."""
    signal = np.linspace(0.0, 1.0, 2**16)
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = 10000.0 / WHITE * (np.maximum(root - c1, 0.0) / (c2 - c3 * root)) ** (1 / m1)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return light.astype(np.float32)
