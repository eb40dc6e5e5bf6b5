"""What the student is trained on: two ways to an output x0 that the scores then judge.

``data``: the paper's. Every block of a real clip is noised to a random student timestep and all are denoised in one
block-causal pass, so that earlier blocks, as noisy as they are, are the context of later ones.

``self``: the student's own rollout, block by block through its cache, exactly as it will stream (Self-Forcing, arXiv
2506.08009). The denoising stops at a random step, and only that step is differentiated. Cached context is a constant:
no gradient reaches an earlier block, neither its output nor the parameters' part in its keys and values. (In the
published Self-Forcing code one does, through the keys and values of the exit step.)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from causvid_jax.config import CausalConfig, require
from causvid_jax.diffusion import flow
from causvid_jax.distill.ode_regression import BlockCausalFn, sample_block_steps


@dataclasses.dataclass(frozen=True)
class StudentFunctions:
    """The cached reading of the student, as the self rollout needs it.

    Attributes:
      init_cache: ``(batch) -> cache``, empty.
      cached: ``(params, x [B, K, h, w, C], timestep [B, K], text_cache, cache) -> (velocity, cache)``, which writes
        the block to the cache without moving on.
      advance: ``(cache, frames) -> cache``, which moves on.
      encode_text: ``(params, text) -> text_cache``, the cross-attention keys and values.
      overwritten: ``(cache, frames) -> replaced``, what the next block of ``frames`` frames will replace.
      undo: ``(cache, replaced, frames) -> cache``, as it was before its last block.
    """

    init_cache: Callable[[int], Any]
    cached: Callable[[Any, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]
    advance: Callable[[Any, int], Any]
    encode_text: Callable[[Any, jax.Array], Any]
    overwritten: Callable[[Any, int], Any]
    undo: Callable[[Any, Any, int], Any]


def data_rollout(
    velocity_fn: BlockCausalFn,
    params: Any,
    latents: jax.Array,
    text: jax.Array,
    key: jax.Array,
    *,
    timesteps: Sequence[float],
    block_sizes: Sequence[int],
    include_clean: bool,
) -> tuple[jax.Array, jax.Array]:
    """The student's x0 from real latents, noised per block to its own timesteps, in one block-causal pass.

    Args:
      velocity_fn: ``(params, x, timestep [B, F], text) -> velocity``.
      params: the student's parameters.
      latents: real latents, ``[B, F, h, w, C]``.
      text: ``[B, S, E]``.
      key: draws one step per sample and block, and the noise.
      timesteps: the student's timesteps, ``flow.student_timesteps``.
      block_sizes: frames of each block, adding up to F.
      include_clean: also draw t = 0; such a block comes back as it is and carries no gradient.

    Returns:
      x0 ``[B, F, h, w, C]`` and the timestep ``[B, F]`` of each frame (0: clean context, to be masked out of the loss).
    """
    batch, frames = latents.shape[:2]
    require(sum(block_sizes) == frames, f"blocks {tuple(block_sizes)} do not add up to {frames} latent frames")
    step_key, noise_key = jax.random.split(key)
    index = sample_block_steps(step_key, batch, block_sizes, len(timesteps) + include_clean)
    timestep = jnp.asarray((*timesteps, 0.0), jnp.float32)[index]
    sigma = flow.sigma_from_timestep(timestep)
    x_t = flow.add_noise(latents, jax.random.normal(noise_key, latents.shape), sigma)
    velocity = velocity_fn(params, x_t, timestep, text)
    return flow.x0_from_velocity(x_t, velocity.astype(jnp.float32), sigma), timestep


def self_rollout(
    functions: StudentFunctions,
    params: Any,
    text: jax.Array,
    key: jax.Array,
    *,
    shape: tuple[int, int, int, int, int],
    timesteps: Sequence[float],
    causal: CausalConfig,
    exit_step: jax.Array | int | None = None,
    past: jax.Array | None = None,
    past_shown: jax.Array | bool = True,
) -> jax.Array:
    """The student's own rollout, each block stopped at the same random step, which alone carries a gradient.

    Block i starts from noise that depends on ``(key, i)`` only. Step j predicts ``x0 = x - sigma_j v`` and, before the
    exit, renoises it afresh, ``x = (1 - sigma_{j+1}) x0 + sigma_{j+1} noise``. The finished x0 is then written to the
    cache by one more pass, as it is, at ``causal.context_noise`` (unless ``causal.context_pass`` is off: then the
    keys and values of the exit step stay), and the next block sees it as a constant.

    One ``lax.scan`` over the blocks; the steps before the exit are a loop whose length is known at run time only, so
    that no pass is wasted. The backward pass goes through the blocks from the last to the first, does each exit step
    again and takes the cache back block by block: one cache is kept, not one a block (5.6 GiB each at 1.3B).

    Args:
      functions: the student's cached reading.
      params: its parameters.
      text: ``[B, S, E]``.
      key: draws the exit step (one for the batch and all blocks) and every noise.
      shape: ``(B, F, h, w, C)`` of the clip.
      timesteps: the Q student timesteps.
      causal: the block structure, which must fit F.
      exit_step: index into ``timesteps`` instead of a drawn one; Q - 1 is the whole chain.
      past: clean latents ``[B, P, h, w, C]``, P whole blocks, that the rollout goes on from: they are written to the
        cache first, under ``text``, as a stream does after a prompt switch (``sampling.stream.recompute_context``).
      past_shown: bool scalar; False starts from nothing in spite of ``past``, in the same program.

    Returns:
      x0, ``[B, F, h, w, C]`` float32.
    """
    batch, frames, *spatial = shape
    sizes = causal.block_sizes(frames)
    table = np.asarray(timesteps, np.float32)  # a constant: what differentiates by hand must not close over arrays
    exit_key, noise_key = jax.random.split(key)
    if exit_step is None:
        exit_step = jax.random.randint(exit_key, (), 0, len(timesteps))

    text_cache = functions.encode_text(params, text)

    def predict(params, text_cache, x, step, cache):
        level = jnp.asarray(table)[step]
        velocity, cache = functions.cached(params, x, jnp.full(x.shape[:2], level), text_cache, cache)
        return flow.x0_from_velocity(x, velocity.astype(jnp.float32), flow.sigma_from_timestep(level)), cache

    def blocks_of(size):
        """``(params, text_cache, cache, indices, noise_key, exit_step) -> (x0 [n, B, K, ...], cache)`` for n blocks of
        ``size`` frames, differentiable by the first two."""

        def forward(params, text_cache, cache, indices, noise_key, exit_step):
            def block(cache, index):
                block_key = jax.random.fold_in(noise_key, index)
                replaced = functions.overwritten(cache, size)

                def noise(step):
                    return jax.random.normal(jax.random.fold_in(block_key, step), (batch, size, *spatial))

                def denoise(step, carry):
                    x, cache = carry
                    x0, cache = predict(params, text_cache, x, step, cache)
                    sigma = flow.sigma_from_timestep(jnp.asarray(table)[step + 1])
                    return flow.add_noise(x0, noise(step + 1), sigma), cache

                x, cache = jax.lax.fori_loop(0, exit_step, denoise, (noise(0), cache))
                x0, cache = predict(params, text_cache, x, exit_step, cache)
                if causal.context_pass:
                    context = jnp.full(x.shape[:2], causal.context_noise, jnp.float32)
                    _, cache = functions.cached(params, x0, context, text_cache, cache)
                return functions.advance(cache, size), (x0, x, replaced)

            cache, (x0, x, replaced) = jax.lax.scan(block, cache, indices)
            return (x0, cache), (params, text_cache, cache, exit_step, x, replaced)

        def backward(kept, cotangents):
            params, text_cache, cache, exit_step, x, replaced = kept
            cotangent, _ = cotangents  # the context is a constant: nothing comes back through the cache

            def block(carry, inputs):
                cache, total = carry
                x, replaced, cotangent = inputs
                cache = functions.undo(cache, replaced, size)
                _, pull = jax.vjp(lambda *trained: predict(*trained, x, exit_step, cache)[0], params, text_cache)
                return (cache, jax.tree.map(jnp.add, total, pull(cotangent))), None

            zero = jax.tree.map(jnp.zeros_like, (params, text_cache))
            (_, gradient), _ = jax.lax.scan(block, (cache, zero), (x, replaced, cotangent), reverse=True)
            return (*gradient, None, None, None, None)

        blocks = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        blocks.defvjp(forward, backward)
        return blocks

    def show(past, cache):
        """The cache with ``past`` in it."""
        constant = jax.lax.stop_gradient((params, text_cache))

        def write(cache, latents):
            context = jnp.full(latents.shape[:2], causal.context_noise, jnp.float32)
            _, cache = functions.cached(constant[0], latents, context, constant[1], cache)
            return functions.advance(cache, causal.frames_per_block), None

        blocks = rearrange(past, "b (n k) h w c -> n b k h w c", k=causal.frames_per_block)
        return jax.lax.scan(write, cache, blocks)[0]

    cache = functions.init_cache(batch)
    if past is not None:
        require(
            past.shape[1] % causal.frames_per_block == 0,
            f"the past has {past.shape[1]} latent frames; it must have a multiple of {causal.frames_per_block}",
        )
        cache = jax.lax.cond(past_shown, show, lambda _, cache: cache, past, cache)
        cache = jax.lax.stop_gradient(cache)
    parts, start = [], 0
    first = int(sizes[0] != causal.frames_per_block)  # an independent first frame: a scan needs blocks of one size
    for size, count in ((sizes[0], first), (causal.frames_per_block, len(sizes) - first)):
        if count:
            indices = jnp.arange(start, start + count)
            blocks, cache = blocks_of(size)(params, text_cache, cache, indices, noise_key, exit_step)
            cache, start = jax.lax.stop_gradient(cache), start + count
            parts.append(jnp.moveaxis(blocks, 0, 1).reshape(batch, -1, *spatial))  # [n, B, K, ...] -> [B, n K, ...]
    return jnp.concatenate(parts, axis=1)
