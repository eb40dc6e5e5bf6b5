"""The state of a stage that trains one network, and its jitted step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# (params, batch, key) -> (loss, metrics)
LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while one network is trained."""

    params: Any
    ema: Any  # running mean of params; what is sampled and exported
    opt: optax.OptState
    step: jax.Array  # [] int32, updates done


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    # The EMA is a copy: a donated state must not hold one buffer twice.
    return TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, ema_decay: float, seed: int
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted, donating update ``(state, batch) -> (state, metrics)``.

    Randomness is ``fold_in(key(seed), step)``, so a resumed run draws what an uninterrupted one would. The EMA's
    decay is ``min(ema_decay, (1 + step) / (10 + step))``: early averages must not remember the initialisation.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        change, opt = optimizer.update(gradient, state.opt, state.params)
        params = optax.apply_updates(state.params, change)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step)) if ema_decay else 0.0
        ema = jax.tree.map(lambda mean, new: decay * mean + (1.0 - decay) * new, state.ema, params)
        return TrainState(params, ema, opt, state.step + 1), metrics | {"gradient_norm": optax.global_norm(gradient)}

    return jax.jit(step, donate_argnums=0)
