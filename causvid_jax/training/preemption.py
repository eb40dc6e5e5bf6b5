"""Stop a run on Ctrl-C or SIGTERM; all hosts stop after the same step."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from causvid_jax.distributed.initialize import Stopped


class Interrupted(KeyboardInterrupt, Stopped):
    """Raised on Ctrl-C after everything is saved; the program ends with status 130."""


class Terminated(SystemExit, Stopped):
    """Raised on SIGTERM after everything is saved; the program ends with status 0."""

    def __init__(self) -> None:
        super().__init__(0)


STOPS: dict[int, tuple[str, type[BaseException]]] = {
    signal.SIGINT: ("Ctrl-C", Interrupted),
    signal.SIGTERM: ("SIGTERM", Terminated),
}
"""Signal to its name, and to the error that ends the program after it."""


@contextlib.contextmanager
def requests() -> Iterator[Callable[[int], int]]:
    """Turn the first Ctrl-C or SIGTERM in the block into a request to stop. A second Ctrl-C stops at once.

    With many processes, a signal to any of them is a request to all. JAX's preemption service chooses the step at which
    all stop: the first step that no process has passed.

    Yields:
        ``requested(step)``, to be called once after every step. It returns the signal that stops the run now, or 0.
    """
    many = jax.process_count() > 1
    received: list[int] = []

    def handler(number: int, frame: Any) -> Any:
        if number == signal.SIGINT:
            if received:
                stop = before[number] if callable(before[number]) else signal.default_int_handler
                return stop(number, frame)  # that of a program first completes imports
            if many:  # the service listens to SIGTERM only
                os.kill(os.getpid(), signal.SIGTERM)
        received.append(number)

    def requested(step: int) -> int:
        if not many:
            return received[0] if received else 0
        if not multihost_utils.reached_preemption_sync_point(step):
            return 0
        return signal.SIGINT if received else signal.SIGTERM

    # With many processes SIGTERM belongs to the service, which catches it from the moment a process joins.
    numbers = (signal.SIGINT,) if many else (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, handler)
    try:
        yield requested
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
