"""Metrics of the server, for ``/metrics`` (Prometheus) and for the benchmark.

A simulated viewer starts at a session's first chunk and plays without a pause. A chunk is late under two conditions:
when it is ready, the viewer has no frame left, and more time has passed since the request than the chunk plays. The
second condition excludes slow clients.
"""

import collections
import functools
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from causvid_jax.serve.session import Session

QUANTILES = (0.5, 0.95, 0.99)
_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """Counters of one server; all have the label ``recipe``."""

    def __init__(self, recipe: str):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.recent: collections.deque[float] = collections.deque(maxlen=1000)
        self.busy: collections.deque[tuple[float, float]] = collections.deque(maxlen=200)
        self._recipe = recipe
        self._first = self._new(Histogram, "first_chunk_seconds", "From a film's start to its first chunk.", _BUCKETS)
        self._interval = self._new(Histogram, "chunk_interval_seconds", "Between chunks of a film.", _BUCKETS)
        self._chunks = self._new(Counter, "chunks", "Chunks made.")
        self._misses = self._new(Counter, "deadline_misses", "Chunks that came late.")
        self._running = self._new(Gauge, "sessions", "Films that run.")
        self._waiting = self._new(Gauge, "queue_length", "Sessions that wait.")
        factor = self._new(Gauge, "real_time_factor", "Seconds of film per second of the device.")
        factor.set_function(self.real_time_factor)
        memory = self._new(Gauge, "device_memory_bytes", "In use on the first device; 0 if it does not tell.")
        memory.set_function(device_memory)
        for q in QUANTILES:
            quantile = self._new(Gauge, f"chunk_interval_p{100 * q:.0f}_seconds", "Of the last 1000 intervals.")
            quantile.set_function(functools.partial(self.interval, q))

    def _new(self, kind: Any, name: str, about: str, buckets: tuple[float, ...] = ()) -> Any:
        more = {"buckets": buckets} if buckets else {}
        return kind(f"causvid_{name}", about, ["recipe"], registry=self.registry, **more).labels(recipe=self._recipe)

    def block(self, session: Session, film_seconds: float, seconds: float, now: float) -> None:
        """Count a chunk that is ready at ``now``, lasts ``film_seconds`` and took the device ``seconds``."""
        self._chunks.inc()
        self.busy.append((film_seconds, seconds))
        if session.last_chunk is None:
            self._first.observe(now - session.opened)
        else:
            self.recent.append(now - session.last_chunk)
            self._interval.observe(now - session.last_chunk)
        due = now if session.play_end is None else session.play_end
        if now > due and now - session.asked > film_seconds:
            self._misses.inc()
        session.last_chunk = now
        session.play_end = max(due, now) + film_seconds

    def sessions(self, running: int, waiting: int) -> None:
        """Set the number of running and of waiting sessions."""
        self._running.set(running)
        self._waiting.set(waiting)

    def interval(self, quantile: float) -> float:
        """Return the quantile (in [0, 1]) of the last 1000 intervals between chunks, in seconds; 0 without any."""
        return float(np.quantile(list(self.recent), quantile)) if self.recent else 0.0

    def real_time_factor(self) -> float:
        """Return seconds of film per second of the device, over the last 200 chunks; 1 is real time."""
        film, device = (sum(values) for values in zip(*list(self.busy), strict=True)) if self.busy else (0.0, 0.0)
        return film / device if device else 0.0

    def exposition(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry)


def device_memory() -> float:
    """Return the bytes in use on the first device."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    return float(statistics.get("bytes_in_use", 0))
