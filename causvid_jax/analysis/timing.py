"""Wall-clock times of programs that are already compiled, and what is said about many of them."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """Wall-clock seconds of equal calls, in order."""

    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Linearly interpolated between the sorted times: of n calls, p99 is close to the slowest unless n is large."""
        return float(np.percentile(self.seconds, percent))

    @property
    def median(self) -> float:
        return self.percentile(50)


def each(call: Callable[[Any], Any], carry: Any, repeats: int, *, before: Callable[[Any], Any] | None = None) -> Any:
    """Times of ``repeats`` calls ``carry = call(carry)``, each waited for, after one call that does not count.

    A call may donate its argument. ``before(carry)`` makes the argument ready, outside the timed part.

    Returns:
        :class:`Times` and the last carry.
    """
    seconds = []
    for _ in range(repeats + 1):
        carry = jax.block_until_ready(carry if before is None else before(carry))
        begin = time.perf_counter()
        carry = jax.block_until_ready(call(carry))
        seconds.append(time.perf_counter() - begin)
    return Times(tuple(seconds[1:])), carry


def together(call: Callable[[Any], Any], carry: Any, repeats: int) -> tuple[float, Any]:
    """Seconds per call of ``repeats`` calls ``carry = call(carry)`` of which only the last is waited for.

    What a stream sustains: the host prepares the next call while the device works on this one.
    """
    carry = jax.block_until_ready(call(carry))
    begin = time.perf_counter()
    for _ in range(repeats):
        carry = call(carry)
    carry = jax.block_until_ready(carry)
    return (time.perf_counter() - begin) / repeats, carry
