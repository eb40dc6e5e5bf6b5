"""Video files: what is written is what is read, and what cannot be is refused."""

import av
import numpy as np
import pytest
from PIL import Image

from causvid_jax import media
from causvid_jax.config import ConfigError


@pytest.fixture
def clip():
    """Seven frames of a red square that moves right over a blue ground, 32 x 48."""
    frames = np.zeros((7, 32, 48, 3), np.uint8)
    frames[..., 2] = 120
    for t in range(7):
        frames[t, 8:24, 4 * t : 4 * t + 16] = (230, 30, 20)
    return frames


@pytest.mark.parametrize("name, tolerance", [("a.mp4", 12.0), ("a.gif", 0.0)])
def test_round_trip(tmp_path, clip, name, tolerance):
    path = tmp_path / "new" / "folder" / name
    media.write_video(path, clip, fps=16)
    back = media.read_video(path, 32, 48)
    assert back.shape == clip.shape and back.dtype == np.uint8
    # yuv420p keeps one colour per 2 x 2 pixels: the mean is close, single edge pixels are not.
    assert np.abs(back.astype(int) - clip).mean() <= tolerance
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_upscaled_video_reads_back_at_its_own_size(tmp_path, clip):
    media.write_video(tmp_path / "a.gif", clip, fps=16, upscale=4)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.size == (192, 128)
    np.testing.assert_array_equal(media.read_video(tmp_path / "a.gif", 32, 48), clip)


def test_mp4_is_h264_yuv420p_at_the_asked_rate_even_for_odd_sizes(tmp_path, clip):
    media.write_video(tmp_path / "a.mp4", clip[:, :31, :47], fps=12)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (48, 32)
        assert float(stream.average_rate) == 12 and stream.frames == 7


def test_gif_keeps_the_mean_rate(tmp_path, clip):
    media.write_video(tmp_path / "a.gif", np.concatenate([clip, clip, clip])[:17], fps=16)
    with av.open(str(tmp_path / "a.gif")) as container:
        times = [float(f.time) for f in container.decode(video=0)]
    assert len(times) == 17 and times[16] - times[0] == pytest.approx(1.0, abs=1e-6)


def test_append_writes_while_it_goes(tmp_path, clip):
    noise = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), np.uint8)
    with media.VideoWriter(tmp_path / "a.gif", 16) as out:
        out.append(noise[:4])
        assert not (tmp_path / "a.gif").exists()
        assert (tmp_path / ".a.gif.partial").stat().st_size > 3 * 256 * 256 // 2
        out.append(noise[4])
        out.append(noise[5:])
    assert len(media.read_video(tmp_path / "a.gif", 64, 64)) == 8


def test_an_error_leaves_the_old_file_and_no_debris(tmp_path, clip):
    media.write_video(tmp_path / "a.mp4", clip, 16)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(RuntimeError), media.VideoWriter(tmp_path / "a.mp4", 16) as out:
        out.append(clip)
        raise RuntimeError
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_ctrl_c_keeps_a_complete_shorter_video(tmp_path, clip):
    with pytest.raises(KeyboardInterrupt), media.VideoWriter(tmp_path / "a.mp4", 16) as out:
        out.append(clip[:5])
        raise KeyboardInterrupt
    assert len(media.read_video(tmp_path / "a.mp4", 32, 48)) == 5


def test_reading_at_a_rate_and_a_limit(tmp_path, clip):
    media.write_video(tmp_path / "a.gif", clip[:6], fps=10)
    half = media.read_video(tmp_path / "a.gif", 32, 48, fps=5)
    np.testing.assert_array_equal(half, clip[[0, 2, 4]])
    double = media.read_video(tmp_path / "a.gif", 32, 48, fps=20, frames=9)
    np.testing.assert_array_equal(double, clip[[0, 0, 1, 1, 2, 2, 3, 3, 4]])
    np.testing.assert_array_equal(media.read_video(tmp_path / "a.gif", 32, 48, frames=3), clip[:3])


def test_images_cover_the_size(tmp_path):
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, 64:128] = (10, 200, 30)  # the centre square, which is what a square crop keeps
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png", 32, 32), np.full((32, 32, 3), (10, 200, 30)))


def test_pixels_convert_both_ways():
    x = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(media.to_uint8(media.to_float(x)), x)
    assert (media.to_float(x)[0], media.to_float(x)[-1]) == (-1.0, 1.0)
    np.testing.assert_array_equal(media.to_uint8(np.array([-3.0, 3.0])), [0, 255])


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, words in [
        (tmp_path / "a.avi", "accepted: .mp4, .gif"),
        (tmp_path / "file" / "a.mp4", "cannot write output"),
        ("/proc/nowhere/a.mp4", "cannot write output"),
    ]:
        with pytest.raises(ConfigError, match=words):
            media.VideoWriter(path, 16)
    (tmp_path / "d.mp4").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        media.check_output(tmp_path / "d.mp4")
    with pytest.raises(ConfigError, match="upscale is 0"):
        media.VideoWriter(tmp_path / "a.mp4", 16, upscale=0)


def test_what_cannot_be_read_is_refused(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not an image")
    media.write_video(tmp_path / "whole.mp4", clip, 16)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:200])
    for name in ("text.mp4", "cut.mp4", "missing.mp4"):
        with pytest.raises(ConfigError, match=name):
            media.read_video(tmp_path / name, 32, 32)
    for name in ("text.png", "missing.png"):
        with pytest.raises(ConfigError, match=name):
            media.read_image(tmp_path / name, 32, 32)
