"""Schedules and optimizers against their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import ConfigError, OptimizerConfig
from causvid_jax.training.optimizers import MUON_MOMENTUM, MUON_RMS, frozen, make_optimizer

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=2, b1=0.9, b2=0.99, weight_decay=0.5, clip_norm=1.5)


def rates(config, steps):
    """Return the rates: linear from 0, then constant, or half a wave down to 0 at the end and before each restart."""
    parts = np.diff([0, *(step for step in config.restarts if step < steps), steps])
    return np.concatenate([config.restart_factor**i * cycle(config, length) for i, length in enumerate(parts)])


def cycle(config, steps):
    t = np.arange(steps)
    warm = np.minimum(t / config.warmup_steps, 1) if config.warmup_steps else np.ones(steps)
    if config.schedule == "constant":
        return config.learning_rate * warm
    wave = 0.5 + 0.5 * np.cos(np.pi * (t - config.warmup_steps) / (steps - config.warmup_steps))
    return config.learning_rate * np.where(t < config.warmup_steps, warm, wave)


def adamw(weights, gradients, config):
    """Take a step of AdamW by its formulas (arXiv 1711.05101), after clipping by the gradient's norm."""
    mean = square = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates(config, len(gradients)), strict=True), 1):
        gradient = gradient * min(1.0, config.clip_norm / np.linalg.norm(gradient))
        mean = config.b1 * mean + (1 - config.b1) * gradient
        square = config.b2 * square + (1 - config.b2) * gradient**2
        change = (mean / (1 - config.b1**step)) / (np.sqrt(square / (1 - config.b2**step)) + 1e-8)
        weights = weights - rate * (change + config.weight_decay * weights)
    return weights


@pytest.mark.parametrize("warmup_steps", [0, 2])
@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"schedule": "cosine"},
        {"schedule": "cosine", "restarts": (3, 40)},
        {"schedule": "cosine", "restarts": (3,), "restart_factor": 0.25},
    ],
)
def test_frozen_groups_stay_and_the_others_move_by_the_formulas(schedule, warmup_steps):
    config = dataclasses.replace(CONFIG, warmup_steps=warmup_steps, **schedule)
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


def nadamw(weights, gradients, config):
    """Take a step of AdamW with Nesterov momentum (Dozat 2016), which Muon uses for its other parameters."""
    mean = square = np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, rates(config, len(gradients)), strict=True), 1):
        mean = config.b1 * mean + (1 - config.b1) * gradient
        square = config.b2 * square + (1 - config.b2) * gradient**2
        ahead = config.b1 * mean / (1 - config.b1 ** (step + 1)) + (1 - config.b1) * gradient / (1 - config.b1**step)
        change = ahead / (np.sqrt(square / (1 - config.b2**step)) + 1e-8)
        weights = weights - rate * (change + config.weight_decay * weights)
    return weights


def toward_orthogonal(matrix):
    """Return five quintic Newton-Schulz steps from Frobenius norm 1, by their formula (Jordan 2024)."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def muon(weights, gradients, config):
    """Take a step of Muon by its formulas, each matrix of ``weights [L, in, out]`` alone, after a common clipping."""
    mean, beta = np.zeros_like(weights), MUON_MOMENTUM
    for step, (gradient, rate) in enumerate(zip(gradients, rates(config, len(gradients)), strict=True), 1):
        mean = beta * mean + (1 - beta) * gradient
        ahead = beta * mean / (1 - beta ** (step + 1)) + (1 - beta) * gradient / (1 - beta**step)
        change = MUON_RMS * np.sqrt(max(weights.shape[1:])) * np.stack([toward_orthogonal(m) for m in ahead])
        weights = weights - rate * (change + config.weight_decay * weights)
    return weights


def test_muon_turns_the_layers_kernels_and_leaves_the_rest_to_adamw():
    config = dataclasses.replace(CONFIG, kind="muon", clip_norm=1e9)
    rng = np.random.default_rng(0)
    shapes = {"kernel": (2, 6, 4), "bias": (2, 4)}

    def network(draw):
        return {"blocks": {"ffn": {k: draw(s) for k, s in shapes.items()}}, "head": {"kernel": draw((4, 3))}}

    def normal(shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    start, gradients = network(normal), [network(normal) for _ in range(5)]
    optimizer = make_optimizer(config, len(gradients))
    params, state = start, optimizer.init(start)
    for gradient in gradients:
        change, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, change)
    expected = muon(
        np.asarray(start["blocks"]["ffn"]["kernel"], np.float64),
        [np.asarray(g["blocks"]["ffn"]["kernel"], np.float64) for g in gradients],
        config,
    )
    np.testing.assert_allclose(params["blocks"]["ffn"]["kernel"], expected, rtol=1e-4, atol=1e-5)
    for get in (lambda tree: tree["blocks"]["ffn"]["bias"], lambda tree: tree["head"]["kernel"]):
        given = np.stack([np.asarray(get(g)) for g in gradients])
        np.testing.assert_allclose(get(params), nadamw(np.asarray(get(start)), given, config), rtol=1e-4, atol=1e-5)


def test_muon_takes_a_convolution_as_one_matrix():
    config = OptimizerConfig(kind="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 3, 16, 32)), jnp.float32)
    params = {"decoder": {"conv1": {"kernel": jnp.zeros_like(gradient)}}}
    optimizer = make_optimizer(config, 1)
    _, state = optimizer.update({"decoder": {"conv1": {"kernel": gradient}}}, optimizer.init(params), params)
    change, _ = optimizer.update({"decoder": {"conv1": {"kernel": gradient}}}, state, params)
    matrix = np.asarray(change["decoder"]["conv1"]["kernel"]).reshape(432, 32)
    lengths = np.linalg.svd(matrix, compute_uv=False) / (MUON_RMS * np.sqrt(432))
    assert lengths.min() > 0.5 and lengths.max() < 1.3


def test_restarts_need_a_cosine_and_room_for_their_warm_up():
    with pytest.raises(ConfigError, match=r"restarts is \(3,\) with schedule 'constant', where it has no effect"):
        OptimizerConfig(restarts=(3,))
    with pytest.raises(ConfigError, match="restart_factor is 0.5 with no restarts, where it has no effect"):
        OptimizerConfig(schedule="cosine", restart_factor=0.5)
    with pytest.raises(ConfigError, match=r"\(5, 7\); each must be more than warmup_steps \(2\) after the one before"):
        OptimizerConfig(schedule="cosine", warmup_steps=2, restarts=(5, 7))
