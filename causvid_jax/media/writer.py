"""Write video files frame by frame. An unfinished file is playable: it lacks only its last frame.

``.mp4`` is H.264, yuv420p, tagged BT.709. While the file grows, every frame is a fragment of its own. After a kill or
on a full disk the fragments so far are a playable file. When the video is complete, it is rewritten as a plain mp4 with
its index at the front. ``.gif`` has one palette per frame and is playable while it grows, too.
"""

import contextlib
import os
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
from causvid_jax.config.files import atomic
from causvid_jax.media.output import Lock, check_output, partial
from causvid_jax.media.pixels import MAX_PIXELS, frame_rate

GIF_RATE = 50
"""Highest frame rate of a GIF. Viewers show a picture of less than 0.02 s for 0.1 s."""
BT709, JPEG_RANGE, MPEG_RANGE = 1, 2, 1
_FRAGMENTS = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
# Without look-ahead the encoder returns every frame at once; the file lacks at most the last one.
_ENCODER = {"crf": "16", "preset": "fast", "tune": "zerolatency"}


class VideoWriter:
    """Write a video frame by frame: ``with VideoWriter(path, fps) as out: out.append(frames)``.

    The constructor checks the arguments and locks the path (:class:`~causvid_jax.media.output.Lock`), so create the
    writer before computing. The file gets its name with its second frame. Until then an older file stays. When the
    ``with`` block ends, also by an exception, the frames so far become a complete video. Without any frame there is no
    file.

    Args:
        path: ``.mp4`` or ``.gif``.
        fps: frames per second, above 0 and at most 1000; a GIF has at most 50.
        upscale: every pixel becomes a square of ``upscale`` x ``upscale`` pixels, to enlarge tiny videos.
        whole: give the file its name only when the video is complete. An error then removes it and keeps the older
            file.

    Raises:
        ConfigError: a path or rate that cannot be written, or a path that another program is writing.

    Attributes:
        comment: metadata of the complete mp4, read when the writer is closed.
    """

    comment = ""

    def __init__(self, path: str | pathlib.Path, fps: float, upscale: int = 1, *, whole: bool = False):
        require(0 < fps <= 1000, f"fps is {fps}; accepted: above 0 and at most 1000")
        require(1 <= upscale <= 256, f"upscale is {upscale}; accepted: whole numbers from 1 to 256")
        self.path = check_output(path)
        self._kind = self.path.suffix.lower()[1:]
        require(
            self._kind != "gif" or fps <= GIF_RATE,
            f"output {str(path)!r} is a GIF of {fps:g} frames per second; a GIF has at most {GIF_RATE}: write an .mp4",
        )
        self.fps, self.upscale, self.frames = frame_rate(fps), upscale, 0
        self._whole, self._file, self._complete_bytes = whole, partial(self.path), 0
        self._lock = Lock(self.path)
        options = {"flush_packets": "1", **(_FRAGMENTS if self._kind == "mp4" else {})}
        # The explicit protocol prevents FFmpeg from reading a colon in a file name as the end of a protocol.
        self._container = av.open(f"file:{self._file.absolute()}", "w", format=self._kind, options=options)
        self._stream: av.VideoStream | None = None
        self._closed = False

    def append(self, frames: np.ndarray) -> None:
        """Add uint8 frames ``[T, H, W, 3]``, or one frame ``[H, W, 3]``; all but the last are on disk afterwards.

        Raises:
            ConfigError: frames that are too large for a video.
            RunError: the file cannot be written any more, for example on a full disk. The frames before are kept.
            TypeError: another type or shape.
        """
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
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
                if self.frames > 1:  # the first one is on disk
                    self._complete_bytes = os.path.getsize(self._file)
                    if not self._whole:
                        self._take_name()

    def _encode(self, frame: np.ndarray) -> None:
        frame = enlarge(frame[None], self.upscale)[0]
        if self._stream is None:
            self._stream = self._open_stream(frame.shape[0], frame.shape[1])
        picture = _palette_frame(frame) if self._kind == "gif" else tagged_frame(frame)
        picture.pts, picture.time_base = self._timestamp(self.frames), self._stream.codec_context.time_base
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def _take_name(self) -> None:
        if self._file != self.path:
            os.replace(self._file, self.path)
            self._file = self.path

    def close(self) -> None:
        """Finish the file under its name. Without any frame there is no file. Raises as :meth:`append`."""
        if self._stream is None or self._closed:
            self.discard()
            return
        with self._writing():
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._complete_bytes = os.path.getsize(self._file)
            self._finish()

    def _finish(self) -> None:
        """Give the file its name; rewrite fragments as a plain mp4, unless there is no room for a second copy."""
        try:
            if self._kind == "mp4":
                with contextlib.suppress(ConfigError, av.FFmpegError), atomic(self.path) as plain:
                    _defragment(self._file, plain, self.comment)
                    if self._file != self.path:
                        self._file.unlink()
                    self._file = self.path
            self._take_name()
        finally:
            self._closed = True
            self._lock.release()

    def discard(self) -> None:
        """Stop without finishing: remove the temporary file and keep the older file at ``path``."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError, av.FFmpegError):
                self._container.close()
            partial(self.path).unlink(missing_ok=True)
            self._lock.release()

    def _keep(self) -> int:
        """Cut the file behind its last complete frame after a failed write; return the frames that are left."""
        with contextlib.suppress(OSError, av.FFmpegError):
            self._container.close()
        if self._whole or not self._complete_bytes:
            self.discard()
            return 0
        os.truncate(self._file, self._complete_bytes)
        self._finish()
        return self.frames - 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            frames, kept = self.frames, self._keep()
            reason = getattr(error, "strerror", None) or str(error)
            kept_words = f"; the first {kept} are kept" if kept else ""
            raise RunError(f"cannot write {str(self.path)!r} after {frames} frames: {reason}{kept_words}") from error

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        if self._kind == "gif":
            stream = self._container.add_stream("gif", rate=self.fps)
            stream.pix_fmt = "pal8"
        else:
            stream = self._container.add_stream("libx264", rate=self.fps, options=dict(_ENCODER))
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
        if self.frames and (kind is None or not self._whole):
            self.close()
        else:
            self.discard()


def _defragment(source: pathlib.Path, target: pathlib.Path, comment: str) -> None:
    """Copy the packets of an mp4 into a plain one with its index at the front."""
    with (
        av.open(f"file:{source.absolute()}") as old,
        av.open(f"file:{target.absolute()}", "w", format="mp4", options={"movflags": "+faststart"}) as new,
    ):
        if comment:
            new.metadata["comment"] = comment
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)


def write_video(path: str | pathlib.Path, frames: np.ndarray, fps: float, upscale: int = 1) -> None:
    """Write uint8 ``[T, H, W, 3]`` to ``.mp4`` or ``.gif`` atomically; the rest as in :class:`VideoWriter`.

    No frames are refused by a ConfigError.
    """
    require(len(frames) > 0, f"no frames are given for {str(path)!r}; accepted: at least one")
    with VideoWriter(path, fps, upscale, whole=True) as out:
        out.append(frames)


def enlarge(frames: np.ndarray, upscale: int) -> np.ndarray:
    """Return frames ``[n, H, W, 3]`` with every pixel as a square of side ``upscale``, padded to even sides.

    yuv420p halves both sides, so an odd side repeats its last line.
    """
    frames = repeat(frames, "t h w c -> t (h a) (w b) c", a=upscale, b=upscale)
    return np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")


def tagged_frame(frame: np.ndarray) -> av.VideoFrame:
    """Return a frame uint8 ``[H, W, 3]`` in sRGB as yuv420p, BT.709 and limited range, with these tags."""
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
