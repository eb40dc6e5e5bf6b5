import pytest

from causvid_jax.training.input_wait import InputWait


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Array:
    """An array that becomes ready at a set time."""

    def __init__(self, clock, done):
        self._clock, self._done = clock, done

    def is_ready(self):
        return self._clock() >= self._done


def test_only_a_wait_that_leaves_the_device_idle_counts():
    clock = Clock()
    wait = InputWait(clock)

    def make(seconds):
        def call():
            clock.now += seconds
            return seconds

        return call

    assert wait(make(2.0), {}) == 2.0  # nothing was running
    clock.now += 1.0
    wait(make(3.0), {"loss": Array(clock, 100.0)})  # the device is busy to the end
    wait(make(1.0), {"a": Array(clock, 6.5), "b": Array(clock, 6.9)})  # it became free on the way
    clock.now = 10.0
    assert wait.share() == pytest.approx(0.3)
    clock.now = 14.0
    assert wait.share() == 0.0


def test_an_error_of_the_input_passes():
    with pytest.raises(StopIteration):
        InputWait()(lambda: next(iter(())), {})
