"""Read videos as a player shows them: upright, progressive, with square pixels, in sRGB, frames by their time.

Transparency is composited over white, as that of pictures.
"""

import contextlib
import itertools
import logging
import math
import pathlib
import re
import sys
import typing
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
from PIL import Image

from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import host_memory
from causvid_jax.media import color
from causvid_jax.media.pixels import MAX_PIXELS, cover

CLOCK = 0.25
"""Error of a timestamp, in frames, that is tolerated: files round time, GIF to hundredths of a second."""

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,gif,flv,ogg,asf,mjpeg,apng"
)
"""Accepted demuxers. Others, such as playlists, open further files that the content names."""
_READS_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Codec to the decoder of its transparency, which FFmpeg's own decoder drops."""
_LOG = logging.getLogger(__name__)


def read_video(
    path: str | pathlib.Path, height: int, width: int, frames: int | None = None, fps: float | None = None
) -> np.ndarray:
    """Return a video scaled to cover the size and cropped at the centre, uint8 ``[T, height, width, 3]``.

    Args:
        path: of a regular local file.
        height: of the result, in pixels.
        width: of the result, in pixels.
        frames: read at most this many frames; None reads all.
        fps: frames per second of the result, chosen by time; None returns every frame of the file once.

    Raises:
        ConfigError: no such file, no video, a damaged video, a size, rate or number that is not positive, or more
            frames than fit in half of the host's memory.
    """
    path = pathlib.Path(path)
    require(path.is_file(), f"video {str(path)!r} does not exist")
    require(height >= 1 and width >= 1, f"the size is {width} x {height} pixels; accepted: sides of at least 1")
    require(fps is None or 0 < fps < math.inf, f"fps is {fps}; accepted: above 0")
    require(frames is None or frames >= 1, f"frames is {frames}; accepted: at least 1")
    most = (host_memory() or sys.maxsize) // (2 * 3 * height * width)  # once as a list and once as an array
    last = most + 1 if frames is None else min(frames, most + 1)
    require(most > 0, f"a frame of {width} x {height} pixels is larger than this machine's memory; give smaller ones")
    try:
        result = list(itertools.islice(iterate_frames(path, height, width, fps), last))
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        raise ConfigError(f"cannot read video {str(path)!r}: it is not a video or it is damaged") from error
    require(
        len(result) <= most,
        f"video {str(path)!r} has more frames of {width} x {height} pixels than this machine's memory holds; "
        "give fewer frames, or smaller ones",
    )
    require(bool(result), f"cannot read video {str(path)!r}: it holds no frames")
    return np.stack(result)


def iterate_frames(
    path: str | pathlib.Path, height: int, width: int, fps: float | None = None, *, whole: bool = False
) -> Iterator[np.ndarray]:
    """Yield the frames of :func:`read_video` one by one, uint8 ``[height, width, 3]``.

    Frame k is the picture that a player shows k / fps seconds after the first one. The last picture is shown for the
    duration that the file declares for it.

    Args:
        path, height, width, fps: as in :func:`read_video`.
        whole: raise ValueError at a picture that the decoder marks as damaged. Raise it at the end too, if the video is
            shorter than the file declares by more than a second and a tenth of the declared length.

    Raises:
        OSError, ValueError, IndexError, av.FFmpegError: the file cannot be decoded.
    """
    count, last, clock = 0, None, None
    with _open(path) as container:
        stream = _video_stream(container)
        clock = _Clock(stream)
        screen = _Screen(path, height, width, float(stream.sample_aspect_ratio or 1))
        for picture in _progressive(_pictures(container, stream)):
            if whole and picture.is_corrupt:
                raise ValueError(f"the picture at {clock.time:.2f} s is damaged")
            clock.advance(picture)
            if last is not None:  # the last picture is shown until this picture
                due = 1 if fps is None else math.ceil(clock.time * fps - CLOCK) - count
                if due > 0:
                    count += due
                    yield from [screen.show(last)] * due
            last = picture
        declared = _declared_seconds(container, stream)
        if whole and last is not None and declared - clock.end > 1.0 + 0.1 * declared:
            raise ValueError(f"it ends after {clock.end:.2f} of the {declared:.2f} s that it declares")
        if last is not None:
            due = 1 if fps is None else math.ceil(clock.end * fps - CLOCK) - count
            due = max(due, 1) if count == 0 else due
            if due > 0:
                yield from [screen.show(last)] * due


class _Clock:
    """Time of the pictures of a stream in seconds from the first one.

    Pictures without a timestamp follow at the stream's rate. A timestamp that is not after the one before it means that
    the clock started again, as in joined files, and time continues.
    """

    def __init__(self, stream: Any):
        rate = stream.guessed_rate or stream.average_rate or stream.base_rate
        self._step = float(1 / rate) if rate else 1 / 25
        self._offset: float | None = None
        self.time = 0.0
        self.end = 0.0

    def advance(self, picture: av.VideoFrame) -> None:
        """Set ``time`` and ``end``, in seconds, to those of the next picture in display order."""
        step = float(picture.duration * picture.time_base) if picture.duration and picture.time_base else self._step
        if self._offset is None:
            self._offset = -(picture.time or 0.0)
        elif picture.time is None:
            self.time = self.end
        else:
            time = picture.time + self._offset
            if time <= self.time:
                self._offset += self.end - time
                time = self.end
            self.time = time
        self.end = self.time + step


def _open(path: str | pathlib.Path) -> Any:
    """Open a local file. The explicit protocol prevents FFmpeg from reading a file name as a URL."""
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    return av.open(f"file:{pathlib.Path(path).absolute()}", container_options=options)


def _video_stream(container: Any) -> Any:
    """Return the video stream that a player shows, which is never a cover picture.

    Raises:
        IndexError: there is none.
        ValueError: no decoder for it, or frames of more than :data:`MAX_PIXELS`.
    """
    stream = container.streams.best("video")
    if stream is None:
        raise IndexError("no video stream")
    context = stream.codec_context
    if context is None:
        raise ValueError("no decoder for its codec")
    if context.width * context.height > MAX_PIXELS:
        raise ValueError(f"its frames have {context.width} x {context.height} pixels, more than {MAX_PIXELS}")
    stream.thread_type = "AUTO"
    return stream


def _pictures(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Yield the decoded pictures of a stream, with their transparency."""
    own, name = stream.codec_context, _READS_ALPHA.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        yield from container.decode(stream)
        return
    decoder: Any = av.CodecContext.create(name, "r")
    decoder.extradata = own.extradata
    for tag in ("colorspace", "color_primaries", "color_trc", "color_range"):
        setattr(decoder, tag, getattr(own, tag))
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _progressive(pictures: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield as many pictures; a picture that is marked as interlaced shows the time of its first field only.

    FFmpeg's bwdif takes the lines of the second field from the pictures before and after. Other pictures are unchanged.
    """
    graph, form = None, None
    for picture in itertools.chain(pictures, [None]):
        kind = picture and (picture.width, picture.height, picture.format.name)
        if graph is not None and kind != form:
            graph.push(None)
            yield from _pulled(graph)
            graph = None
        if picture is None:
            return
        if graph is None and picture.interlaced_frame:
            graph, form = _deinterlacer(picture), kind
        if graph is None:
            yield picture
        else:
            graph.push(picture)
            yield from _pulled(graph)


def _deinterlacer(picture: av.VideoFrame) -> av.filter.Graph:
    """Return a graph that replaces interlaced pictures of the size and format of ``picture``, one for one."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=picture.width,
        height=picture.height,
        format=picture.format,
        time_base=picture.time_base or Fraction(1, 1000),
    )
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """Yield the pictures that a graph has finished."""
    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield typing.cast(av.VideoFrame, graph.pull())


def _declared_seconds(container: Any, stream: Any) -> float:
    """Return the length of the video as the file declares it; 0 if it declares none, or only that of all streams."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else 0.0


class _Screen:
    """Shows pictures as a player does, at the requested size; ``aspect`` is that of their pixels."""

    def __init__(self, path: str | pathlib.Path, height: int, width: int, aspect: float):
        self._path, self._height, self._width, self._aspect = path, height, width, aspect
        self._transparent = False

    def show(self, picture: av.VideoFrame) -> np.ndarray:
        """Return what a player shows of the picture, uint8 ``[height, width, 3]``."""
        image, alpha = color.to_srgb(picture), color.alpha(picture)
        if alpha is not None:
            if not self._transparent:
                _LOG.warning("video %s is transparent; it is composited over white", self._path)
            self._transparent = True
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        image, turned = _upright(image, picture)
        return cover(image, self._height, self._width, 1 / self._aspect if turned else self._aspect)


def _upright(image: Image.Image, picture: av.VideoFrame) -> tuple[Image.Image, bool]:
    """Rotate and mirror the picture by its display matrix; return it and whether its sides were exchanged.

    The matrix maps a pixel (x, y) to ``(a x + c y, b x + d y)``; it is rounded to right angles.
    """
    data = picture.side_data.get("DISPLAYMATRIX")
    if data is None:
        return image, False
    a, b, _, c, d, *_ = np.frombuffer(typing.cast(Any, data), np.int32).tolist()
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    if turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image, turned
