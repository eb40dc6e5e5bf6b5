"""Tone mapping of HDR video (BT.2020 with the PQ or HLG transfer function) to sRGB."""

import functools

import av
import numpy as np
from PIL import Image

PQ, HLG = 16, 18
"""Transfer characteristics of HDR video (ITU-T H.273)."""
WHITE = 203.0
"""Luminance in cd/m2 of reference white (ITU-R BT.2408)."""
KNEE = 0.6
"""Light, in units of reference white, above which highlights are compressed."""

_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
"""Linear BT.2020 to linear BT.709 (ITU-R BT.2087)."""
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)


def is_hdr(picture: av.VideoFrame) -> bool:
    """Return whether the frame is tagged as HDR."""
    return int(picture.color_trc) in (PQ, HLG)


def tone_map(picture: av.VideoFrame) -> Image.Image:
    """Return an HDR frame as 8-bit sRGB.

    Light in units of reference white (:data:`WHITE`) is converted to BT.709 primaries. Above the knee K it is
    compressed: ``K + (1 - K) (1 - exp(-(x - K) / (1 - K)))``. Reference white becomes 238, infinite light 255.
    Sources: ITU-R BT.2100 (PQ, HLG), BT.2087 (primaries), BT.2408 (reference white).
    """
    rgb = picture.reformat(format="rgb48le", src_colorspace=9, dst_colorspace=9).to_ndarray()
    curve = _light(int(picture.color_trc))
    light = curve[rgb]
    if int(picture.color_trc) == HLG:
        # The system gamma of a display of 1000 cd/m2 (ITU-R BT.2100) acts on luminance.
        light = light * np.maximum(light @ _LUMA, 1e-6)[..., None] ** 0.2 * (1000.0 / WHITE)
    light = np.maximum(light @ _TO_709.T, 0.0)
    above = np.maximum(light - KNEE, 0.0)
    light = np.minimum(light, KNEE) + (1 - KNEE) * (1 - np.exp(-above / (1 - KNEE)))
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)
    return Image.fromarray(np.clip(np.rint(255 * encoded), 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=2)
def _light(transfer: int) -> np.ndarray:
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
