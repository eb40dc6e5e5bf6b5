"""Show the progress of a loop: one live line on a terminal, one line every half minute in a log file (by tqdm)."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

FORMAT = "{desc} {n_fmt}/{total_fmt} {percentage:.0f}%, {rate_fmt}, {remaining} left{postfix}"
LOG_SECONDS = 30.0


class Progress:
    """The progress of ``total`` steps, with speed, time left and a few values.

    The clock of the speed starts at the first update, so that compilation does not affect the estimate. The function
    ``values`` is called only when a line is shown, because reading a device array makes the host wait.
    """

    def __init__(self, name: str, total: int, stream: TextIO | None = None):
        self._name, self._total = name, total
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None
        self._shown_at = -float("inf")

    def update(self, step: int, values: Callable[[], Mapping[str, float]] = dict) -> None:
        """Record that ``step`` steps are done; show the first, the last, and updates that are due in between."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
            if self._live:
                self._bar = tqdm(
                    desc=self._name,
                    total=self._total,
                    initial=step,
                    file=self._stream,
                    bar_format=FORMAT,
                    unit="step",
                    dynamic_ncols=True,
                )
        if step < self._total and now - self._shown_at < (0.2 if self._live else LOG_SECONDS):
            return
        self._shown_at = now
        text = ", ".join(f"{name} {value:.4g}" for name, value in values().items())
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(text)
            return
        first, began = self._first
        self.note(
            tqdm.format_meter(
                step,
                self._total,
                now - began,
                prefix=self._name,
                unit="step",
                bar_format=FORMAT,
                initial=first,
                postfix=text,
            )
        )

    def note(self, text: str) -> None:
        """Write a line above the live one."""
        if self._live:
            tqdm.write(text, file=self._stream)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """End the live line."""
        if self._bar is not None:
            self._bar.close()
