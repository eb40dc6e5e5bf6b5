"""The state of a stage that trains one network, and its jitted step."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from causvid_jax.config import ShardingRules, StageConfig
from causvid_jax.sharding.placement import Placement
from causvid_jax.training import guard
from causvid_jax.training.gradients import LossFn, accumulated_gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while one network is trained."""

    params: Any
    ema: Any  # running mean of params; what is sampled and exported
    opt: optax.OptState
    step: jax.Array  # [] int32, updates done
    watch: guard.Watch  # of the loss


def init_state(params: Any, optimizer: optax.GradientTransformation, window: int = guard.WINDOW) -> TrainState:
    """The state before the first update; ``window`` losses will be remembered."""
    # The EMA is a copy: a donated state must not hold one buffer twice.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(params, ema, optimizer.init(params), jnp.zeros((), jnp.int32), guard.init_watch(window))


def state_shardings(placement: Placement, spec: Any, rules: ShardingRules, optimizer: Any) -> TrainState | None:
    """Where a :class:`TrainState` of the parameters ``spec`` lies; None without a mesh."""
    if placement.mesh is None:
        return None
    params, whole = placement.params(spec, rules), cast(Any, placement.whole())
    watch = guard.Watch(recent=whole, skipped=whole)
    return TrainState(params, params, placement.optimizer(optimizer, spec, params), whole, watch)


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, config: StageConfig, shardings: Any = None
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted, donating update ``(state, batch) -> (state, metrics)``.

    Randomness is ``fold_in(key(config.seed), step)``, so a resumed run draws what an uninterrupted one would. The EMA's
    decay is ``min(ema_decay, (1 + step) / (10 + step))``: early averages must not remember the initialisation.
    An update that :func:`guard.judge` refuses leaves the state as it was, ``step`` included; ``skipped`` is then 1.
    On a mesh the state stays where ``shardings`` (a tree of ``NamedSharding``, or one for all) put it.
    """

    ema_decay = config.optimizer.ema_decay

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient, metrics = accumulated_gradient(loss_fn, state.params, batch, key, config.accumulate)
        norm = optax.global_norm(gradient)
        taken, watch = guard.judge(state.watch, metrics["loss"], norm, config)
        change, opt = optimizer.update(gradient, state.opt, state.params)
        params = optax.apply_updates(state.params, change)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step)) if ema_decay else 0.0
        ema = jax.tree.map(lambda mean, new: decay * mean + (1.0 - decay) * new, state.ema, params)
        params, ema, opt, count = guard.choose(
            taken, (params, ema, opt, state.step + 1), (state.params, state.ema, state.opt, state.step)
        )
        counts = {"skipped": 1 - taken.astype(jnp.int32), "taken": taken, "skipped_total": watch.skipped}
        return TrainState(params, ema, opt, count, watch), metrics | {"gradient_norm": norm} | counts

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
