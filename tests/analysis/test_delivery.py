"""What a viewer sees of a stream, worked out by hand, and the interval of a ratio."""

import numpy as np
import pytest

from causvid_jax.analysis.delivery import delivery, ratio_interval


def test_a_steady_stream_keeps_up():
    """Chunks of 8 frames every 0.4 s at 16 frames/s, which need 0.5 s each."""
    figures = delivery([1.0 + 0.4 * i for i in range(11)], 8, 16.0, codec="none")
    assert figures.first_ms == pytest.approx(1000) and figures.gap_p50_ms == pytest.approx(400)
    assert figures.fps == pytest.approx(20) and figures.real_time == pytest.approx(1.25)
    assert (figures.on_time, figures.underruns, figures.stalled_ms) == (1.0, 0, 0.0)


def test_a_late_chunk_stops_the_picture_and_moves_later_deadlines():
    """Play begins at 1 with two chunks, which last until 2; the third comes at 2.25, the fourth is due at 2.75."""
    figures = delivery([0.5, 1.0, 2.25, 2.75, 3.0], 8, 16.0, codec="none")
    assert figures.underruns == 1 and figures.stalled_ms == pytest.approx(250)
    assert figures.on_time == pytest.approx(2 / 3)
    gaps = [0.5, 1.25, 0.5, 0.25]
    assert figures.gap_p95_ms == pytest.approx(np.percentile(gaps, 95) * 1e3)
    assert figures.fps == pytest.approx(8 / np.mean(gaps))


def test_the_interval_of_a_ratio_holds_the_ratio():
    rng = np.random.default_rng(1)
    low, high = ratio_interval(rng.normal(100, 2, 200), rng.normal(150, 2, 200))
    assert low < 1.5 < high and high - low < 0.03
    assert ratio_interval([2.0, 2.0], [3.0, 3.0]) == (1.5, 1.5)
