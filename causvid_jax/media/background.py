"""Encode and write videos in a thread, so that the caller does not wait for it."""

import queue
import threading
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from causvid_jax.media.writer import VideoWriter

PARTS = 2
"""Maximum number of parts that wait for the thread."""


class BackgroundWriter:
    """Append frames to open writers in a thread: ``with BackgroundWriter(writers) as out: out.append(frames)``.

    The caller opens the writers before this block and closes them after it. Within the block only the thread uses them.
    When the block ends, also by an exception, the thread has written all appended frames. The next :meth:`append` or
    the end of the block raises an error of the thread; frames after the error are dropped.

    Args:
        writers: one per video.
    """

    def __init__(self, writers: Sequence[VideoWriter]):
        self._writers = writers
        self._parts: queue.Queue[np.ndarray | None] = queue.Queue(PARTS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="video writer", daemon=True)
        self._thread.start()

    def append(self, frames: np.ndarray) -> None:
        """Add uint8 frames ``[B, T, H, W, 3]``, which must not change afterwards; wait while :data:`PARTS` wait.

        Raises:
            RunError: an earlier part could not be written.
            ConfigError: an earlier part has frames that a video cannot have.
        """
        self._raise()
        self._parts.put(frames)

    def close(self) -> None:
        """Wait until all frames are written, and raise the thread's error."""
        self._join()
        self._raise()

    def _write(self) -> None:
        while (part := self._parts.get()) is not None:
            if self._error is not None:
                continue  # still take the parts, so that append() does not wait forever
            try:
                for writer, frames in zip(self._writers, part, strict=True):
                    writer.append(frames)
            except BaseException as error:  # every error belongs to the caller
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        try:
            self._parts.put(None)
            self._thread.join()
        except KeyboardInterrupt as error:
            # Drop the waiting parts, but let the thread finish its part: it still needs open writers.
            self._error = self._error or error
            while self._thread.is_alive():
                if self._parts.empty():
                    self._parts.put(None)
                self._thread.join(0.1)
            raise

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._join()
