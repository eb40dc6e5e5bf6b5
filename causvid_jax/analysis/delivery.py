"""Measure how a stream reaches a viewer: gaps between chunks, real-time factor, deadlines and underruns.

A chunk is the frames of one block. The viewer starts to play when ``start_chunks`` chunks have arrived and then shows
``fps`` frames a second. The deadline of chunk i is the time at which all frames before it have been shown. If it is
late, the picture stops until it arrives (an underrun), and all later deadlines move by the delay.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Delivery:
    """Figures of one stream.

    Attributes:
      codec: the decoder.
      chunks: how many chunks arrived.
      first_ms: from the start of the stream to the first chunk, with compiled programs.
      gap_p50_ms, gap_p95_ms, gap_p99_ms: between one arrival and the next.
      fps: frames per second from the first arrival to the last.
      real_time: ``fps`` over the frame rate of the video; at least 1 is real time.
      on_time: share of the chunks after the start that arrived by their deadline.
      underruns: number of stops of the viewer's picture.
      stalled_ms: total duration of these stops.
    """

    codec: str
    chunks: int
    first_ms: float
    gap_p50_ms: float
    gap_p95_ms: float
    gap_p99_ms: float
    fps: float
    real_time: float
    on_time: float
    underruns: int
    stalled_ms: float


def delivery(arrivals: Sequence[float], frames: int, fps: float, *, codec: str, start_chunks: int = 2) -> Delivery:
    """Return the figures of chunks of ``frames`` frames that arrived at ``arrivals`` seconds after the start.

    It needs at least ``start_chunks + 1`` chunks, and at least two.
    """
    assert len(arrivals) > max(start_chunks, 1), "too few chunks for a viewer"
    gaps = np.diff(arrivals)
    rate = frames / float(gaps.mean())
    shown_until = arrivals[start_chunks - 1] + start_chunks * frames / fps
    late, stalled = 0, 0.0
    for arrival in arrivals[start_chunks:]:
        if arrival > shown_until:
            late, stalled = late + 1, stalled + arrival - shown_until
        shown_until = max(shown_until, arrival) + frames / fps
    p50, p95, p99 = (float(np.percentile(gaps, percent)) * 1e3 for percent in (50, 95, 99))
    return Delivery(
        codec=codec,
        chunks=len(arrivals),
        first_ms=arrivals[0] * 1e3,
        gap_p50_ms=p50,
        gap_p95_ms=p95,
        gap_p99_ms=p99,
        fps=rate,
        real_time=rate / fps,
        on_time=1 - late / (len(arrivals) - start_chunks),
        underruns=late,
        stalled_ms=stalled * 1e3,
    )


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of ``median(theirs) / median(ours)``: above 1, ours is faster.

    Calls of each program are resampled independently; correlation of consecutive calls is ignored.
    """
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(np.asarray(x, np.float64), (2000, len(x))), axis=1) for x in (theirs, ours)]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return float(low), float(high)
