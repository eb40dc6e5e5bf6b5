"""Gradient accumulation: process a batch in equal parts one after another, with the memory of one part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import require

# (params, batch, key) -> (loss, metrics)
LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def accumulated_gradient(
    loss_fn: LossFn, params: Any, batch: Any, key: jax.Array, parts: int = 1
) -> tuple[Any, dict[str, jax.Array]]:
    """Return ``d mean(loss) / d params`` and the metrics over ``parts`` equal parts of ``batch``.

    For a loss that is a mean over examples this is the gradient of the whole batch. A loss that is a mean over a mask
    returns the number of its elements as the metric ``weight``. The parts are then averaged with these weights, and the
    result has no ``weight``. Part i holds the examples i, i + parts, i + 2 parts, ..., so on a mesh every device keeps
    its own examples. Each part has a key of its own.

    Args:
        loss_fn: ``(params, batch, key) -> (loss, metrics)``. Scalar metrics are averaged; arrays ``[B, ...]`` are
            merged in their order.
        params: parameters to differentiate by.
        batch: a pytree of arrays ``[B, ...]``.
        key: of this step; with one part, ``loss_fn`` gets it unchanged.
        parts: must divide B.

    Raises:
        ConfigError: it does not.
    """
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (_, metrics), gradient = gradient_fn(params, batch, key)
        metrics.pop("weight", None)
        return gradient, metrics

    def split(x: jax.Array) -> jax.Array:  # [B, ...] -> [parts, B / parts, ...]
        require(x.shape[0] % parts == 0, f"a batch of {x.shape[0]} cannot be accumulated in {parts} equal parts")
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def add(total: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        (_, metrics), gradient = gradient_fn(params, *inputs)
        if "weight" in metrics:
            gradient = jax.tree.map(lambda g: metrics["weight"] * g, gradient)
        return jax.tree.map(jnp.add, total, gradient), metrics

    zero = jax.tree.map(jnp.zeros_like, params)
    total, metrics = jax.lax.scan(add, zero, (jax.tree.map(split, batch), jax.random.split(key, parts)))
    weight = metrics.pop("weight", None)
    norm = parts if weight is None else jnp.maximum(jnp.sum(weight), 1.0)

    def merge(x: jax.Array) -> jax.Array:  # [parts, B / parts, ...] -> [B, ...]
        if x.ndim == 1:
            return jnp.mean(x) if weight is None else jnp.sum(weight * x) / norm
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(lambda g: g / norm, total), {k: merge(v) for k, v in metrics.items()}
