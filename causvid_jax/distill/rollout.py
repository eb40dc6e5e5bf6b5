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
    """

    init_cache: Callable[[int], Any]
    cached: Callable[[Any, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]
    advance: Callable[[Any, int], Any]
    encode_text: Callable[[Any, jax.Array], Any]


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
    cache by one more pass, as it is, at ``causal.context_timestep`` (unless ``causal.clean_write`` is off: then the
    keys and values of the exit step stay), and the next block sees it as a constant.

    One ``lax.scan`` over the blocks; the steps before the exit are a loop whose length is known at run time only, so
    that no pass is wasted; the differentiated step is rematerialised, so that a block keeps its input and the cache.

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
        cache first, under ``text``, as a stream does after a prompt switch (``streaming.stream.recache``).
      past_shown: bool scalar; False starts from nothing in spite of ``past``, in the same program.

    Returns:
      x0, ``[B, F, h, w, C]`` float32.
    """
    batch, frames, *spatial = shape
    sizes = causal.block_sizes(frames)
    levels = jnp.asarray(timesteps, jnp.float32)
    exit_key, noise_key = jax.random.split(key)
    if exit_step is None:
        exit_step = jax.random.randint(exit_key, (), 0, len(timesteps))

    text_cache = functions.encode_text(params, text)
    fixed = jax.lax.stop_gradient((params, text_cache))  # for every pass but the exit step's

    def predict(params, text_cache, x, step, cache):
        velocity, cache = functions.cached(params, x, jnp.full(x.shape[:2], levels[step]), text_cache, cache)
        return flow.x0_from_velocity(x, velocity.astype(jnp.float32), flow.sigma_from_timestep(levels[step])), cache

    def block(cache, index, size):
        """One block: ``cache -> (cache with the block in it, x0 [B, K, h, w, C])``."""
        block_key = jax.random.fold_in(noise_key, index)

        def noise(step):
            return jax.random.normal(jax.random.fold_in(block_key, step), (batch, size, *spatial))

        def denoise(step, carry):
            x, cache = carry
            x0, cache = predict(*fixed, x, step, cache)
            return flow.add_noise(x0, noise(step + 1), flow.sigma_from_timestep(levels[step + 1])), cache

        x, cache = jax.lax.fori_loop(0, exit_step, denoise, (noise(0), cache))
        x, cache = jax.lax.stop_gradient((x, cache))  # the context is a constant, and so is the way to the exit step
        x0, cache = jax.checkpoint(predict)(params, text_cache, x, exit_step, cache)

        cache = jax.lax.stop_gradient(cache)
        if causal.clean_write:
            context = jnp.full(x.shape[:2], causal.context_timestep, jnp.float32)
            _, cache = functions.cached(fixed[0], jax.lax.stop_gradient(x0), context, fixed[1], cache)
        return functions.advance(cache, size), x0

    def show(past, cache):
        """The cache with ``past`` in it."""

        def write(cache, latents):
            context = jnp.full(latents.shape[:2], causal.context_timestep, jnp.float32)
            _, cache = functions.cached(fixed[0], latents, context, fixed[1], cache)
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
    first = []
    if sizes[0] != causal.frames_per_block:  # an independent first frame: the scan needs blocks of one size
        cache, x0 = block(cache, 0, sizes[0])
        first = [x0]
        sizes = sizes[1:]
    if sizes:
        indices = jnp.arange(len(first), len(first) + len(sizes))
        _, blocks = jax.lax.scan(lambda c, i: block(c, i, causal.frames_per_block), cache, indices)
        first.append(jnp.moveaxis(blocks, 0, 1).reshape(batch, -1, *spatial))  # [n, B, K, ...] -> [B, n K, ...]
    return jnp.concatenate(first, axis=1)
