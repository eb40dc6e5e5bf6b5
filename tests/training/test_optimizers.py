"""Schedules and optimizers against their formulas."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import OptimizerConfig
from causvid_jax.training.optimizers import frozen, make_optimizer

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=2, b1=0.9, b2=0.99, weight_decay=0.5, clip_norm=1.5)


def rates(config, steps):
    """Linear from 0, then constant, or a half wave that ends at 0 with the last of ``steps``."""
    t = np.arange(steps)
    warm = np.minimum(t / config.warmup_steps, 1)
    if config.schedule == "constant":
        return config.learning_rate * warm
    wave = 0.5 + 0.5 * np.cos(np.pi * (t - config.warmup_steps) / (steps - config.warmup_steps))
    return config.learning_rate * np.where(t < config.warmup_steps, warm, wave)


def adamw(weights, gradients, config):
    """AdamW by its formulas (arXiv 1711.05101), with decoupled decay, behind a clip of the gradient's norm."""
    mean = square = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates(config, len(gradients)), strict=True), 1):
        gradient = gradient * min(1.0, config.clip_norm / np.linalg.norm(gradient))
        mean = config.b1 * mean + (1 - config.b1) * gradient
        square = config.b2 * square + (1 - config.b2) * gradient**2
        change = (mean / (1 - config.b1**step)) / (np.sqrt(square / (1 - config.b2**step)) + 1e-8)
        weights = weights - rate * (change + config.weight_decay * weights)
    return weights


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_frozen_groups_stay_and_the_others_move_by_the_formulas(schedule):
    config = dataclasses.replace(CONFIG, schedule=schedule)
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(3).astype(np.float32) for name in ("encoder", "decoder")}
    gradients = rng.standard_normal((6, 3)).astype(np.float32)
    assert np.linalg.norm(gradients, axis=1).max() > config.clip_norm > np.linalg.norm(gradients, axis=1).min()
    optimizer = frozen(make_optimizer(config, len(gradients)), {"encoder"})
    params = {name: {"w": jnp.asarray(value)} for name, value in start.items()}
    state = optimizer.init(params)
    for gradient in gradients:
        given = {"encoder": {"w": jnp.full(3, np.nan)}, "decoder": {"w": jnp.asarray(gradient)}}
        change, state = optimizer.update(given, state, params)
        params = {name: {"w": params[name]["w"] + change[name]["w"]} for name in params}
    np.testing.assert_array_equal(params["encoder"]["w"], start["encoder"])
    np.testing.assert_allclose(params["decoder"]["w"], adamw(start["decoder"], gradients, config), rtol=2e-5)
