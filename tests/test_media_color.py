"""Colours of videos: HDR, wide gamuts, transparency, ranges and matrices become 8-bit sRGB."""

from fractions import Fraction

import av
import numpy as np
import pytest

from causvid_jax import media


def one_picture(path, frame, **tags):
    """Write one frame as it is, in a stream with these tags of its colours."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        frame.pts, frame.time_base = 0, Fraction(1, 8)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("form", ["yuv420p10le", "gray10le"])
@pytest.mark.parametrize("transfer, signal", [(16, 0.5807), (18, 0.75)])
def test_hdr_white_is_white(tmp_path, transfer, signal, form):
    """203 cd/m2 is reference white in PQ and HLG (ITU-R BT.2408)."""
    frame = av.VideoFrame(64, 64, form)
    values = (round(64 + 876 * signal), 512, 512)
    for plane, value in zip(frame.planes, values[: len(frame.planes)], strict=True):
        plane.update(np.full((plane.height, plane.line_size // 2), value, np.uint16).tobytes())
    frame.colorspace, frame.color_range = 9, 1
    one_picture(tmp_path / "a.mkv", frame, colorspace=9, color_primaries=9, color_trc=transfer, color_range=1)
    assert media.read_video(tmp_path / "a.mkv", 64, 64)[0, 32, 32].tolist() == pytest.approx([237] * 3, abs=2)


def to_xyz(corners):
    """Return the matrix from linear RGB to XYZ of the chromaticities of three primaries, with the white D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in corners]).T
    return columns * np.linalg.solve(columns, [0.3127 / 0.3290, 1, 0.3583 / 0.3290])


@pytest.mark.parametrize(
    "tag, corners, matrix, luma",
    [
        (9, [(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)], 9, (0.2627, 0.6780, 0.0593)),
        (9, [(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)], 2, (0.2627, 0.6780, 0.0593)),
        (12, [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)], 1, (0.2126, 0.7152, 0.0722)),
    ],
)
@pytest.mark.parametrize("color", [(220, 30, 30), (40, 180, 60), (130, 130, 130), (255, 255, 255)])
def test_wide_gamut_video_has_the_colours_of_srgb(tmp_path, tag, corners, matrix, luma, color):
    """Chromaticities and matrices are those of ITU-T H.273; light is that of a display of gamma 2.4."""
    srgb = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
    light = np.linalg.solve(to_xyz(corners), to_xyz(srgb) @ (np.array(color) / 255) ** 2.4)
    signal = np.maximum(light, 0) ** (1 / 2.4)
    y = signal @ luma
    chroma = [(signal[i] - y) / (2 * (1 - luma[i])) for i in (2, 0)]
    frame = av.VideoFrame(64, 64, "yuv444p10le")
    for plane, value in zip(frame.planes, (64 + 876 * y, *(512 + 896 * c for c in chroma)), strict=True):
        plane.update(np.full((64, plane.line_size // 2), round(value), np.uint16).tobytes())
    frame.colorspace, frame.color_range = matrix, 1
    one_picture(tmp_path / "a.mkv", frame, colorspace=matrix, color_primaries=tag, color_trc=14, color_range=1)
    assert media.read_video(tmp_path / "a.mkv", 64, 64)[0, 32, 32].tolist() == pytest.approx(color, abs=3)


@pytest.mark.parametrize(
    "name, codec, form, options",
    [
        ("a.webm", "libvpx-vp9", "yuva420p", {}),
        ("a.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
        ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("a.mov", "qtrle", "argb", {}),
        ("a.apng", "apng", "rgba", {}),
    ],
)
def test_transparent_videos_are_composited_over_white(tmp_path, caplog, name, codec, form, options):
    """As pictures are; Pillow's 20% of (200, 0, 100) over white is (244, 204, 224)."""
    rgba = np.full((64, 64, 4), (200, 0, 100, 255), np.uint8)
    for alpha, warnings in ((255, 0), (51, 1)):
        rgba[32:, :, 3] = alpha
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream(codec, rate=8, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 64, form
            for i in range(4):
                frame = av.VideoFrame.from_ndarray(rgba, "rgba").reformat(format=form)
                frame.pts, frame.time_base = i, Fraction(1, 8)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        video = media.read_video(tmp_path / name, 64, 64)
        below = (244, 204, 224) if alpha == 51 else (200, 0, 100)
        assert video.shape == (4, 64, 64, 3)
        assert np.abs(video[:, 8, 8].astype(int) - (200, 0, 100)).max() <= 3
        assert np.abs(video[:, 56, 8].astype(int) - below).max() <= 3
        assert caplog.text.count(f"{name} is transparent; it is composited over white") == warnings


@pytest.mark.parametrize("limits, black, white", [(1, 16, 235), (2, 0, 255)])
@pytest.mark.parametrize("form, kind", [("gray", np.uint8), ("gray10le", np.uint16)])
def test_grey_video_has_the_black_and_white_of_its_range(tmp_path, limits, black, white, form, kind):
    """AV1 and HEVC cameras write one plane of limited range (ITU-T H.273, VideoFullRangeFlag 0)."""
    scale = 4 if kind == np.uint16 else 1
    frame = av.VideoFrame(64, 64, form)
    plane = frame.planes[0]
    samples = np.full((64, plane.line_size // np.dtype(kind).itemsize), white * scale, kind)
    samples[:32] = black * scale
    plane.update(samples.tobytes())
    frame.color_range = limits
    one_picture(tmp_path / "a.mkv", frame, color_range=limits)
    read = media.read_video(tmp_path / "a.mkv", 64, 64)[0]
    assert read[8, 8].tolist() == [0] * 3 and read[56, 8].tolist() == [255] * 3


@pytest.mark.parametrize("height, width", [(64, 96), (720, 1280)])
def test_untagged_colours_are_those_of_the_size(tmp_path, height, width):
    """Without tags players assume BT.601 below HD and BT.709 from it on."""
    red = np.full((height, width, 3), (220, 30, 30), np.uint8)
    frame = av.VideoFrame.from_ndarray(red, "rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=1 if height == 720 else 5, dst_color_range=1)
    frame.colorspace = 2
    one_picture(tmp_path / "a.mkv", frame)
    assert np.abs(media.read_video(tmp_path / "a.mkv", height, width)[0].astype(int) - red).max() <= 4
