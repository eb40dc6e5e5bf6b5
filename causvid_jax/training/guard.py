"""Refuse updates if the loss or the gradient is not finite, or if the loss is far above the losses before it.

The decision is made on the device, which still has the old state, so the host does not wait for the loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import StageConfig

WINDOW = StageConfig.bad_loss_window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossHistory:
    """Recent losses of the N networks of a stage.

    Attributes:
        recent: the losses of the last W applied updates of each, newest first, NaN where there are none yet; float32
            ``[N, W]``.
        skipped: number of refused updates; int32 scalar.
    """

    recent: jax.Array
    skipped: jax.Array


def init_history(window: int = WINDOW, losses: int = 1) -> LossHistory:
    """Return a history without losses."""
    return LossHistory(jnp.full((losses, window), jnp.nan, jnp.float32), jnp.zeros((), jnp.int32))


def check_update(
    history: LossHistory,
    loss: jax.Array,
    gradient_norm: jax.Array,
    config: StageConfig,
    *,
    row: int = 0,
    finite: jax.Array | bool = True,
) -> tuple[jax.Array, LossHistory]:
    """Decide whether an update is applied, and return the history after it.

    ``applied = finite(loss) and finite(gradient norm) and loss <= factor * median(recent)``. The last condition applies
    once W losses are known, and never if the factor is 0. With ``on_bad_loss = "stop"`` all updates after a refused one
    are refused too: the host reads metrics one step late, and must find the last good state.

    Args:
        history: of the stage.
        loss: scalar.
        gradient_norm: scalar.
        config: ``on_bad_loss``, ``bad_loss_factor``.
        row: which of the N losses this is.
        finite: False refuses the update for another reason.

    Returns:
        A scalar bool and the next history.
    """
    recent, loss = history.recent[row], loss.astype(jnp.float32)
    applied = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & finite
    if config.bad_loss_factor:
        median = jnp.median(recent)  # NaN while there are fewer than W losses
        applied &= ~((median > 0) & (loss > config.bad_loss_factor * median))
    if config.on_bad_loss == "stop":
        applied &= history.skipped == 0
    after = jnp.where(applied, jnp.concatenate([loss[None], recent[:-1]]), recent)
    return applied, LossHistory(history.recent.at[row].set(after), history.skipped + ~applied)


def select(applied: jax.Array, new: Any, old: Any) -> Any:
    """Return the pytree ``new`` if ``applied`` (bool scalar), else ``old``. XLA fuses the selection into the update."""
    return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)


def all_finite(tree: Any) -> jax.Array:
    """Return whether every floating-point element of ``tree`` is finite; scalar bool."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])) if leaves else jnp.array(True)


def reset_skipped(state: Any) -> Any:
    """Return ``state``, which has a ``history``, with no refused updates, so a stopped run can continue."""
    history = dataclasses.replace(state.history, skipped=jnp.zeros_like(state.history.skipped))
    return dataclasses.replace(state, history=history)
