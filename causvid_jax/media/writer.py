"""Video files that are written frame by frame.

``.mp4`` is H.264, yuv420p, tagged BT.709, with its index at the front; ``.gif`` has one palette per frame. Both are
written under a temporary name that becomes the real one when the file is complete.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from fractions import Fraction
from types import TracebackType
from typing import Any

import av
import numpy as np
from einops import repeat
from PIL import Image

from causvid_jax.config import ConfigError, RunError, require
from causvid_jax.media.pixels import MAX_PIXELS, frame_rate

SUFFIXES = (".mp4", ".gif")
GIF_RATE = 50
"""Most frames per second of a GIF: viewers show a picture of less than two hundredths of a second for ten."""
BT709, JPEG_RANGE, MPEG_RANGE = 1, 2, 1


def check_output(path: str | pathlib.Path) -> pathlib.Path:
    """Return the output path after testing that a file can be written there; its folder is created.

    Raises:
        ConfigError: a suffix other than .mp4 or .gif, a directory, or a place that cannot be written.
    """
    path = pathlib.Path(path)
    require(path.suffix.lower() in SUFFIXES, f"output {str(path)!r} is no known kind of video; accepted: .mp4, .gif")
    require(not path.is_dir(), f"output {str(path)!r} is a directory; give the name of a file")
    part = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write output {str(path)!r}: {error.strerror}") from error
    return path


class VideoWriter:
    """Write frames as they come: ``with VideoWriter(path, fps) as out: out.append(frames)``.

    The constructor refuses what cannot be written, so open it before computing. Leaving the ``with`` renames the
    finished file into place. An error removes the temporary file; Ctrl-C keeps the frames so far as a complete video.

    Args:
        path: ``.mp4`` or ``.gif``.
        fps: frames per second; a GIF has at most 50.
        upscale: side of the square of pixels that replaces every pixel, so that tiny videos can be seen.

    Raises:
        ConfigError: a path, rate or size that cannot be written.
        RunError: the file cannot be written any more, for example on a full disk.
    """

    def __init__(self, path: str | pathlib.Path, fps: float, upscale: int = 1):
        require(0 < fps <= 1000, f"fps is {fps}; accepted: above 0 and at most 1000")
        require(1 <= upscale <= 256, f"upscale is {upscale}; accepted: whole numbers from 1 to 256")
        self.path = check_output(path)
        self._kind = self.path.suffix.lower()[1:]
        require(
            self._kind != "gif" or fps <= GIF_RATE,
            f"output {str(path)!r} is a GIF of {fps:g} frames per second; a GIF has at most {GIF_RATE}: write an .mp4",
        )
        self.fps, self.upscale, self.frames = frame_rate(fps), upscale, 0
        options = {"movflags": "+faststart"} if self._kind == "mp4" else {}
        # The protocol is named, so that a colon in a file name is no protocol.
        self._container = av.open(f"file:{_partial(self.path).absolute()}", "w", format=self._kind, options=options)
        self._stream: av.VideoStream | None = None

    def append(self, frames: np.ndarray) -> None:
        """Add uint8 frames ``[T, H, W, 3]`` (or one frame ``[H, W, 3]``)."""
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.shape[-1] != 3:
            raise TypeError(f"frames are {frames.dtype}{list(frames.shape)}; expected uint8 [T, H, W, 3]")
        sides = frames.shape[1] * self.upscale, frames.shape[2] * self.upscale
        require(
            sides[0] * sides[1] <= MAX_PIXELS and max(sides) <= 16384,
            f"frames of {sides[1]} x {sides[0]} pixels (upscale {self.upscale}) are too large for a video; "
            f"accepted: sides to 16384",
        )
        with self._writing():
            for frame in frames:
                self._encode(frame)

    def _encode(self, frame: np.ndarray) -> None:
        frame = repeat(frame, "h w c -> (h a) (w b) c", a=self.upscale, b=self.upscale)
        # yuv420p halves both sides, so an odd side repeats its last line.
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._open_stream(frame.shape[0], frame.shape[1])
        picture = _palette_frame(frame) if self._kind == "gif" else _tagged_frame(frame)
        picture.pts, picture.time_base = self._timestamp(self.frames), self._stream.codec_context.time_base
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name. Without any frame there is no file."""
        with self._writing():
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if self._stream is None:
                _partial(self.path).unlink(missing_ok=True)
            else:
                _partial(self.path).replace(self.path)

    def discard(self) -> None:
        """Remove the temporary file; the file that ``path`` named before stays."""
        with contextlib.suppress(OSError, av.FFmpegError):
            self._container.close()
        _partial(self.path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            self.discard()
            reason = getattr(error, "strerror", None) or str(error)
            raise RunError(f"cannot write {str(self.path)!r} after {self.frames} frames: {reason}") from error

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        if self._kind == "gif":
            stream = self._container.add_stream("gif", rate=self.fps)
            stream.pix_fmt = "pal8"
        else:
            stream = self._container.add_stream("libx264", rate=self.fps, options={"crf": "16", "preset": "fast"})
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc = BT709, BT709, BT709
            context.color_range = MPEG_RANGE
        stream.width, stream.height = width, height
        # GIF counts hundredths of a second: rounding every timestamp, not every duration, keeps the mean rate exact.
        stream.codec_context.time_base = Fraction(1, 100) if self._kind == "gif" else 1 / self.fps
        return stream

    def _timestamp(self, index: int) -> int:
        return round(100 * index / self.fps) if self._kind == "gif" else index

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or (issubclass(kind, KeyboardInterrupt) and self.frames):
            self.close()
        else:
            self.discard()


def write_video(path: str | pathlib.Path, frames: np.ndarray, fps: float, upscale: int = 1) -> None:
    """Write uint8 ``[T, H, W, 3]`` to ``.mp4`` or ``.gif``."""
    with VideoWriter(path, fps, upscale) as out:
        out.append(frames)


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.partial")


def _tagged_frame(frame: np.ndarray) -> av.VideoFrame:
    """Return the frame as BT.709 yuv420p of limited range, which is what its tags say."""
    picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(
        format="yuv420p", dst_colorspace=BT709, src_color_range=JPEG_RANGE, dst_color_range=MPEG_RANGE
    )
    picture.colorspace, picture.color_range = BT709, MPEG_RANGE
    return picture


def _palette_frame(frame: np.ndarray) -> av.VideoFrame:
    """Return the frame in its own 256 colours."""
    image = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    rgb = np.frombuffer(bytes(image.getpalette("RGB") or []), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0] = 255  # alpha first: the array holds A, R, G, B
    palette[: len(rgb), 1:] = rgb
    indexed: Any = (np.asarray(image), palette)  # PyAV takes this pair for pal8; its type hints do not say so
    return av.VideoFrame.from_ndarray(indexed, "pal8")
