"""Blocks as fragments of MP4 (H.264) for Media Source Extensions, or as lossless WebP; and recordings.

A fragment is encoded alone: it starts with a key frame and does not depend on other blocks. All fragments of a film
share one header; the header and any consecutive fragments form a video.
"""

import contextlib
import dataclasses
import hashlib
import io
import pathlib
import re
import threading
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from causvid_jax.config import RunError
from causvid_jax.media.pixels import frame_rate
from causvid_jax.media.writer import BT709, MPEG_RANGE, VideoWriter, enlarge, tagged_frame
from causvid_jax.sampling.script import Script

CODEC = "avc1.640028"
"""MIME codec for browsers: H.264 High, level 4.0, which covers 1920 x 1080 at 30 frames/s."""
_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "16", "profile": "high", "level": "4.0"}
_FLAGS = "empty_moov+default_base_moof+skip_trailer+frag_keyframe"
_CLOCK = 90_000
_NAME = re.compile(r"(video_)?[0-9a-f]{24}\.mp4")
"""Names of recordings and, with ``video_``, of jobs."""


def encode_block(frames: np.ndarray, start: int, index: int, fps: float, upscale: int = 1) -> tuple[bytes, bytes]:
    """Return the header and the fragment of a block.

    Args:
        frames: uint8 ``[n, H, W, 3]``.
        start: number of frames that the viewer is shown before this block.
        index: of the block, from 0.
        fps: frames per second.
        upscale: side of the square that replaces every pixel.

    Raises:
        RunError: the encoder gave no fragment.
    """
    rate = frame_rate(fps)
    frames = enlarge(frames, upscale)
    file = io.BytesIO()
    options = {"movflags": _FLAGS, "fragment_index": str(index + 1), "use_editlist": "0"}
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options=_OPTIONS)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", frames.shape[1], frames.shape[2]
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = BT709, BT709, BT709
        context.color_range, context.thread_count = MPEG_RANGE, 1
        context.time_base = Fraction(1, _CLOCK)
        for i, frame in enumerate(frames):
            picture = tagged_frame(frame)
            picture.time_base, picture.pts = Fraction(1, _CLOCK), round(i * _CLOCK / rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    header, fragment = _split(file.getvalue())
    return header, _at(fragment, round(start * _CLOCK / rate))


def _at(fragment: bytes, time: int) -> bytes:
    """Return the fragment with its decoding time (box ``tfdt``, version 1) set to ``time``, in ticks of the clock.

    The encoder counts from the start of the block.
    """
    position = fragment.index(b"tfdt") + 8
    return fragment[:position] + time.to_bytes(8, "big") + fragment[position + 8 :]


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Return the boxes before the first ``moof``, and the others."""
    position = 0
    while position < len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if kind == b"moof":
            return data[:position], data[position:]
        position += size
    raise RunError("the H.264 encoder gave no fragment")


def encode_strip(frames: np.ndarray) -> bytes:
    """Return uint8 frames ``[n, H, W, 3]`` as one lossless WebP, below each other."""
    file = io.BytesIO()
    Image.fromarray(frames.reshape(-1, *frames.shape[2:])).save(file, "WEBP", lossless=True, quality=0, method=0)
    return file.getvalue()


class Recording:
    """A film on disk. It is playable up to its last frames at any time, and has its script after :meth:`close`.

    Attributes:
        path: of the file.
        most_bytes: size above which it accepts no further block.
        frames, blocks: numbers so far.
        digest: SHA-256 of the uint8 frames so far.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, fps: float, upscale: int, most_bytes: int):
        self.path, self.most_bytes = path, most_bytes
        self.frames = self.blocks = 0
        self.digest = hashlib.sha256()
        self._writer: VideoWriter | None = VideoWriter(path, fps, upscale)
        self._lock = threading.Lock()

    def append(self, frames: np.ndarray) -> None:
        """Add a block, uint8 ``[n, H, W, 3]``. A closed recording ignores it.

        Raises:
            RunError: the disk is full, or the recording is as long as is allowed.
        """
        with self._lock:
            if self._writer is None:
                return
            if self.blocks and self.path.exists() and self.path.stat().st_size > self.most_bytes:
                raise RunError(f"the recording has reached its limit of {self.most_bytes >> 20} MiB")
            self._writer.append(frames)
            self.frames += len(frames)
            self.blocks += 1
            self.digest.update(frames.tobytes())

    def close(self, script: Script, first: int) -> None:
        """Finish the file with the film's script in its metadata. A recording without blocks leaves no file.

        Args:
            script: of the film.
            first: the film's block at which the recording began.

        Raises:
            RunError: the finished file cannot be written. The unfinished file stays.
        """
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is None:
            return
        script = dataclasses.replace(script, first=first, blocks=first + self.blocks, sha256=self.digest.hexdigest())
        writer.comment = script.to_json()
        writer.close()

    def discard(self) -> None:
        """Remove the file, finished or not, and accept no further block."""
        with self._lock:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.discard()
            self.path.unlink(missing_ok=True)


def remove_old(folder: pathlib.Path, kept: int) -> None:
    """Remove all recordings and jobs of a server except the ``kept`` newest. Other files of the folder stay."""
    ages = []
    for path in folder.glob("*.mp4"):
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # another thread has removed it
            ages.append((path.stat().st_mtime, path))
    for _, path in sorted(ages)[:-kept]:
        path.unlink(missing_ok=True)
