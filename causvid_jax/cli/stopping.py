"""Ctrl-C, SIGTERM and SIGHUP as exceptions that end a program, also where Python would drop an exception."""

import contextlib
import signal
import sys
import threading
import types
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program as Ctrl-C does, with status 128 + number."""
RETRY_SECONDS = 0.05


class Stopped(KeyboardInterrupt):
    """A signal of :data:`SIGNALS`, raised in the main thread."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = signal.Signals(number)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on Ctrl-C, and :class:`Stopped` on a signal of :data:`SIGNALS`.

    A module that is being imported is first completed, since an exception there can crash an extension module. An
    exception that Python drops is raised again ``RETRY_SECONDS`` later; Python drops those of a callback of the garbage
    collector (JAX has one) and of ``__del__``. Signals that are ignored (``nohup``) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outside = sys._getframe(2)
    lost: KeyboardInterrupt | None = None

    def raise_later(error: KeyboardInterrupt) -> None:
        nonlocal lost
        lost = error.with_traceback(None)
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)

    def stop(number: int, frame: types.FrameType | None) -> None:
        nonlocal lost
        if number in SIGNALS and _is_handled(Stopped):  # a second signal must not interrupt the cleanup
            return
        if number != signal.SIGALRM:
            lost = KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)
        error, lost = lost, None
        if error is not None and _is_importing(frame, outside):
            raise_later(error)
        elif error is not None:
            raise error

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            raise_later(unraisable.exc_value)
        else:
            hook(unraisable)

    defaults = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(SIGNALS, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in defaults}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop)
    for number, default in defaults.items():
        if before[number] == default:
            signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_handled(kind: type[BaseException]) -> bool:
    """Return whether the main thread handles an exception of ``kind``, as in ``except``, ``finally`` and ``with``."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


def _is_importing(frame: types.FrameType | None, outside: types.FrameType) -> bool:
    """Return whether a module is imported in ``frame`` or in a caller of it up to ``outside``."""
    while frame is not None and frame is not outside:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
