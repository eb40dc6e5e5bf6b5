"""Solvers against closed forms and against diffusers; trajectories at exactly the student's timesteps."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import DiffusionConfig
from causvid_jax.diffusion import flow, solvers
from causvid_jax.distill import trajectories
from tests import tiny
from tests.refusals import refused

MEAN, STD = 0.7, 0.4
NOISE = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 4)).astype(np.float32)


gaussian_velocity = functools.partial(tiny.gaussian_velocity, mean=MEAN, std=STD)


def flow_map(x, start, end):
    """Return the exact ODE solution: the standardised state is constant."""

    def moments(s):
        return (1 - s) * MEAN, np.sqrt((1 - s) ** 2 * STD**2 + s**2)

    (m0, s0), (m1, s1) = moments(start), moments(end)
    return m1 + s1 * (x - m0) / s0


def error(solver, sigmas):
    got = jax.jit(lambda noise: solver(gaussian_velocity, noise, sigmas))(NOISE)
    return float(np.abs(got - flow_map(NOISE.astype(np.float64), sigmas[0], sigmas[-1])).max())


def test_euler_is_of_first_order():
    errors = [error(solvers.euler, flow.sigma_from_u(1 - np.arange(n + 1) / n, 3.0)) for n in (25, 50, 100)]
    assert errors[-1] < 0.04
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2.0, rtol=0.1)


def test_unipc_is_of_third_order_on_a_log_snr_grid():
    """The last step, from sigma > 0 to 0, is a plain denoising; the exact answer is therefore the exact ODE up to
    there, then that denoising. UniP-2 alone would be of second order; the corrector raises it to third."""
    errors = []
    for n in (17, 33, 65):
        sigmas = np.append(1 / (1 + np.exp(np.linspace(-2.0, 2.0, n))), 0.0)
        last = jnp.full(NOISE.shape[:2], sigmas[-2])
        before = jnp.asarray(flow_map(NOISE, sigmas[0], sigmas[-2]))
        exact = flow.x0_from_velocity(before, gaussian_velocity(before, 1000 * last), last)
        got = jax.jit(lambda noise, sigmas=sigmas: solvers.unipc(gaussian_velocity, noise, sigmas))(NOISE)
        errors.append(float(np.abs(got - exact).max()))
    assert errors[-1] < 5e-5
    assert errors[0] / errors[1] > 7 and errors[1] / errors[2] > 7


def test_unipc_reaches_the_data_from_the_published_grid():
    assert error(solvers.unipc, solvers.unipc_sigmas(50, 3.0)) < 5e-3


@pytest.mark.parametrize("shift", [3, 8])
def test_unipc_equals_diffusers(shift):
    golden = np.load(pathlib.Path(__file__).parents[1] / "golden" / "unipc.npz")

    def velocity(x, timestep):
        return jnp.tanh(x) * jnp.cos(flow.expand(timestep, x) / 300) + 0.3 * x - 0.1

    got = solvers.unipc(velocity, golden["noise"], golden[f"sigmas_{shift}"], integer_timesteps=True)
    np.testing.assert_allclose(got, golden[f"x0_{shift}"], atol=5e-4, rtol=0)


def test_unipc_grid_and_timesteps_as_published():
    sigmas = solvers.unipc_sigmas(50, 8.0)
    u = np.linspace(float(np.float32(0.999)), 0, 51)
    np.testing.assert_allclose(sigmas, 8 * u / (1 + 7 * u), atol=1e-12)
    seen = []

    def velocity(x, timestep):
        jax.debug.callback(lambda t: seen.append(float(t)), timestep[0, 0], ordered=True)
        return x

    jax.block_until_ready(solvers.unipc(velocity, jnp.asarray(NOISE), sigmas, integer_timesteps=True))
    jax.effects_barrier()
    assert seen == [float(int(1000 * s)) for s in sigmas[:-1]]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_whole_timesteps_are_the_published_ones(shift):
    """Use the published order of operations: at shift 1 some timesteps are at the edge between two whole numbers."""
    for steps in (9, 18, 37, 40, 50):
        u = np.linspace(float(np.float32(1.0 - 1 / 1000)), 0.0, steps + 1)[:-1]
        published = (shift * u / (1 + (shift - 1) * u) * 1000).astype(np.int64)
        ours = np.floor(flow.timestep_from_sigma(solvers.unipc_sigmas(steps, shift)[:-1]))
        np.testing.assert_array_equal(ours, published)


def test_euler_records_states():
    sigmas = flow.sigma_from_u(1 - np.arange(7) / 6, 2.0)
    x, expected = NOISE, [NOISE]
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + np.float32(b - a) * np.asarray(gaussian_velocity(x, np.full(x.shape[:2], 1000 * a, np.float32)))
        expected.append(x)
    got = solvers.euler(gaussian_velocity, NOISE, sigmas, record=(0, 2, 5, 6))
    np.testing.assert_allclose(got, np.stack(expected)[[0, 2, 5, 6]], atol=1e-5)
    np.testing.assert_allclose(solvers.euler(gaussian_velocity, NOISE, sigmas), expected[-1], atol=1e-5)
    refused(r"record is \(7,\)", solvers.euler, gaussian_velocity, NOISE, sigmas, record=(7,))


def test_solve_dispatches_and_refuses_bad_grids():
    exact = flow_map(NOISE, 1.0, 0.0)
    for solver, tolerance in (("euler", 0.1), ("unipc", 2e-3)):
        config = DiffusionConfig(solver=solver, shift=3.0, num_inference_steps=40)
        assert np.abs(solvers.solve(config, gaussian_velocity, NOISE) - exact).max() < tolerance
    refused("strictly descending", solvers.euler, gaussian_velocity, NOISE, np.array([0.0, 1.0]))
    for sigmas in ([1000.0, 500.0, 0.0], [1.0, 0.5, -0.5]):  # timesteps, and a level below the data
        refused("strictly descending, in .0, 1.", solvers.euler, gaussian_velocity, NOISE, np.array(sigmas))
    plain = solvers.euler.__wrapped__  # without the check of annotations, which tests alone have
    refused("noise is of type int64", plain, gaussian_velocity, NOISE.astype(int), np.array([1.0, 0.0]))
    refused("they must be equal", solvers.euler, lambda x, t: x[..., :1], NOISE, np.array([1.0, 0.0]))
    refused("accepted: <1 to 0", solvers.unipc, gaussian_velocity, NOISE, np.array([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("steps,passes", [(50, 52), (48, 48)])
def test_trajectory_grid_holds_every_student_timestep(steps, passes):
    config = DiffusionConfig(shift=8.0, num_inference_steps=steps)
    sigmas, indices = trajectories.trajectory_grid(config)
    assert trajectories.network_passes(config) == passes == len(sigmas) - 1
    np.testing.assert_allclose(1000 * sigmas[list(indices)], (*flow.student_timesteps(config), 0.0), atol=1e-9)
    np.testing.assert_array_equal(np.isin(np.round(flow.teacher_sigmas(config), 9), np.round(sigmas, 9)), True)
    assert np.all(np.diff(sigmas) < 0)


def test_published_subset_of_a_fifty_step_trajectory():
    config = DiffusionConfig(shift=8.0, num_inference_steps=50, denoising_timesteps=(1000.0, 280.0, 120.0))
    assert trajectories.trajectory_grid(config)[1] == (0, 36, 44, 50)


def test_trajectory_states_lie_on_the_exact_ode():
    config = DiffusionConfig(shift=3.0, num_inference_steps=400)
    states = jax.jit(lambda noise: trajectories.teacher_trajectory(gaussian_velocity, noise, config))(NOISE)
    assert states.shape == (5, *NOISE.shape)
    np.testing.assert_array_equal(states[0], NOISE)
    for state, timestep in zip(states, (*flow.student_timesteps(config), 0.0), strict=True):
        np.testing.assert_allclose(state, flow_map(NOISE, 1.0, timestep / 1000), atol=1e-2)
