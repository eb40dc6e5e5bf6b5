"""From a video file to clips of a recipe's size, length and rate, decoded ahead in threads."""

import pathlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np

from causvid_jax.config import VideoConfig
from causvid_jax.media import iterate_frames


class Unusable(Exception):
    """A video gives no clip; the message says why."""


def cut(path: str | pathlib.Path, config: VideoConfig, limit: int = 0) -> Iterator[np.ndarray]:
    """The consecutive clips of a video, uint8 ``[config.frames, height, width, 3]`` at ``config.fps``.

    Clips start at the first frame and do not overlap; what remains at the end is too short for one and is left out.
    Frames are scaled to cover the size and cropped at the centre.

    Args:
        path: of the file.
        config: height, width, frames and rate of a clip.
        limit: at most this many clips (0: all); what comes after them is not read.

    Raises:
        Unusable: after any number of clips, a file that is damaged or shorter than one clip.
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
    except IndexError as error:
        raise Unusable("has no video stream") from error
    except ValueError as error:
        # PyAV's errors of damaged data are ValueErrors, too.
        raise Unusable(f"is damaged: {_reason(error)}") from error
    except (OSError, av.FFmpegError) as error:
        raise Unusable(f"cannot be decoded: {_reason(error)}") from error
    if not clips:
        raise Unusable(
            f"is too short: {count} frames at {config.fps} a second ({count / config.fps:.2f} s); a clip has "
            f"{config.frames} ({config.frames / config.fps:.2f} s)"
        )


def cut_ahead(
    paths: Sequence[pathlib.Path], config: VideoConfig, *, limit: int = 0, workers: int = 2
) -> Iterator[tuple[int, np.ndarray | Unusable | None]]:
    """:func:`cut` of many videos, ``workers`` of them at a time, each at most two clips ahead.

    Yields:
        (i, clip) of ``paths[i]`` in order, and after its last clip (i, None), or (i, error) if it is unusable.
    """
    stop = threading.Event()
    queues: list[queue.Queue] = []

    def start(path: pathlib.Path) -> None:
        waiting: queue.Queue = queue.Queue(maxsize=2)
        queues.append(waiting)
        threading.Thread(target=_fill, args=(lambda: cut(path, config, limit), waiting, stop), daemon=True).start()

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


def _fill(make: Callable[[], Iterator[np.ndarray]], waiting: queue.Queue, stop: threading.Event) -> None:
    """Everything that ``make()`` yields, then None or what it raised."""
    end: Exception | None = None
    try:
        for item in make():
            if not _put(waiting, item, stop):
                return
    except Exception as error:
        end = error
    _put(waiting, end, stop)


def _put(waiting: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Put ``item``, unless nobody wants it any more."""
    while not stop.is_set():
        try:
            waiting.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _reason(error: BaseException) -> str:
    """PyAV's errors without their number and file name."""
    return str(getattr(error, "strerror", None) or error)
