"""Metrics against closed forms and clips made by hand."""

import numpy as np
import pytest

from causvid_jax.config import CausalConfig
from causvid_jax.evaluation import metrics, report
from tests import tiny
from tests.refusals import refused


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    """Exact sample moments: for commuting covariances the distance is sum (m_a - m_b)^2 + (s_a - s_b)^2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # zero mean, unit covariance
    s_a, s_b = np.array([1.0, 2.0, 0.5, 0.0, 3.0]), np.array([2.0, 2.0, 1.5, 1.0, 0.1])
    m_a, m_b = np.arange(5.0), np.ones(5)
    expected = np.sum((m_a - m_b) ** 2) + np.sum((s_a - s_b) ** 2)
    assert metrics.frechet_distance(x * s_a + m_a, x * s_b + m_b) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_general_gaussians():
    """Against the product's eigenvalues: tr (C_a C_b)^1/2 is the sum of their roots."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(100, 6)) @ rng.normal(size=(6, 6)), 1 + rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6))
    c_a, c_b = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(c_a @ c_b).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a + c_b) - 2 * cross
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert metrics.frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_block_starts_follow_the_vae():
    assert metrics.block_starts(21, CausalConfig().block_sizes(21)).tolist() == [0, 9, 21, 33, 45, 57, 69, 81]
    causal = CausalConfig(frames_per_block=2, independent_first_frame=True)
    assert metrics.block_starts(5, causal.block_sizes(5)).tolist() == [0, 1, 9, 17]
    refused("are not 22 latent frames", metrics.block_starts, 22, (3,) * 7)


def test_discontinuity_of_a_ramp_with_steps_at_borders():
    """Brightness rises by 2 per frame and by 6 into frames 9 and 21: the ratio is 3."""
    change = np.full(32, 2)
    change[[8, 20]] = 6
    level = np.concatenate([[0], np.cumsum(change)]).astype(np.uint8)
    video = np.broadcast_to(level[None, :, None, None, None], (2, 33, 4, 4, 3))
    assert metrics.discontinuity(video, [0, 9, 21, 33]) == pytest.approx(3.0)
    assert metrics.discontinuity(video[:, ::-1], [0, 9, 21, 33]) == pytest.approx(1.0 * (2 / ((28 * 2 + 2 * 6) / 30)))
    assert metrics.discontinuity(np.zeros_like(video), [0, 9, 21, 33]) == 1.0


def test_blocks_until_a_new_caption_holds():
    assert metrics.blocks_until([True, True, True]) == 1
    assert metrics.blocks_until([False, True, True]) == 2
    assert metrics.blocks_until([True, False, True]) == 3  # it must hold till the end
    assert metrics.blocks_until([True, True, False]) is None


def test_first_block_from_which_a_new_caption_holds():
    assert metrics.first_block([True, False, True]) == 1
    assert metrics.first_block(np.array([False, False, True])) == 3
    assert metrics.first_block([False, False]) is None


def test_switch_scores():
    holds = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]], bool)
    scores = metrics.switch_scores([metrics.blocks_until(row) for row in holds])
    expected = {"within_1": 0.25, "within_2": 0.5, "within_3": 0.5, "ever": 0.75, "median_blocks": 2.0}
    assert scores == expected


def test_network_passes_of_the_published_recipe():
    """50 guided steps against 4 steps and one cache write: 100 and 5 passes for every latent frame."""
    teacher = metrics.network_passes(block_sizes=(21,), passes=(100,))
    student = metrics.network_passes(block_sizes=(3,) * 7, passes=(5,) * 7)
    assert teacher == {"calls": 100, "passes_per_frame": 100}
    assert student == {"calls": 35, "passes_per_frame": 5}


def test_network_passes_count_the_longer_first_blocks():
    """A first block of one frame and two of three, with 6, 2 and 2 passes: (1 6 + 3 2 + 3 2) / 7 = 2.57 a frame."""
    assert metrics.network_passes(block_sizes=(1, 3, 3), passes=(6, 2, 2)) == {"calls": 10, "passes_per_frame": 18 / 7}
    causal = {"frames_per_block": 1, "context_pass": True}
    recipe = tiny.tiny_recipe(
        causal=causal, diffusion={"denoising_timesteps": (1000.0,), "first_block_timesteps": ((1000.0, 500.0),)}
    )
    assert report._passes(recipe)["student"] == {"calls": 7, "passes_per_frame": 7 / 3}  # 3 + 2 + 2, three frames
