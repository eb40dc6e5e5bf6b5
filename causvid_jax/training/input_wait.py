"""Measure the share of the time that a training loop waits for input."""

import time
from collections.abc import Callable
from typing import Any

import jax


class InputWait:
    """Measures the share of the time, 0 to 1, in which the device was idle because no batch was ready.

    ::

        wait = InputWait()
        for ...:
            batch = wait(lambda: next(batches), metrics)  # metrics of the step before
            state, metrics = step(state, batch)
        share = wait.share()

    JAX dispatches asynchronously: a wait during which the device is busy is free and is not counted. If the device
    became idle during the wait, all of it counts, so the share is an upper bound.

    Args:
        clock: returns seconds; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._begin = clock()
        self._waited = 0.0

    def __call__(self, make: Callable[[], Any], before: Any) -> Any:
        """Return ``make()`` and measure its time; ``before`` are arrays of the step that the device computes."""
        start = self._clock()
        value = make()
        if all(array.is_ready() for array in jax.tree.leaves(before)):
            self._waited += self._clock() - start
        return value

    def share(self) -> float:
        """Return the share, 0 to 1, since the last call of this method or since the beginning."""
        now = self._clock()
        share = self._waited / max(now - self._begin, 1e-9)
        self._begin, self._waited = now, 0.0
        return min(share, 1.0)
