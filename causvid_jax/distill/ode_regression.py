"""ODE regression: train the causal student to predict the end of the teacher's trajectories.

    L = mean over noisy elements of (x0_student(x_t, t) - x0)^2

``x_t`` is the teacher's state at a denoising timestep t, drawn per block, and ``x0`` the end of the same trajectory.
Blocks may also be drawn clean (t = 0): they are context for later blocks and do not enter the loss. Trajectories of a
causal teacher contain the clean context of each block, which the student also gets (teacher forcing).

:func:`splice` prepares the student for a prompt switch: it replaces the clip's context by that of another clip.

Source: CausVid, arXiv 2412.07772, section 4.3, equation 6.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from causvid_jax.config import ConfigError, require
from causvid_jax.diffusion import checks, flow

BlockCausalFn = Callable[..., jax.Array]  # (params, x, timestep, prompt_embeds) -> velocity


def sample_block_steps(key: jax.Array, batch: int, block_sizes: Sequence[int], choices: int) -> jax.Array:
    """Draw step indices, int32 ``[B, F]``: uniform over ``range(choices)``, equal in all frames of a block."""
    return flow.per_frame(jax.random.randint(key, (batch, len(block_sizes)), 0, choices), block_sizes)


def splice(key: jax.Array, batch: int, block_sizes: Sequence[int], fraction: float) -> jax.Array:
    """Draw the frames of each clip that another clip's frames replace, bool ``[B, F]``.

    A clip is spliced with probability ``fraction``. Its blocks before block s are then replaced, with s uniform over
    all blocks except the first. The replaced blocks are clean context under the clip's own prompt and do not enter the
    loss. After ``sampling.stream.recompute_context`` a stream's cache holds such a context.
    """
    if len(block_sizes) < 2:
        return jnp.zeros((batch, sum(block_sizes)), bool)
    draw_key, block_key = jax.random.split(key)
    first = jax.random.randint(block_key, (batch, 1), 1, len(block_sizes))
    first = jnp.where(jax.random.uniform(draw_key, (batch, 1)) < fraction, first, 0)
    block = np.repeat(np.arange(len(block_sizes)), np.asarray(block_sizes))
    return jnp.asarray(block)[None, :] < first


def ode_regression_loss(
    velocity_fn: BlockCausalFn,
    params: Any,
    states: jax.Array,
    prompt_embeds: jax.Array,
    key: jax.Array | None = None,
    *,
    timesteps: Sequence[float],
    block_sizes: Sequence[int],
    include_clean: bool,
    prompt_switch_prob: float = 0.0,
    context: jax.Array | None = None,
    index: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return ``mean (x0_student(x_t, t) - x0)^2`` over the noisy elements of a batch of trajectories.

    Args:
        velocity_fn: the student, ``(params, x, timestep, prompt_embeds) -> velocity``, with a context also ``clean=``.
        params: of the student.
        states: ``[Q + 1, B, F, h, w, C]`` of :func:`~causvid_jax.distill.trajectories.teacher_trajectory`.
        prompt_embeds: ``[B, S, E]``.
        key: draws one step index per sample and block.
        timesteps: the Q student timesteps of the states, ``flow.student_timesteps``, descending in (0, 1000].
        block_sizes: latent frames of each block, ``CausalConfig.block_sizes(F)``.
        include_clean: also draw t = 0, as context only.
        prompt_switch_prob: fraction of the clips that get the context of the next clip in the batch.
        context: clean context of every block, ``[B, F, h, w, C]``. The two arguments above are then ignored.
        index: int32 ``[B, F]``, the state of each frame (Q: clean); no key is needed then, and no prompt is switched.

    Returns:
        The loss (0 if all is clean); the metrics ``loss``, ``noisy_fraction`` (of frames), ``weight`` (noisy elements).

    Raises:
        ConfigError: ``timesteps`` or ``block_sizes`` do not fit ``states``, or both ``key`` and ``index`` are missing.
    """
    checks.descending(timesteps)
    q, (batch, frames) = len(timesteps), states.shape[1:3]
    require(states.shape[0] == q + 1, f"trajectories have {states.shape[0]} states; {q} timesteps need {q + 1}")
    require(sum(block_sizes) == frames, f"blocks {tuple(block_sizes)} do not add up to {frames} latent frames")

    if index is None:
        if key is None:
            raise ConfigError("a loss without a key needs index")
        step_key, splice_key = jax.random.split(key)
        index = sample_block_steps(step_key, batch, block_sizes, q + 1 if include_clean and context is None else q)
        if prompt_switch_prob and context is None:
            past = splice(splice_key, batch, block_sizes, prompt_switch_prob)
            index = jnp.where(past, q, index)
            states = jnp.where(past[None, :, :, None, None, None], jnp.roll(states, -1, axis=1), states)
    timestep = jnp.asarray((*timesteps, 0.0), jnp.float32)[index]
    # One state per sample and frame, [B, F, h, w, C].
    x_t = states.astype(jnp.float32)[index, jnp.arange(batch)[:, None], jnp.arange(frames)[None, :]]
    velocity = velocity_fn(params, x_t, timestep, prompt_embeds, **({} if context is None else {"clean": context}))
    predicted = flow.x0_from_velocity(x_t, velocity.astype(jnp.float32), flow.sigma_from_timestep(timestep))

    noisy = repeat((timestep != 0).astype(jnp.float32), "b f -> b f 1 1 1")
    error = jnp.square(predicted - states[-1].astype(jnp.float32))
    elements = jnp.sum(noisy) * np.prod(states.shape[3:])
    loss = jnp.sum(noisy * error) / jnp.maximum(elements, 1.0)
    return loss, {"loss": loss, "noisy_fraction": jnp.mean(noisy), "weight": elements}
