"""Video and image files: everything that touches pixels on disk.

``.mp4`` is H.264, yuv420p (plays in every browser); ``.gif`` has one palette per frame. Both are written frame by frame
through PyAV, under a temporary name that becomes the real one when the file is complete, so that a reader never finds
half a file. Arrays are uint8 ``[T, H, W, 3]``; :func:`to_uint8` and :func:`to_float` convert to and from the model's
float32 in [-1, 1].
"""

import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import TracebackType
from typing import Any

import av
import numpy as np
from einops import repeat
from PIL import Image

from causvid_jax.config import ConfigError, require

SUFFIXES = (".mp4", ".gif")

CLOCK = 0.25
"""How much of a frame a timestamp may be off: files round time, GIF to hundredths of a second."""


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Float in [-1, 1] to uint8: ``round(127.5 (x + 1))``, clipped."""
    return np.clip(np.rint((np.asarray(video, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]: ``x / 127.5 - 1``."""
    return np.asarray(video, np.float32) / 127.5 - 1.0


def frame_rate(fps: float) -> Fraction:
    """Return frames per second as a fraction; 23.976, 29.97 and 59.94 are 24000/1001, 30000/1001 and 60000/1001."""
    whole = round(fps * 1.001)
    if fps != round(fps) and whole and abs(fps * 1.001 - whole) < 1e-3:
        return Fraction(1000 * whole, 1001)
    return Fraction(fps).limit_denominator(1001)


def check_output(path: str | pathlib.Path) -> pathlib.Path:
    """The output path, after proof that a file can be written there; its folder is created.

    Raises ConfigError on a suffix other than .mp4 or .gif and on a place that cannot be written.
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
    """Writes frames as they come: ``with VideoWriter(path, fps) as out: out.append(frames)``.

    The constructor refuses what cannot be written (ConfigError), so open it before computing. Leaving the ``with``
    renames the finished file into place. On an error the temporary file is removed; Ctrl-C keeps what is there as a
    complete, shorter video.

    Args:
        path: ``.mp4`` or ``.gif``.
        fps: frames per second.
        upscale: every pixel becomes a square of this many pixels, so that tiny videos can be seen.
    """

    def __init__(self, path: str | pathlib.Path, fps: float, upscale: int = 1):
        require(fps > 0, f"fps is {fps}; it must be positive")
        require(upscale >= 1, f"upscale is {upscale}; it must be a whole number of at least 1")
        self.path = check_output(path)
        self.fps, self.upscale, self.frames = frame_rate(fps), upscale, 0
        self._kind = self.path.suffix.lower()[1:]
        self._container = av.open(str(_partial(self.path)), "w", format=self._kind)
        self._stream: av.VideoStream | None = None

    def append(self, frames: np.ndarray) -> None:
        """Add uint8 frames ``[T, H, W, 3]`` (or one frame ``[H, W, 3]``)."""
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.shape[-1] != 3:
            raise TypeError(f"frames are {frames.dtype}{list(frames.shape)}; expected uint8 [T, H, W, 3]")
        for frame in frames:
            frame = repeat(frame, "h w c -> (h a) (w b) c", a=self.upscale, b=self.upscale)
            # yuv420p halves both sides, so an odd side repeats its last line.
            frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if self._stream is None:
                self._stream = self._open_stream(frame.shape[0], frame.shape[1])
            picture = _palette_frame(frame) if self._kind == "gif" else av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, picture.time_base = self._timestamp(self.frames), self._stream.codec_context.time_base
            self._container.mux(self._stream.encode(picture))
            self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name. Without any frame there is no file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if self._stream is None:
            _partial(self.path).unlink(missing_ok=True)
        else:
            _partial(self.path).replace(self.path)

    def discard(self) -> None:
        """Remove the temporary file; whatever ``path`` held before stays."""
        self._container.close()
        _partial(self.path).unlink(missing_ok=True)

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        if self._kind == "gif":
            stream = self._container.add_stream("gif", rate=self.fps)
            stream.pix_fmt = "pal8"
        else:
            stream = self._container.add_stream("libx264", rate=self.fps, options={"crf": "16", "preset": "fast"})
            stream.pix_fmt = "yuv420p"
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


def read_video(
    path: str | pathlib.Path, height: int, width: int, frames: int | None = None, fps: float | None = None
) -> np.ndarray:
    """uint8 ``[T, height, width, 3]``: every frame scaled to cover the size, then cropped at the centre.

    Args:
        frames: read at most this many.
        fps: pick frames by their time so that the result has this rate; None takes every frame as it comes.
    """
    path = pathlib.Path(path)
    require(path.is_file(), f"video {str(path)!r} does not exist")
    try:
        result = list(itertools.islice(iterate_frames(path, height, width, fps), frames))
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        raise ConfigError(f"cannot read video {str(path)!r}: it is not a video or it is damaged") from error
    require(bool(result), f"cannot read video {str(path)!r}: it holds no frames")
    return np.stack(result)


def iterate_frames(
    path: str | pathlib.Path, height: int, width: int, fps: float | None = None, *, whole: bool = False
) -> Iterator[np.ndarray]:
    """The frames of :func:`read_video`, uint8 ``[height, width, 3]``, one by one as they are decoded.

    Frame k is what a player shows at k / fps seconds, turned upright and with square pixels as the file asks for.

    Args:
        whole: raise ValueError at a picture that the decoder marks as damaged, and at the end if more than a second and
            a tenth of the length that the file declares is missing.

    Raises:
        OSError, ValueError, IndexError, av.FFmpegError: the file cannot be decoded.
    """
    count, start, time, last = 0, 0.0, 0.0, None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("no decoder for its codec")
        stream.thread_type = "AUTO"
        aspect = float(stream.sample_aspect_ratio or 1)
        for picture in container.decode(stream):
            if whole and picture.is_corrupt:
                raise ValueError(f"the picture at {time:.2f} s is damaged")
            start = (picture.time or 0.0) if last is None else start
            time = (picture.time or 0.0) - start
            if last is not None:  # it is on screen until this picture comes
                due = 1 if fps is None else math.ceil(time * fps - CLOCK) - count
                if due > 0:
                    count += due
                    yield from [_upright(last, height, width, aspect)] * due
            last = picture
        declared = _declared_seconds(container, stream)
        if whole and last is not None and declared - time > 1.0 + 0.1 * declared:
            raise ValueError(f"it ends after {time:.2f} of the {declared:.2f} s that it declares")
        if last is not None and (fps is None or count <= time * fps + CLOCK):
            yield _upright(last, height, width, aspect)


def read_image(path: str | pathlib.Path, height: int, width: int) -> np.ndarray:
    """uint8 ``[height, width, 3]``: the image scaled to cover the size, then cropped at the centre."""
    return _read_image(path, lambda image: _cover(image, height, width))


def read_picture(path: str | pathlib.Path) -> np.ndarray:
    """uint8 ``[h, w, 3]``: the image at its own size, whole."""
    return _read_image(path, lambda image: np.asarray(image, np.uint8))


def _read_image(path: str | pathlib.Path, use: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    path = pathlib.Path(path)
    require(path.is_file(), f"image {str(path)!r} does not exist")
    try:
        with Image.open(path) as image:
            return use(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"cannot read image {str(path)!r}: it is not an image or it is damaged") from error


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.partial")


def _palette_frame(frame: np.ndarray) -> av.VideoFrame:
    """The frame in its own 256 colours."""
    image = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    rgb = np.frombuffer(bytes(image.getpalette("RGB") or []), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0] = 255  # alpha first: the array holds A, R, G, B
    palette[: len(rgb), 1:] = rgb
    indexed: Any = (np.asarray(image), palette)  # PyAV takes this pair for pal8; its type hints do not say so
    return av.VideoFrame.from_ndarray(indexed, "pal8")


def _declared_seconds(container: Any, stream: av.VideoStream) -> float:
    """How long the file says that its video is; 0 where it does not say, or says it of its sound as well."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else 0.0


def _upright(picture: av.VideoFrame, height: int, width: int, aspect: float) -> np.ndarray:
    image = picture.to_image()
    turn = picture.rotation % 360  # anti-clockwise, for display
    if turn in (90, 180, 270):
        image = image.rotate(turn, expand=True)
        aspect = aspect if turn == 180 else 1 / aspect
    return _cover(image, height, width, aspect)


def _cover(image: Image.Image, height: int, width: int, aspect: float = 1.0) -> np.ndarray:
    """``aspect`` is a pixel's width over its height."""
    scale = max(height / image.height, width / (image.width * aspect))
    size = max(width, round(image.width * aspect * scale)), max(height, round(image.height * scale))
    # Area averaging inverts ``upscale`` exactly.
    image = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)), np.uint8)
