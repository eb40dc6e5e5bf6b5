"""Gradient replay: a self rollout whose gradient also passes through the keys and values of earlier blocks.

The rollout runs without a gradient. For every block it records the noisy input ``x`` of its exit step and the clean
estimate ``x0``. One block-causal pass then repeats all exit steps at once,

    x0_replayed = x - sigma v(x, t | clean copies of earlier blocks),

where the clean copies are the recorded estimates (with noise, if the rollout wrote them with noise), conditioned on
``causal.context_noise`` as in the cache. Its value equals the rollout's. Its gradient reaches the parameters through
the exit step of every block and through the keys and values that every block wrote for later ones; the recorded
latents are constants. With ``causal.context_pass`` off, the cache holds the keys and values of the exit steps, so the
pass runs on the noisy inputs alone.

Sources: Solaris (arXiv 2602.22208), Self Gradient Forcing (arXiv 2607.20368), RMD (arXiv 2609.37925).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from causvid_jax.config import require
from causvid_jax.diffusion import flow
from causvid_jax.distill.exit_steps import Rollout, exit_steps_of, noise_key, timestep_table
from causvid_jax.distill.rollout import BlockInputs, generate_block, noisy_context, roll
from causvid_jax.models import transformer
from causvid_jax.models.image_branch import Picture, conditioned
from causvid_jax.models.kv_cache import KVCache, TextCache

Params = Any


class Record(NamedTuple):
    """Latents that a rollout without gradient records for the replay, ``[B, F, h, w, C]`` each.

    Attributes:
        x: the noisy input of every block's exit step.
        written: the latents of the context pass: the clean estimate, with noise if the recipe adds it.
    """

    x: jax.Array
    written: jax.Array


def record_blocks(
    rollout: Rollout,
    shape: tuple[int, ...],
    params: Params,
    text_cache: TextCache,
    cache: KVCache,
    blocks: BlockInputs,
    key: jax.Array,
) -> tuple[Record, KVCache]:
    """Generate blocks as :func:`~causvid_jax.distill.rollout.generate_blocks` does, and return their records.

    Arguments are those of that function.

    Returns:
        The records, ``[n, B, K, h, w, C]`` each, and the cache after the last block.
    """

    def block(cache: KVCache, inputs: BlockInputs) -> tuple[KVCache, Record]:
        block_key = jax.random.fold_in(key, inputs.number)
        _, x, written, cache = generate_block(rollout, params, text_cache, cache, block_key, inputs, shape)
        return cache, Record(x, written)

    cache, record = jax.lax.scan(block, cache, blocks)
    return record, cache


def check_positions(rollout: Rollout, frames: int) -> None:
    """Refuse a clip of ``frames`` latent frames in which a stream would have moved the sink to other positions.

    Raises:
        ConfigError: positions are relative to a window with a sink, and the clip is longer than both.
    """
    causal = rollout.causal
    longest = causal.sink + causal.window
    require(
        not (causal.sink and causal.window and causal.positions == "relative" and frames > longest),
        f"train_distill.gradient is 'replay' and a rollout ends at latent frame {frames}; with causal.positions "
        f"'relative' a stream moves its sink after {longest} frames, which a block-causal pass does not: use "
        "causal.positions=absolute, causal.sink=0 or shorter rollouts",
    )


def replay(
    rollout: Rollout,
    params: Params,
    text: jax.Array,
    record: Record,
    timestep: jax.Array,
    past: jax.Array | None = None,
    picture: Picture | None = None,
) -> jax.Array:
    """Return the x0 of a recorded rollout (module docstring), float32 ``[B, F, h, w, C]``.

    It is differentiable with respect to ``params`` and ``text``.

    Args:
        rollout: network and block structure.
        params: the student's parameters.
        text: prompt embeddings, ``[B, S, E]``.
        record: noisy inputs of the exit steps and latents of the context passes.
        timestep: of the exit step of every frame, ``[F]``.
        past: latents of the context passes before the rollout, ``[B, P, h, w, C]``.
        picture: first frame of the clip, for a student with an image branch.

    Raises:
        ConfigError: :func:`check_positions` refuses the length.
    """
    causal, (batch, frames) = rollout.causal, record.x.shape[:2]
    x, written = jax.lax.stop_gradient(record)
    timestep = jnp.broadcast_to(timestep, (batch, frames))
    before = 0 if past is None else past.shape[1]
    check_positions(rollout, before + frames)
    inputs, times = x, timestep
    options: dict[str, Any] = {}
    if causal.context_pass:
        clean = written if past is None else jnp.concatenate([past, written], axis=1)
        options = {"clean": clean, "clean_timestep": causal.context_noise}
    elif past is not None:
        inputs = jnp.concatenate([past, x], axis=1)
        times = jnp.concatenate([jnp.full((batch, before), causal.context_noise), timestep], axis=1)
    network = conditioned(transformer.block_causal, picture, rollout.network)
    velocity = network(params, inputs, times, text, config=rollout.network, causal=causal, **options)
    velocity = velocity[:, -frames:].astype(jnp.float32)
    return flow.x0_from_velocity(x, velocity, flow.sigma_from_timestep(timestep))


def replay_rollout(
    rollout: Rollout,
    params: Params,
    text: jax.Array,
    key: jax.Array,
    *,
    shape: tuple[int, int, int, int, int],
    exit_step: jax.Array | int | None = None,
    context: jax.Array | None = None,
    has_context: jax.Array | bool = True,
    picture: Picture | None = None,
) -> jax.Array:
    """Return the student's own rollout with a gradient through the keys and values of earlier blocks.

    Arguments, result and errors are those of :func:`~causvid_jax.distill.rollout.self_rollout`.
    """
    has_context = False if context is None else has_context
    exits = exit_steps_of(rollout, key, shape[1], exit_step, has_context)
    constant = jax.lax.stop_gradient((params, text))
    options: dict[str, Any] = {"shape": shape, "context": context, "has_context": has_context, "picture": picture}
    record = roll(record_blocks, rollout, *constant, noise_key(key), exits, **options)

    sizes = rollout.causal.block_sizes(shape[1])
    table = timestep_table(rollout, len(sizes), has_context)
    timestep = jnp.take_along_axis(table, exits[:, None], axis=1)[:, 0]
    timestep = jnp.repeat(timestep, jnp.asarray(sizes), total_repeat_length=shape[1])
    if context is None:
        return replay(rollout, params, text, record, timestep, picture=picture)
    past = noisy_context(context, noise_key(key), len(sizes), rollout.causal)  # as the rollout wrote them
    return jax.lax.cond(
        has_context,
        lambda p, t: replay(rollout, p, t, record, timestep, past),
        lambda p, t: replay(rollout, p, t, record, timestep),
        params,
        text,
    )
