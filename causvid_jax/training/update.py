"""One update of one network: gradient, accumulation, norm, guard, optimizer, EMA.

g            = d loss / d params                    (over ``accumulate`` parts of the batch)
applied      = finite(loss) and finite(|g|) and loss <= factor * median(recent losses)
params, opt  = optimizer(g, opt, params)            where applied
ema          = d ema + (1 - d) params,  d = ema_decay from step ema_start on, 0 before
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from causvid_jax.config import OptimizerConfig, ShardingRules, StageConfig, TransformerConfig
from causvid_jax.models import adapters, transformer
from causvid_jax.sharding.params import abstract_tree
from causvid_jax.sharding.placement import Placement
from causvid_jax.training import guard
from causvid_jax.training.gradients import LossFn, accumulated_gradient
from causvid_jax.training.optimizers import make_optimizer

TrainStep = Callable[..., tuple[Any, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trainable:
    """A network in training.

    Attributes:
        params: all parameters.
        opt: state of the optimizer; with adapters (``models.adapters``) only that of the adapters.
        ema: EMA of the trained parameters, which is sampled and exported; None: the network has none.
    """

    params: Any
    opt: optax.OptState
    ema: Any = None

    @property
    def averaged(self) -> Any:
        """All parameters, with the EMA of the trained ones."""
        return adapters.join(self.ema, adapters.split(self.params)[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a stage that trains one network.

    Attributes:
        network: in training.
        step: number of updates applied; int32 scalar.
        history: recent losses.
    """

    network: Trainable
    step: jax.Array
    history: guard.LossHistory


def init_trainable(params: Any, optimizer: optax.GradientTransformation, *, ema: bool = True) -> Trainable:
    """Return the state before the first update. The EMA is a copy, so every buffer can be donated."""
    trained, _ = adapters.split(params)
    return Trainable(params, optimizer.init(trained), jax.tree.map(jnp.copy, trained) if ema else None)


def init_state(params: Any, optimizer: optax.GradientTransformation, window: int = guard.WINDOW) -> TrainState:
    """Return the state of one network before its first update, with a history of ``window`` losses."""
    return TrainState(init_trainable(params, optimizer), jnp.zeros((), jnp.int32), guard.init_history(window))


def ema_update(ema: Any, params: Any, step: jax.Array, config: OptimizerConfig) -> Any:
    """Return ``d ema + (1 - d) params`` with ``d = ema_decay`` from step ``ema_start`` on and 0 before."""
    decay = jnp.where(step >= config.ema_start, config.ema_decay, 0.0)
    return optax.incremental_update(params, ema, 1.0 - decay)


def apply_update(
    network: Trainable,
    loss_fn: LossFn,
    batch: Any,
    key: jax.Array,
    history: guard.LossHistory,
    step: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    row: int = 0,
    finite: jax.Array | bool = True,
) -> tuple[Trainable, guard.LossHistory, jax.Array, dict[str, jax.Array]]:
    """Take one optimizer step on ``loss_fn(params, batch, key) -> (loss, metrics)``, unless the guard refuses it.

    Args:
        network: parameters, optimizer state, EMA.
        loss_fn: its metrics hold ``loss``.
        batch: a pytree of arrays ``[B, ...]``, processed in ``config.accumulate`` parts.
        key: of this update.
        history: recent losses; ``row`` is the one of this network.
        step: updates applied before, for the EMA's start.
        optimizer: made ``network.opt``.
        config: accumulation, guard, EMA.
        row: index of this loss in ``history``.
        finite: False refuses the update for another reason.

    Returns:
        The network and the history after it, whether the update was applied, and the metrics with ``gradient_norm``.
    """
    trained, frozen = adapters.split(network.params)

    def loss_of_trained(trained: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_fn(adapters.join(trained, frozen), batch, key)

    gradient, metrics = accumulated_gradient(loss_of_trained, trained, batch, key, config.accumulate)
    norm = optax.tree.norm(gradient)
    applied, history = guard.check_update(history, metrics["loss"], norm, config, row=row, finite=finite)
    change, opt = optimizer.update(gradient, network.opt, trained)
    changed = optax.apply_updates(trained, change)
    ema = None if network.ema is None else ema_update(network.ema, changed, step, config.optimizer)
    # Frozen parameters pass through: the program returns the input buffer.
    previous = Trainable(trained, network.opt, network.ema)
    updated = guard.select(applied, Trainable(changed, opt, ema), previous)
    updated = dataclasses.replace(updated, params=adapters.join(updated.params, frozen))
    return updated, history, applied, metrics | {"gradient_norm": norm}


def make_train_step(
    loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation, config: StageConfig, shardings: Any = None
) -> TrainStep:
    """Return the jitted step ``(state, batch) -> (state, metrics)`` of one network; it donates the state.

    A stage with frozen networks passes them after the batch, ``(state, batch, *frozen)``. Its loss is called with the
    keywords ``frozen`` and ``state``. The key is ``fold_in(key(config.seed), step)``, so a resumed run has the random
    numbers of an uninterrupted run. A refused update does not change the network or ``step``, and the metric
    ``skipped`` is 1. On a mesh the new state has ``shardings`` (a tree of ``NamedSharding``, or one for all).
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def train_step(state: TrainState, batch: Any, *frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss = functools.partial(loss_fn, state=state, frozen=frozen) if frozen else loss_fn
        network, history, applied, metrics = apply_update(
            state.network, loss, batch, key, state.history, state.step, optimizer=optimizer, config=config
        )
        counts = {"skipped": 1 - applied.astype(jnp.int32), "applied": applied, "skipped_total": history.skipped}
        step = jnp.where(applied, state.step + 1, state.step)
        return TrainState(network, step, history), metrics | counts

    return train_step


# ---- on a mesh -------------------------------------------------------------------------------------------------------


def trainable_shardings(
    placement: Placement, spec: Any, rules: ShardingRules, optimizer: optax.GradientTransformation, *, ema: bool = True
) -> Trainable:
    """Return the shardings of a :class:`Trainable` of the parameters ``spec``."""
    params = placement.params(spec, rules)
    trained = adapters.split(params)[0]
    state = placement.optimizer(optimizer, adapters.split(spec)[0], trained)
    return Trainable(params, state, trained if ema else None)


def history_shardings(placement: Placement) -> guard.LossHistory:
    """Return the sharding of the history of losses: replicated."""
    whole = cast(Any, placement.replicated())
    return guard.LossHistory(recent=whole, skipped=whole)


@dataclasses.dataclass(frozen=True)
class NetworkStep:
    """The train step of a stage that trains one transformer, and the state it takes.

    Attributes:
        train_step: jitted ``(state, batch) -> (state, metrics)``.
        init: ``params -> TrainState``, traceable.
        shardings: of the state; None without a mesh.
    """

    train_step: TrainStep
    init: Callable[[Any], TrainState]
    shardings: TrainState | None


def network_step(
    loss_fn: Callable[..., Any], config: StageConfig, network: TransformerConfig, placement: Placement
) -> NetworkStep:
    """Return the step that trains ``network`` on the mesh of ``placement``."""
    optimizer, spec, shardings = make_optimizer(config.optimizer, config.steps), transformer.spec(network), None
    if placement.mesh is not None:
        trained = trainable_shardings(placement, spec, network.rules, optimizer)
        shardings = TrainState(trained, cast(Any, placement.replicated()), history_shardings(placement))
    offloaded = placement.offloaded(optimizer, adapters.split(spec)[0], network.rules)
    return NetworkStep(
        train_step=make_train_step(loss_fn, offloaded, config, shardings),
        init=functools.partial(init_state, optimizer=optimizer, window=config.bad_loss_window),
        shardings=shardings,
    )


def abstract_network(spec: Any, placement: Placement, rules: ShardingRules) -> Any:
    """Return the shapes of the parameters ``spec`` with their shardings on the mesh."""
    return with_shardings(abstract_tree(spec), placement.params(spec, rules))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Return the shapes of ``tree`` with ``shardings`` attached."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
