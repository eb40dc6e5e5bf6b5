"""How much of the time a training loop waits for its input."""

import time
from collections.abc import Callable
from typing import Any

import jax


class InputWait:
    """The share of the time that the device had nothing to do because no batch was there.

    ::

        wait = InputWait()
        for ...:
            batch = wait(lambda: next(batches), metrics)   # metrics: what the step before returned
            state, metrics = step(state, batch)
        share = wait.share()

    JAX hands a step to the device and goes on, so the host may well wait for a batch while the device still computes;
    such a wait costs nothing and does not count. One during which the device became free counts whole: the share is an
    upper bound.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._begin = clock()
        self._waited = 0.0

    def __call__(self, make: Callable[[], Any], before: Any) -> Any:
        """``make()``, timed; ``before`` are arrays of the step under way."""
        start = self._clock()
        made = make()
        if all(array.is_ready() for array in jax.tree.leaves(before)):
            self._waited += self._clock() - start
        return made

    def share(self) -> float:
        """The share, 0 to 1, since the last call of this function (or the beginning)."""
        now = self._clock()
        share = self._waited / max(now - self._begin, 1e-9)
        self._begin, self._waited = now, 0.0
        return min(share, 1.0)
