"""Progress of a loop with the time left: one live line on a terminal, one line now and then in a log file."""

import datetime
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO


class Progress:
    """Reports ``step`` of ``total``, the speed, the time left and a few values.

    ::

        progress = Progress("teacher", total=4000, start=resumed_at)
        for step in range(resumed_at + 1, 4001):
            ...
            progress.update(step, {"loss": loss})
        progress.close()

    The clock of the speed starts at the first update, so that compilation does not spoil the estimate. ``values`` may
    also be a function, called only when a line is shown: reading a device array makes the host wait.

    Args:
        name: what is under way.
        total: the last step.
        start: steps already done.
        every: seconds between lines where ``stream`` is no terminal (on a terminal: 0.2).
        stream: where to write; standard error by default.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        name: str,
        total: int,
        start: int = 0,
        every: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name, self._total, self._step = name, total, start
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._every = 0.2 if self._live else every
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._shown_at = -float("inf")
        self._shown_step: int | None = None
        self._width = 0
        self._values: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = {}

    def update(self, step: int, values: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None) -> None:
        """``step`` steps are done; the first, the last and whatever is due in between is shown."""
        now = self._clock()
        self._step = step
        if self._first is None:
            self._first = (step, now)
        if values is not None:
            self._values = values
        if step >= self._total or now - self._shown_at >= self._every:
            self._show(now)

    def line(self, now: float) -> str:
        """The text: ``teacher 1200/4000 30% 4.62 steps/s, 0:10:06 left, loss 0.1234``."""
        parts = [f"{self._name} {self._step}/{self._total} {self._step / max(self._total, 1):.0%}"]
        if self._first is not None and self._step > self._first[0] and now > self._first[1]:
            speed = (self._step - self._first[0]) / (now - self._first[1])
            left = datetime.timedelta(seconds=round(max(self._total - self._step, 0) / speed))
            shown = f"{speed:.2f} steps/s" if speed >= 0.1 else f"{1 / speed:.1f} s/step"
            parts[0] += f" {shown}"
            parts.append(f"{left} left")
        values = self._values() if callable(self._values) else self._values
        parts += [f"{name} {float(value):.4g}" for name, value in values.items()]
        return ", ".join(parts)

    def note(self, text: str) -> None:
        """A line of its own that does not garble the live one."""
        self._stream.write(f"\r{text.ljust(self._width)}\n" if self._live else f"{text}\n")
        self._stream.flush()
        self._width = 0

    def close(self) -> None:
        """Show where the loop ended, if that is not on the screen yet, and end the live line."""
        if self._first is not None and self._shown_step != self._step:
            self._show(self._clock())
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _show(self, now: float) -> None:
        text = self.line(now)
        # Spaces wipe what a longer line left behind.
        self._stream.write(f"\r{text.ljust(self._width)}" if self._live else f"{text}\n")
        self._stream.flush()
        self._width = len(text) if self._live else 0
        self._shown_at, self._shown_step = now, self._step
