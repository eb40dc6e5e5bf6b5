"""Split video files into clips of a recipe's size, length and rate; decode them in threads."""

import pathlib
import queue
import threading
from collections.abc import Iterator, Sequence

import av
import numpy as np

from causvid_jax.config import VideoConfig
from causvid_jax.media import iterate_frames


class Unusable(Exception):
    """A video that gives no clip; the message is the reason, such as "is too short"."""


def split_into_clips(path: str | pathlib.Path, config: VideoConfig, limit: int = 0) -> Iterator[np.ndarray]:
    """Yield the consecutive clips of a video, uint8 ``[config.frames, height, width, 3]`` at ``config.fps``.

    Clips start at the first frame and do not overlap. Frames after the last whole clip are dropped. If the last clip
    lacks only one frame, its last frame is repeated: a video of 5.00 seconds has 80 frames at 16 per second, and a clip
    has 81. Frames are scaled to cover the size and cropped at the centre.

    Args:
        path: of the video.
        config: height, width, pixel frames and rate of a clip.
        limit: maximum number of clips (0: all); the rest of the video is not read.

    Raises:
        Unusable: the file is damaged (after any number of clips) or shorter than one clip.
    """
    frames: list[np.ndarray] = []
    clips = count = 0
    try:
        for frame in iterate_frames(path, config.height, config.width, config.fps, whole=True):
            frames.append(frame)
            count += 1
            if len(frames) == config.frames:
                yield np.stack(frames)
                frames, clips = [], clips + 1
                if clips == limit:
                    return
        if len(frames) == config.frames - 1 and frames:
            yield np.stack([*frames, frames[-1]])
            clips += 1
    except IndexError as error:
        raise Unusable("has no video stream") from error
    except ValueError as error:
        # PyAV's errors of damaged data are ValueErrors, too.
        raise Unusable(f"is damaged: {_reason(error)}") from error
    except (OSError, av.FFmpegError) as error:
        raise Unusable(f"cannot be decoded: {_reason(error)}") from error
    if not clips:
        raise Unusable(
            f"is too short: {count} frames at {config.fps:g} per second ({count / config.fps:.2f} s); a clip has "
            f"{config.frames} ({config.frames / config.fps:.2f} s)"
        )


def decode_ahead(
    paths: Sequence[pathlib.Path], config: VideoConfig, *, limit: int = 0, workers: int = 2
) -> Iterator[tuple[int, np.ndarray | Unusable | None]]:
    """Run :func:`split_into_clips` on many videos, ``workers`` of them at a time.

    Each worker waits when two of its clips are not taken yet.

    Yields:
        (i, clip) for every clip of ``paths[i]``, in order; after the last clip (i, None), or (i, error) if the video is
        unusable.
    """
    stop = threading.Event()
    queues: list[queue.Queue] = []

    def start(path: pathlib.Path) -> None:
        queues.append(queue.Queue(maxsize=2))
        clips_of_video = split_into_clips(path, config, limit)
        threading.Thread(target=_fill, args=(clips_of_video, queues[-1], stop), daemon=True).start()

    try:
        for path in paths[:workers]:
            start(path)
        for i in range(len(paths)):
            while True:
                item = queues[i].get()
                if isinstance(item, Exception) and not isinstance(item, Unusable):
                    raise item
                yield i, item
                if not isinstance(item, np.ndarray):
                    break
            if i + workers < len(paths):
                start(paths[i + workers])
    finally:
        stop.set()


def _fill(clips: Iterator[np.ndarray], output: queue.Queue, stop: threading.Event) -> None:
    """Put all ``clips`` into ``output``, then None or the error that they end with."""
    end: Exception | None = None
    try:
        for item in clips:
            if not _put(output, item, stop):
                return
    except Exception as error:
        end = error
    _put(output, end, stop)


def _put(output: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Put ``item`` and return True; return False once ``stop`` is set."""
    while not stop.is_set():
        try:
            output.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _reason(error: BaseException) -> str:
    """Return a PyAV error without its number and file name."""
    return str(getattr(error, "strerror", None) or error)
