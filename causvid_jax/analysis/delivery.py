"""Measure how a stream reaches a viewer: gaps between chunks, real-time factor, deadlines and underruns.

A chunk is the frames of one block. The viewer starts to play when :data:`START_CHUNKS` chunks have arrived and then
shows ``fps`` frames a second. The deadline of chunk i is the time at which all frames before it have been shown. If a
chunk is late, the picture stops until it arrives (an underrun), and all later deadlines move by the delay.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

START_CHUNKS = 2
CONFIDENCE, DRAWS = 0.95, 2000
"""Confidence and number of resamples of the bootstrap interval of a ratio."""


@dataclasses.dataclass(frozen=True)
class Delivery:
    """Figures of one stream.

    Attributes:
        codec: the decoder.
        chunks: number of chunks that arrived.
        first_ms: milliseconds from the start of the stream to the first chunk, with compiled programs.
        gap_p50_ms, gap_p95_ms, gap_p99_ms: percentiles of the milliseconds between one arrival and the next.
        fps: pixel frames per second from the first arrival to the last.
        real_time: ``fps`` over the frame rate of the video; at least 1 is real time.
        on_time: share of the chunks after the start that arrived by their deadline, in [0, 1].
        underruns: number of stops of the viewer's picture.
        stalled_ms: total milliseconds of these stops.
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


def delivery(arrivals: Sequence[float], frames: int, fps: float, *, codec: str) -> Delivery:
    """Return the figures of chunks of ``frames`` pixel frames that arrived at ``arrivals`` seconds after the start.

    ``fps`` is the rate of the video. At least ``START_CHUNKS + 1`` chunks are needed.
    """
    assert len(arrivals) > START_CHUNKS, "too few chunks for a viewer"
    gaps = np.diff(arrivals)
    rate = frames / float(gaps.mean())
    shown_until = arrivals[START_CHUNKS - 1] + START_CHUNKS * frames / fps
    late, stalled = 0, 0.0
    for arrival in arrivals[START_CHUNKS:]:
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
        on_time=1 - late / (len(arrivals) - START_CHUNKS),
        underruns=late,
        stalled_ms=stalled * 1e3,
    )


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of ``median(theirs) / median(ours)``; above 1 ours is faster.

    ``ours`` and ``theirs`` are the times of single calls, in one unit.

    Calls of each program are resampled independently; correlation of consecutive calls is ignored.
    """
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(np.asarray(x, np.float64), (DRAWS, len(x))), axis=1) for x in (theirs, ours)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians[0] / medians[1], (tail, 100 - tail))
    return float(low), float(high)
