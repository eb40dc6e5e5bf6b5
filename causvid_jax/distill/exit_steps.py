"""Settings of a self rollout: the timesteps of each block and the step at which its denoising stops."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import CausalConfig, TransformerConfig, require


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The static settings of a self rollout.

    Attributes:
        network: the student.
        causal: block structure, window and context pass.
        timesteps: the Q denoising timesteps, ``flow.student_timesteps``.
        first_timesteps: one list for each of the first blocks of a stream; later blocks have ``timesteps``.
        exit_steps: which step each block stops at (:func:`draw_exit_steps`).

    Raises:
        ConfigError: ``network.kv_cache`` is not ``"dtype"``: a cache in 8 bits has no gradient.
    """

    network: TransformerConfig
    causal: CausalConfig
    timesteps: tuple[float, ...]
    first_timesteps: tuple[tuple[float, ...], ...] = ()
    exit_steps: Literal["shared", "per_block", "last", "first_block"] = "shared"

    def __post_init__(self) -> None:
        kind = self.network.kv_cache
        require(kind == "dtype", f"the student's kv_cache is {kind!r} in a self rollout; accepted: 'dtype'")


def draw_exit_steps(rollout: Rollout, key: jax.Array, blocks: int, has_context: jax.Array | bool = False) -> jax.Array:
    """Draw the index of the exit step of every block of a rollout, int32 ``[blocks]``.

    ``rollout.exit_steps`` names the rule. ``"shared"`` draws one of the Q steps for all blocks (Self-Forcing, arXiv
    2506.08009). ``"per_block"`` draws one for each block. ``"last"`` is always Q - 1. ``"first_block"`` draws one for
    the first block and is Q - 1 for the others (RMD, arXiv 2609.37925). A block with a list in ``first_timesteps`` has
    an index into that list, drawn independently of all others. If the rollout continues another one (``has_context``,
    bool scalar), no block has such a list.
    """
    steps = len(rollout.timesteps)
    shared = jax.random.randint(key, (), 0, steps)
    if rollout.exit_steps == "per_block":
        exits = jax.random.randint(jax.random.fold_in(key, 1), (blocks,), 0, steps)
    elif rollout.exit_steps == "shared":
        exits = jnp.broadcast_to(shared, (blocks,))
    else:
        exits = jnp.full((blocks,), steps - 1, jnp.int32)
        exits = exits.at[0].set(shared) if rollout.exit_steps == "first_block" else exits
    for block, own_steps in enumerate(rollout.first_timesteps[:blocks]):
        own: jax.Array | int = len(own_steps) - 1
        if rollout.exit_steps in ("shared", "per_block") or (rollout.exit_steps == "first_block" and block == 0):
            own = jax.random.randint(jax.random.fold_in(key, 2 + block), (), 0, len(own_steps))
        exits = exits.at[block].set(jnp.where(has_context, exits[block], own))
    return exits


def timestep_table(rollout: Rollout, blocks: int, has_context: jax.Array | bool = False) -> jax.Array:
    """Return the timesteps of every block, float32 ``[blocks, Q]`` in [0, 1000]; rows are padded with 0 at the end.

    The first rows hold ``first_timesteps``, unless the rollout continues another one (``has_context``, bool scalar).
    """
    lists = (*rollout.first_timesteps, rollout.timesteps)
    width = max(map(len, lists))
    rows = [np.pad(np.asarray(steps, np.float32), (0, width - len(steps))) for steps in lists]
    table = jnp.asarray(np.stack([rows[min(block, len(rows) - 1)] for block in range(blocks)]))
    return jnp.where(has_context, rows[-1], table) if rollout.first_timesteps else table


def noise_key(key: jax.Array) -> jax.Array:
    """Return the second key of ``split(key)``, which draws the noise of a rollout. The first key draws exit steps."""
    return jax.random.split(key)[1]


def exit_steps_of(
    rollout: Rollout,
    key: jax.Array,
    frames: int,
    exit_step: jax.Array | int | None = None,
    has_context: jax.Array | bool = False,
) -> jax.Array:
    """Return the exit steps, int32 ``[n]``, of the n blocks of a rollout of ``frames`` latent frames.

    They are ``exit_step`` for every block, or :func:`draw_exit_steps` if that is None. ``key`` is that of
    :func:`~causvid_jax.distill.rollout.self_rollout`.

    Raises:
        ConfigError: the blocks do not fit ``frames``, or ``exit_step`` is an integer outside a list of timesteps.
    """
    blocks = len(rollout.causal.block_sizes(frames))
    if exit_step is not None:
        steps = min(map(len, (*rollout.first_timesteps[:blocks], rollout.timesteps)))
        require(
            isinstance(exit_step, jax.core.Tracer) or 0 <= int(exit_step) < steps,
            f"exit_step is {exit_step}; the shortest list of timesteps has the steps 0 to {steps - 1}",
        )
        return jnp.broadcast_to(jnp.asarray(exit_step, jnp.int32), (blocks,))
    return draw_exit_steps(rollout, jax.random.split(key)[0], blocks, has_context)
