"""The progress line: speed and time left by hand-computed figures, on a terminal and in a file."""

import io

from causvid_jax.training.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, seconds_per_step, steps, start=0, total=100, every=30.0, compile_seconds=50.0):
    clock = Clock()
    progress = Progress("teacher", total, start=start, every=every, stream=stream, clock=clock)
    clock.now += compile_seconds
    for step in range(start + 1, steps + 1):
        clock.now += seconds_per_step
        progress.update(step, {"loss": 1 / step})
    return progress, clock


def test_a_log_file_gets_a_line_every_so_often_and_the_last():
    stream = io.StringIO()
    progress, _ = run(stream, seconds_per_step=2.0, steps=100)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "teacher 1/100 1%, loss 1"
    # 30 seconds later, 15 steps of 2 s; 84 are left: 168 s. Compilation is not counted.
    assert lines[1] == "teacher 16/100 16% 0.50 steps/s, 0:02:48 left, loss 0.0625"
    assert lines[-1] == "teacher 100/100 100% 0.50 steps/s, 0:00:00 left, loss 0.01"
    assert len(lines) == 1 + 99 * 2 // 30 + 1 and "\r" not in stream.getvalue()


def test_a_resumed_loop_counts_its_own_steps_only():
    stream = io.StringIO()
    run(stream, seconds_per_step=20.0, steps=64, start=60)
    assert stream.getvalue().splitlines()[-1] == "teacher 63/100 63% 20.0 s/step, 0:12:20 left, loss 0.01587"


def test_a_terminal_gets_one_line_that_is_overwritten():
    stream = Terminal()
    progress, _ = run(stream, seconds_per_step=1.0, steps=3)
    progress.note("saved")
    progress.close()
    text = stream.getvalue()
    assert text.count("\r") == 4 and text.count("\n") == 1
    assert text.split("\r")[-1].rstrip() == "saved"


def test_values_are_read_only_when_shown():
    stream, clock, calls = io.StringIO(), Clock(), []
    progress = Progress("x", 100, stream=stream, clock=clock, every=10.0)

    def values():
        calls.append(clock.now)
        return {"loss": 2.0}

    for step in range(1, 31):
        clock.now += 1
        progress.update(step, values)
    progress.close()
    assert calls == [101.0, 111.0, 121.0, 130.0]
    assert stream.getvalue().endswith("x 30/100 30% 1.00 steps/s, 0:01:10 left, loss 2\n")


def test_close_without_a_step_writes_nothing():
    stream = Terminal()
    Progress("x", 10, stream=stream).close()
    assert stream.getvalue() == ""
