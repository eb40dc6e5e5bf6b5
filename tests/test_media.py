"""Video files: what is written is what is read, and what cannot be is refused."""

import shutil
from fractions import Fraction

import av
import jax.numpy as jnp
import numpy as np
import pytest
from av.filter import Graph
from PIL import Image, ImageCms

from causvid_jax import media
from causvid_jax.config import ConfigError, RunError
from causvid_jax.media import output, pixels, reader
from tests.refusals import refused


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


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_what_was_appended_is_playable_while_it_is_written(tmp_path, clip, name):
    """A copy of the growing file is what a killed process or a lost machine leaves."""
    media.write_video(tmp_path / name, clip[:2], 16)
    old = (tmp_path / name).read_bytes()
    with media.VideoWriter(tmp_path / name, 16) as out:
        out.append(clip[0])
        assert (tmp_path / name).read_bytes() == old
        out.append(clip[1:6])
        (tmp_path / f"killed_{name}").write_bytes((tmp_path / name).read_bytes())
        out.append(clip[6])
    for part, frames in (("", 7), ("killed_", 5)):
        back = media.read_video(tmp_path / (part + name), 32, 48)
        assert len(back) == frames
        assert np.abs(back.astype(int) - clip[:frames]).mean() < 12
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((name, f"killed_{name}"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_whatever_ends_it_the_frames_so_far_are_a_complete_video(tmp_path, clip, error):
    with pytest.raises(error), media.VideoWriter(tmp_path / "a.mp4", 16) as out:
        out.append(clip[:5])
        raise error
    assert len(media.read_video(tmp_path / "a.mp4", 32, 48)) == 5
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat") and data.find(b"moof") == -1
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_an_error_before_the_first_frame_or_in_a_whole_video_leaves_the_old_file(tmp_path, clip):
    media.write_video(tmp_path / "a.mp4", clip, 16)
    before = (tmp_path / "a.mp4").read_bytes()
    for whole, frames in ((False, clip[:0]), (True, clip)):
        with pytest.raises(RuntimeError), media.VideoWriter(tmp_path / "a.mp4", 16, whole=whole) as out:
            out.append(frames)
            raise RuntimeError
        assert (tmp_path / "a.mp4").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_second_writer_of_one_file_is_refused(tmp_path, clip):
    with media.VideoWriter(tmp_path / "a.mp4", 16) as out:
        for second in (media.check_output, lambda path: media.VideoWriter(path, 16)):
            refused("a.mp4' is being written by another program", second, tmp_path / "a.mp4")
        out.append(clip)
    media.write_video(tmp_path / "a.mp4", clip, 16)
    (tmp_path / ".a.mp4.lock").touch()  # of a process that was killed
    media.write_video(tmp_path / "a.mp4", clip, 16)


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20 + 64 * 100)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    assert media.check_output(tmp_path / "a.mp4", 100) == tmp_path / "a.mp4"
    with pytest.raises(ConfigError, match="its disk has 1.05 MB left, and the video needs at least 1.06 MB"):
        media.check_output(tmp_path / "a.mp4", 101)


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
    refused("pixels are of type float64; they must be uint8", media.to_float, x / 255)
    np.testing.assert_array_equal(media.to_uint8(np.array([-3.0, 3.0])), [0, 255])


def test_pixels_are_converted_on_an_accelerator(monkeypatch):
    """The conversion on the device gives the same bits, at rounding borders too, and sees what is not finite."""
    video = np.concatenate([np.random.default_rng(0).uniform(-1.2, 1.2, 5000), (np.arange(512) / 2) / 127.5 - 1])
    expected = media.to_uint8(video.astype(np.float32))
    monkeypatch.setattr(pixels, "_is_accelerated", lambda _: True)
    result = media.to_uint8(jnp.asarray(video, jnp.float32))
    assert result.dtype == np.uint8 and result.flags.writeable
    np.testing.assert_array_equal(result, expected)
    refused("the frames are not finite", media.to_uint8, jnp.array([0.0, np.nan]))


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, words in [
        (tmp_path / "a.avi", "accepted: .mp4, .gif"),
        (tmp_path / "file" / "a.mp4", "cannot write output"),
        ("/proc/nowhere/a.mp4", "cannot write output"),
    ]:
        refused(words, media.VideoWriter, path, 16)
    (tmp_path / "d.mp4").mkdir()
    refused("is a directory", media.check_output, tmp_path / "d.mp4")
    refused("upscale is 0", media.VideoWriter, tmp_path / "a.mp4", 16, upscale=0)


def test_what_cannot_be_read_is_refused(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not an image")
    media.write_video(tmp_path / "whole.mp4", clip, 16)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:200])
    for name in ("text.mp4", "cut.mp4", "missing.mp4"):
        refused(name, media.read_video, tmp_path / name, 32, 32)
    for name in ("text.png", "missing.png"):
        refused(name, media.read_image, tmp_path / name, 32, 32)


def marked(number=0, height=64, width=96):
    """Return a picture with a white square at the top left, whose lower half has the grey ``4 number``."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : width // 2], frame[:, width // 2 :] = (200, 40, 40), (40, 60, 200)
    frame[height // 2 :] = 4 * number
    frame[: height // 4, : width // 4] = 255
    return frame


def film(path, count=48, fps=24, durations=None, form=None):
    """Write ``count`` marked pictures as H.264, with the ``durations`` of their packets in frames."""
    with av.open(str(path), "w", format=form) as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"crf": "8", "preset": "veryfast", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, fps)
        packets = []
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(marked(i), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            packets += stream.encode(frame)
        for i, packet in enumerate([*packets, *stream.encode(None)]):
            if durations:
                packet.duration = durations[i]
            out.mux(packet)
    return path


def numbers(video):
    """Return the number of every :func:`marked` frame."""
    return [round(float(frame[48, 48].mean()) / 4) for frame in video]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(tmp_path, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # members of Image.Transpose
    image = Image.fromarray(marked())
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if undo is None else image.transpose(Image.Transpose(undo))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(media.read_picture(tmp_path / "a.png"), marked())


def test_pictures_of_every_mode(tmp_path, caplog):
    Image.new("RGBA", (8, 8), (200, 0, 100, 51)).save(tmp_path / "alpha.png")  # 20% opaque over white
    assert media.read_picture(tmp_path / "alpha.png")[0, 0].tolist() == [244, 204, 224]
    assert "alpha.png is transparent; it is composited over white" in caplog.text
    Image.fromarray(np.full((8, 8), 257 * 130, np.uint16)).save(tmp_path / "deep.png")
    assert media.read_picture(tmp_path / "deep.png")[0, 0].tolist() == [130] * 3
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    assert media.read_picture(tmp_path / "moving.gif")[0, 0].tolist() == [255, 0, 0]
    assert "moving.gif is animated; its first frame is read" in caplog.text
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("bad", b"not a profile"), ("same", srgb)):
        red.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.abs(media.read_picture(tmp_path / f"{name}.png").astype(int) - (255, 0, 0)).max() <= 1


def test_huge_pictures_are_refused_by_their_header(tmp_path):
    for size in ((12000, 12000), (20000, 10000)):
        Image.new("1", size).save(tmp_path / "huge.png")
        refused("pixels; at most 134 million are accepted", media.read_image, tmp_path / "huge.png", 32, 32)


@pytest.mark.parametrize(
    "matrix, change",
    [
        ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
        ((1, 0, 0, -1), lambda f: f[::-1]),
        ((-1, 0, 0, -1), lambda f: f[::-1, ::-1]),
        ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
        ((0, -1, -1, 0), lambda f: np.rot90(f.swapaxes(0, 1), 2)),
    ],
)
def test_videos_are_turned_and_mirrored_by_their_display_matrix(tmp_path, matrix, change):
    data = bytearray(film(tmp_path / "a.mp4", 2).read_bytes())
    a, b, c, d = matrix
    at = data.index(b"tkhd") + 44
    values = zip((a, b, 0, c, d, 0, 0, 0, 1), (2**16, 2**16, 2**30) * 3, strict=True)
    data[at : at + 36] = b"".join((x * y).to_bytes(4, "big", signed=True) for x, y in values)
    (tmp_path / "a.mp4").write_bytes(data)
    expected = change(marked())
    frame = media.read_video(tmp_path / "a.mp4", *expected.shape[:2], frames=1)[0]
    assert np.abs(frame.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_last_picture_stays_as_long_as_the_file_says(tmp_path, name):
    film(tmp_path / name, durations=[1] * 47 + [240])
    shown = numbers(media.read_video(tmp_path / name, 64, 96, fps=8))
    assert shown == [*range(0, 48, 3), *[47] * 80]


def test_streams_without_timestamps_run_at_their_own_rate(tmp_path):
    raw = film(tmp_path / "a.h264", form="h264")
    assert numbers(media.read_video(raw, 64, 96, fps=8)) == list(range(0, 48, 3))


def test_a_clock_that_starts_again_continues(tmp_path):
    joined = film(tmp_path / "a.ts", 24).read_bytes() + film(tmp_path / "b.ts", 24).read_bytes()
    (tmp_path / "joined.ts").write_bytes(joined)
    assert numbers(media.read_video(tmp_path / "joined.ts", 64, 96, fps=8)) == [*range(0, 24, 3)] * 2


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_interlaced_pictures_show_the_time_of_their_first_field(tmp_path, first):
    """Every picture has lines of two times, which were shown as combs. The oracle is the film of fields."""
    waves = 128 + 90 * np.sin((np.arange(96)[None, :] - 3 * np.arange(24)[:, None]) / 4)
    fields = np.repeat(np.repeat(waves[:, None, :, None], 64, axis=1), 3, axis=3).round().astype(np.uint8)
    film_, later = fields[::2].copy(), slice(1, None, 2) if first == "tff" else slice(0, None, 2)
    film_[:, later] = fields[1::2][:, later]
    combs = np.abs(film_.astype(int) - fields[::2]).mean()
    marks = Graph()
    marks.link_nodes(
        marks.add_buffer(width=96, height=64, format="yuv420p", time_base=Fraction(1, 25)),
        marks.add("setparams", f"field_mode={first}"),
        marks.add("buffersink"),
    ).configure()
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "x264-params": f"{first}=1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for n, picture in enumerate(film_):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = n, Fraction(1, 25)
            marks.push(frame)
            container.mux(stream.encode(marks.pull()))
        container.mux(stream.encode(None))
    shown = media.read_video(tmp_path / "a.mp4", 64, 96)
    assert shown.shape == film_.shape
    assert np.abs(shown.astype(int) - fields[::2]).mean() < combs / 4


def test_mp4_is_tagged_and_its_index_is_at_the_front(tmp_path):
    red = np.full((9, 720, 1280, 3), (220, 30, 30), np.uint8)
    media.write_video(tmp_path / "a.mp4", red, fps=16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert [int(tag) for tag in tags] == [1, 1, 1, 1]
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    assert np.abs(media.read_video(tmp_path / "a.mp4", 720, 1280)[4].astype(int) - (220, 30, 30)).max() <= 4


@pytest.mark.parametrize(
    "fps, exact",
    [
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
        (16.0, 16),
        (0.0004, Fraction(1, 1001)),
    ],
)
def test_rates_are_fractions(tmp_path, clip, fps, exact):
    assert media.frame_rate(fps) == exact
    media.write_video(tmp_path / "a.mp4", clip, fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == exact


def test_names_are_names_of_files(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "http:/example.org/a.mp4"):
        media.write_video(name, clip, 16)
        assert (tmp_path / name).is_file() and len(media.read_video(name, 32, 48)) == 7
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile '12:30.mp4'\n")
    refused("it is not a video", media.read_video, "list.mp4", 32, 48)


def test_frames_that_are_not_finite_are_refused():
    for value in (np.nan, np.inf):
        refused("not finite", media.to_uint8, np.array([0.0, value]))


def test_sizes_rates_and_counts_that_no_video_has_are_refused(tmp_path, clip, monkeypatch):
    """A rate below 0 gave one frame, no frames gave no file, and a frame above the memory was made before a refusal."""
    path = tmp_path / "a.mp4"
    media.write_video(path, clip, 8)
    for words, size, options in (
        ("sides of at least 1", (0, 16), {}),
        ("fps is -5", (16, 16), {"fps": -5}),
        ("fps is nan", (16, 16), {"fps": float("nan")}),
        ("frames is 0", (16, 16), {"frames": 0}),
    ):
        refused(words, media.read_video, path, *size, **options)
    monkeypatch.setattr(reader, "host_memory", lambda: 1000)
    refused("larger than this machine's memory", media.read_video, path, 64, 64)
    refused("no frames are given", media.write_video, tmp_path / "b.mp4", clip[:0], 8)
    for wrong in (clip[None], clip[:, :0]):
        with pytest.raises(TypeError, match="expected uint8"):
            media.write_video(tmp_path / "b.mp4", wrong, 8)


def test_rates_and_sizes_that_cannot_be_written_are_refused(tmp_path):
    refused("a GIF has at most 50", media.VideoWriter, tmp_path / "a.gif", 120)
    with pytest.raises(ConfigError, match="upscale is 4000; accepted: whole numbers from 1 to 256"):
        media.VideoWriter(tmp_path / "a.mp4", 16, upscale=4000)
    with (
        pytest.raises(ConfigError, match="too large for a video"),
        media.VideoWriter(tmp_path / "a.mp4", 16, 256) as out,
    ):
        out.append(np.zeros((1, 128, 128, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path, clip, monkeypatch, name):
    def full(*_):
        raise OSError(28, "No space left on device")

    def write(before):
        with media.VideoWriter(tmp_path / name, 16) as out:
            out.append(clip[:before])
            monkeypatch.setattr(out, "_encode", full)
            out.append(clip[before:])

    with pytest.raises(RunError, match=f"{name}' after 0 frames: No space left on device$"):
        write(0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match=f"{name}' after 5 frames: No space left on device; the first 4 are kept"):
        write(5)
    assert len(media.read_video(tmp_path / name, 32, 48)) == 4
    assert [path.name for path in tmp_path.iterdir()] == [name]
