"""Updates that are not taken: one whose loss or gradient is not finite, or whose loss is far above those before it.

The decision is made on the device, where the old state still is: nothing waits for the host to look at a loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import StageConfig

WINDOW = StageConfig.bad_loss_window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
    """What is remembered of the N losses of a stage.

    Attributes:
      recent: the last W losses of each whose updates were taken, newest first, NaN where there are none yet; float32
        ``[N, W]``.
      skipped: updates that were not taken; int32 scalar.
    """

    recent: jax.Array
    skipped: jax.Array


def init_watch(window: int = WINDOW, losses: int = 1) -> Watch:
    """Nothing seen yet."""
    return Watch(jnp.full((losses, window), jnp.nan, jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    watch: Watch,
    loss: jax.Array,
    gradient_norm: jax.Array,
    config: StageConfig,
    *,
    row: int = 0,
    sound: jax.Array | bool = True,
) -> tuple[jax.Array, Watch]:
    """Whether to take an update, and the watch after it.

    ``taken = finite(loss) and finite(gradient norm) and loss <= factor * median(recent)``; the last condition holds
    until W losses are known. With ``on_bad_loss = "stop"`` nothing more is taken after the first that was not: the host
    learns of it a step later, and must find the state before it.

    Args:
      watch: of the stage.
      loss: scalar.
      gradient_norm: scalar.
      config: ``on_bad_loss``, ``bad_loss_factor``.
      row: which of the N losses this is.
      sound: False if the update must not be taken for another reason.

    Returns:
      A scalar bool and the next watch.
    """
    recent, loss = watch.recent[row], loss.astype(jnp.float32)
    taken = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & sound
    if config.bad_loss_factor:
        median = jnp.median(recent)  # NaN while one of them is
        taken &= ~((median > 0) & (loss > config.bad_loss_factor * median))
    if config.on_bad_loss == "stop":
        taken &= watch.skipped == 0
    after = jnp.where(taken, jnp.concatenate([loss[None], recent[:-1]]), recent)
    return taken, Watch(watch.recent.at[row].set(after), watch.skipped + ~taken)


def choose(taken: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where ``taken``, else ``old``: one select per element, fused into the update that makes ``new``."""
    return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating element of ``tree`` is finite; scalar bool."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])) if leaves else jnp.array(True)


def forgive(state: Any) -> Any:
    """``state`` with the count of updates not taken back at zero, so that a run that stopped can go on."""

    def reset(leaf: Any) -> Any:
        return dataclasses.replace(leaf, skipped=jnp.zeros_like(leaf.skipped)) if isinstance(leaf, Watch) else leaf

    return jax.tree.map(reset, state, is_leaf=lambda leaf: isinstance(leaf, Watch))
