"""ODE regression against numpy; the loss of the exact solution is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ConfigError
from causvid_jax.diffusion import flow
from causvid_jax.distill import ode_regression

TIMESTEPS = (1000.0, 900.0, 600.0)
BATCH, FRAMES = 6, 7
BLOCKS = CausalConfig(frames_per_block=2, independent_first_frame=True).block_sizes(FRAMES)
STATES = np.random.default_rng(0).standard_normal((4, BATCH, FRAMES, 2, 2, 3)).astype(np.float32)
TEXT = np.zeros((BATCH, 1, 1), np.float32)


def run(seed, velocity, include_clean=True, states=STATES, prompt_switch_prob=0.0, context=None):
    """Return the loss, its metrics, its gradient by a velocity field, and the inputs of the network."""
    seen = {}

    def network(params, x, timestep, text, clean=None):
        seen.update(x=np.asarray(jax.lax.stop_gradient(x)), timestep=np.asarray(timestep), clean=clean)
        return params

    def loss(field):
        return ode_regression.ode_regression_loss(
            network,
            field,
            states,
            TEXT,
            jax.random.key(seed),
            timesteps=TIMESTEPS,
            block_sizes=BLOCKS,
            include_clean=include_clean,
            prompt_switch_prob=prompt_switch_prob,
            context=context,
        )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(velocity)
    if context is not None:
        np.testing.assert_array_equal(seen["clean"], context)
    return value, metrics, gradient, seen["x"], seen["timestep"]


def test_loss_and_gradient_match_numpy():
    velocity = np.random.default_rng(1).standard_normal(STATES.shape[1:]).astype(np.float32)
    value, metrics, gradient, x, timestep = run(0, velocity)
    total, elements, expected = 0.0, 0, np.zeros_like(velocity)
    levels = (*TIMESTEPS, 0.0)
    for b in range(BATCH):
        for f in range(FRAMES):
            q = levels.index(float(timestep[b, f]))
            np.testing.assert_array_equal(x[b, f], STATES[q, b, f])
            if q < 3:
                error = STATES[q, b, f] - levels[q] / 1000 * velocity[b, f] - STATES[3, b, f]
                total, elements = total + (error**2).sum(), elements + error.size
                expected[b, f] = -2 * levels[q] / 1000 * error
    assert 0 < elements < velocity.size  # the draw holds clean blocks and noisy ones
    np.testing.assert_allclose(value, total / elements, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected / elements, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(metrics["noisy_fraction"], elements / velocity.size, rtol=1e-6)


def test_steps_are_uniform_independent_and_equal_inside_a_block():
    steps = np.asarray(ode_regression.sample_block_steps(jax.random.key(0), 4000, BLOCKS, 4))
    assert steps.shape == (4000, FRAMES)
    np.testing.assert_array_equal(steps[:, 1::2], steps[:, 2::2])  # blocks are 1, 2, 2, 2
    starts = steps[:, [0, 1, 3, 5]]
    for block in starts.T:
        np.testing.assert_allclose(np.bincount(block, minlength=4) / 4000, 0.25, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(starts.T), np.eye(4), atol=0.06)


def test_without_clean_entry_every_frame_counts():
    velocity = np.zeros(STATES.shape[1:], np.float32)
    _, metrics, gradient, _, timestep = run(0, velocity, include_clean=False)
    assert set(np.unique(timestep)) == {600.0, 900.0, 1000.0}
    assert metrics["noisy_fraction"] == 1.0 and np.all(gradient != 0)


def test_switched_clips_go_on_from_the_clean_past_of_the_next_clip():
    velocity = np.random.default_rng(1).standard_normal(STATES.shape[1:]).astype(np.float32)
    starts = np.cumsum((0, *BLOCKS))
    seen_starts = set()
    for seed in range(8):
        _, _, gradient, x, timestep = run(seed, velocity, include_clean=False, prompt_switch_prob=1.0)
        for b in range(BATCH):
            first = int((timestep[b] == 0).sum())  # frames of the past: without clean entries only they are at 0
            seen_starts.add(first)
            assert np.all(timestep[b, :first] == 0) and np.all(timestep[b, first:] > 0)
            np.testing.assert_array_equal(x[b, :first], STATES[3, (b + 1) % BATCH, :first])
            np.testing.assert_array_equal(gradient[b, :first], 0)
            for f in range(first, FRAMES):
                np.testing.assert_array_equal(x[b, f], STATES[TIMESTEPS.index(timestep[b, f]), b, f])
            assert np.all(gradient[b, first:] != 0)
    assert seen_starts == set(starts[1:-1])  # every block but the first can be the first after the switch


def test_switch_fraction_is_the_share_of_clips():
    past = np.asarray(ode_regression.splice(jax.random.key(0), 4000, BLOCKS, 0.3))
    assert 0.27 < past[:, 0].mean() < 0.33
    assert not past[:, -1].any()
    assert not np.asarray(ode_regression.splice(jax.random.key(0), 8, (FRAMES,), 1.0)).any()


def test_exact_jump_has_zero_loss():
    """On exact trajectories of Gaussian data, x0 = mean + std z and x_t = (1 - s) mean + width(s) z share one z."""
    mean, std, levels = 0.3, 0.6, np.array([*TIMESTEPS, 0.0]) / 1000
    z = np.random.default_rng(2).standard_normal(STATES.shape[1:])
    width = np.sqrt((1 - levels) ** 2 * std**2 + levels**2)
    states = np.stack([(1 - s) * mean + w * z for s, w in zip(levels, width, strict=True)]).astype(np.float32)

    def network(params, x, timestep, text):
        sigma = flow.expand(timestep / 1000, x)
        z = (x - (1 - sigma) * mean) / jnp.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)
        return (x - params * (mean + std * z)) / jnp.maximum(sigma, 1e-3)

    def loss(scale):
        return ode_regression.ode_regression_loss(
            network, scale, states, TEXT, jax.random.key(0), timesteps=TIMESTEPS, block_sizes=BLOCKS, include_clean=True
        )[0]

    value, slope = jax.value_and_grad(loss)(1.0)
    assert value < 1e-10 and abs(slope) < 1e-5 and loss(1.1) > 1e-3


def test_bad_shapes_are_refused():
    with pytest.raises(ConfigError, match="have 3 states; 3 timesteps need 4"):
        run(0, np.zeros(STATES.shape[1:]), states=STATES[:3])
    given = {"block_sizes": BLOCKS, "include_clean": False}
    for steps in (TIMESTEPS[::-1], (1.0, 0.5, 0.0)):
        with pytest.raises(ConfigError, match="must be at least one, distinct, descending"):
            ode_regression.ode_regression_loss(lambda *_: 0.0, 0, STATES, TEXT, timesteps=steps, **given)
    with pytest.raises(ConfigError, match="do not add up to 6"):
        run(0, np.zeros(STATES.shape[1:]), states=STATES[:, :, :6])


def test_with_a_clean_context_every_block_is_noisy_and_none_is_exchanged():
    context = np.random.default_rng(5).standard_normal(STATES.shape[1:]).astype(np.float32)
    velocity = np.zeros(STATES.shape[1:], np.float32)
    _, metrics, _, x, timestep = run(3, velocity, prompt_switch_prob=1.0, context=context)
    assert metrics["noisy_fraction"] == 1 and timestep.min() > 0
    for b in range(BATCH):
        for f in range(FRAMES):
            np.testing.assert_array_equal(x[b, f], STATES[TIMESTEPS.index(float(timestep[b, f])), b, f])


def test_the_loss_takes_states_instead_of_a_key():
    index = np.random.default_rng(2).integers(0, 4, (BATCH, FRAMES)).astype(np.int32)
    zero = lambda params, x, timestep, text: jnp.zeros_like(x)  # noqa: E731
    settings = {"timesteps": TIMESTEPS, "block_sizes": BLOCKS, "include_clean": True}
    loss, _ = ode_regression.ode_regression_loss(zero, None, STATES, TEXT, index=index, **settings)
    errors = [
        (STATES[index[b, f], b, f] - STATES[3, b, f]) ** 2
        for b in range(BATCH)
        for f in range(FRAMES)
        if index[b, f] < 3
    ]
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-5)
    with pytest.raises(ConfigError, match="without a key needs index"):
        ode_regression.ode_regression_loss(zero, None, STATES, TEXT, **settings)
