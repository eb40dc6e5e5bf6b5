"""Frames written in a thread: against a clock that only the test moves, and files as the writer alone leaves them."""

import collections
import contextlib
import threading
import time
import types

import numpy as np
import pytest

from causvid_jax import media
from causvid_jax.config import RunError
from causvid_jax.media import background
from causvid_jax.sampling import session

DEVICE, ENCODING, BLOCKS = 100, 58, 6
"""Milliseconds of a block by the fake clock, and the number of blocks."""


class Clock:
    """Milliseconds that every thread has spent, by its own calls of :meth:`spend`."""

    def __init__(self):
        self.spent = collections.Counter()

    def spend(self, milliseconds):
        self.spent[threading.current_thread() is threading.main_thread()] += milliseconds

    def __call__(self):
        return self.spent[True]


class FakeWriter:
    """A writer whose encoder costs time of the clock."""

    def __init__(self, clock):
        self.clock, self.frames, self.parts = clock, 0, []

    def append(self, frames):
        self.clock.spend(ENCODING)
        self.frames += len(frames)
        self.parts.append(frames.copy())


def test_a_session_spends_no_time_on_encoding_in_the_thread_that_dispatches(monkeypatch):
    clock, said = Clock(), []
    writers = [FakeWriter(clock), FakeWriter(clock)]
    clips = np.arange(BLOCKS * 2 * 3, dtype=np.uint8).reshape(BLOCKS, 2, 3, 1, 1, 1)

    def blocks(opened, texts, timing, ahead):
        for part in clips:
            clock.spend(DEVICE)
            timing.add(part.shape[1], clock() / 1000)
            yield part

    opened = types.SimpleNamespace(
        request=types.SimpleNamespace(prompt=("a", "b"), outputs=("a.mp4", "b.mp4"), pixel_size=1, teacher=False),
        recipe=types.SimpleNamespace(video=types.SimpleNamespace(fps=16)),
        texts=["a", "b"],
        switches={},
        encoder=None,
        frames=3 * BLOCKS,
    )
    free = iter(writers)
    monkeypatch.setattr(session.files, "VideoWriter", lambda *_: contextlib.nullcontext(next(free)))
    monkeypatch.setattr(session.encoder, "encode", lambda reader, texts: texts)
    monkeypatch.setattr(session, "comment_of", lambda opened, index: "")
    monkeypatch.setattr(session, "student_blocks", blocks)
    monkeypatch.setattr(session, "compile_ahead", lambda *_: contextlib.nullcontext())
    timing = session.run(opened, said.append)
    assert clock.spent == {True: BLOCKS * DEVICE, False: BLOCKS * 2 * ENCODING}
    assert timing.total == BLOCKS * DEVICE / 1000 and timing.frames == 3 * BLOCKS
    for i, writer in enumerate(writers):  # every frame, in order, in the file of its prompt
        np.testing.assert_array_equal(np.stack(writer.parts), clips[:, i])


def test_few_parts_wait():
    """The producer is as fast as it can be: at most PARTS wait, one is being written and one is being handed over."""
    handed, waiting = [0], []

    class Slow:
        def append(self, frames):
            waiting.append(handed[0] - len(waiting))

    with background.BackgroundWriter([Slow()]) as out:
        for i in range(200):
            handed[0] = i + 1
            out.append(np.zeros((1, 1)))
    assert len(waiting) == 200 and max(waiting) <= background.PARTS + 2


class Full(media.VideoWriter):
    """A writer on a disk that is full after four frames."""

    def _encode(self, frame):
        if self.frames == 4:
            raise OSError(28, "No space left on device")
        super()._encode(frame)


@pytest.mark.parametrize("parts", [2, 40])
def test_an_error_of_the_thread_reaches_the_caller_and_leaves_what_the_writer_leaves(tmp_path, parts):
    """At the end of the block if no more comes, else at a later part; the caller never waits for a dead thread."""
    clip = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 48, 3), np.uint8)
    words = "after 4 frames: No space left on device; the first 3 are kept"
    with (
        pytest.raises(RunError, match=words),
        Full(tmp_path / "a.mp4", 16) as writer,
        background.BackgroundWriter([writer]) as out,
    ):
        for _ in range(parts):
            out.append(clip)
    assert len(media.read_video(tmp_path / "a.mp4", 32, 48)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert not any(thread.name == "video writer" for thread in threading.enumerate())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_frames_before_an_error_of_the_caller_are_a_complete_video(tmp_path, error):
    clip = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 48, 3), np.uint8)
    with (
        pytest.raises(error),
        media.VideoWriter(tmp_path / "a.mp4", 16) as writer,
        background.BackgroundWriter([writer]) as out,
    ):
        out.append(clip)
        out.append(clip)
        raise error
    assert writer.frames == 6 and len(media.read_video(tmp_path / "a.mp4", 32, 48)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_an_interrupt_of_the_wait_drops_what_waits_but_not_the_part_being_written():
    begun, written = threading.Event(), []

    class UntilInterrupted:
        def append(self, frames):
            begun.set()
            while out._error is None:
                time.sleep(0.001)
            written.append(frames)

    def interrupted(part):
        out._parts.put = put
        raise KeyboardInterrupt

    out = background.BackgroundWriter([UntilInterrupted()])
    put = out._parts.put
    out.append([1])
    assert begun.wait(60)
    out.append([2])
    out.append([3])
    out._parts.put = interrupted
    with pytest.raises(KeyboardInterrupt):
        out.close()
    assert written == [1] and not out._thread.is_alive()
