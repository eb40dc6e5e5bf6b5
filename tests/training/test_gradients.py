"""Accumulated gradients against the gradient of the whole batch, in closed form."""

import jax
import numpy as np
import pytest

from causvid_jax.config import ConfigError
from causvid_jax.training.gradients import accumulated_gradient

X = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
W = np.array([0.5, -1.0, 2.0], np.float32)


def loss(w, batch, key):
    residual = batch["x"] @ w - 1.0
    value = (residual**2).mean()
    return value, {"loss": value, "first": batch["x"][0, 0]}


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_parts_add_up_to_the_whole_batch(parts):
    run = jax.jit(accumulated_gradient, static_argnums=(0, 4))
    gradient, metrics = run(loss, W, {"x": X}, jax.random.key(0), parts)
    residual = X @ W - 1.0
    np.testing.assert_allclose(gradient, 2 * X.T @ residual / 12, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (residual**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["first"], X[:parts, 0].mean(), rtol=1e-5)  # part i begins with example i


def test_every_part_has_its_own_key():
    def noisy(w, batch, key):
        return w.sum(), {"draw": jax.random.uniform(key), "square": jax.random.uniform(key) ** 2}

    _, metrics = accumulated_gradient(noisy, W, {"x": X}, jax.random.key(0), 4)
    assert metrics["square"] - metrics["draw"] ** 2 > 1e-3  # a variance: the draws differ


@pytest.mark.parametrize("parts", [1, 3])
def test_arrays_among_the_metrics_are_put_together_again(parts):
    def kept(w, batch, key):
        return w.sum(), {"x": batch["x"]}

    _, metrics = accumulated_gradient(kept, W, {"x": X}, jax.random.key(0), parts)
    np.testing.assert_array_equal(metrics["x"], X)


def test_unequal_parts_are_refused():
    with pytest.raises(ConfigError, match="a batch of 12 cannot be accumulated in 5 equal parts"):
        accumulated_gradient(loss, W, {"x": X}, jax.random.key(0), 5)


def masked(w, batch, key):
    residual, mask = batch["x"] @ w - 1.0, batch["mask"]
    value = (mask * residual**2).sum() / mask.sum().clip(1)
    return value, {"loss": value, "weight": mask.sum()}


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_parts_of_a_masked_mean_count_by_their_elements(parts):
    mask = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0], np.float32)  # of 6 parts one has none
    run = jax.jit(accumulated_gradient, static_argnums=(0, 4))
    gradient, metrics = run(masked, W, {"x": X, "mask": mask}, jax.random.key(0), parts)
    residual = X @ W - 1.0
    np.testing.assert_allclose(gradient, 2 * X.T @ (mask * residual) / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (mask * residual**2).sum() / mask.sum(), rtol=1e-5)
    assert set(metrics) == {"loss"}
