"""The progress line: speed and time left by hand-computed figures, in a file and on a terminal."""

import io

import pytest

from causvid_jax import progress as module
from causvid_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` lets that many seconds pass."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def lines(clock, seconds_per_step, start, steps, total=100):
    stream = io.StringIO()
    progress = Progress("teacher", total, stream=stream)
    clock(50.0)  # compilation, which is not counted
    for step in range(start + 1, steps + 1):
        clock(seconds_per_step)
        progress.update(step, lambda step=step: {"loss": 1 / step})
    progress.close()
    return stream.getvalue().splitlines()


def test_a_log_file_gets_a_line_every_half_minute_and_the_last(clock):
    text = lines(clock, seconds_per_step=2.0, start=0, steps=100)
    assert text[0].startswith("teacher 1/100 1%") and text[0].endswith("loss 1")
    # 30 seconds later, 15 steps of 2 s; 84 are left: 168 s.
    assert text[1] == "teacher 16/100 16%,  2.00s/step, 02:48 left, loss 0.0625"
    assert text[-1] == "teacher 100/100 100%,  2.00s/step, 00:00 left, loss 0.01"
    assert len(text) == 1 + 99 * 2 // 30 + 1


def test_a_resumed_loop_counts_its_own_steps_only(clock):
    text = lines(clock, seconds_per_step=20.0, start=60, steps=64)
    assert text[-1] == "teacher 63/100 63%, 20.00s/step, 12:20 left, loss 0.01587"


def test_a_terminal_gets_one_line_that_is_overwritten(clock):
    stream = Terminal()
    progress = Progress("teacher", 3, stream=stream)
    for step in (1, 2, 3):
        clock(1.0)
        progress.update(step, lambda: {"loss": 0.5})
    progress.note("saved")
    progress.close()
    text = stream.getvalue()
    assert "saved\n" in text and "3/3 100%" in text and text.count("\n") == 2


def test_values_are_read_only_when_shown(clock):
    calls = []
    progress = Progress("teacher", 100, stream=io.StringIO())
    for step in range(1, 12):
        clock(5.0)
        progress.update(step, lambda: calls.append(1) or {})
    assert len(calls) == 2  # the first, and the one 30 s later
