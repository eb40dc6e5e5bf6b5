"""Two ways to produce the student's x0 for distribution matching.

``data_rollout`` (CausVid, section 4.2): every block of a real clip is noised to a random denoising timestep, and one
block-causal pass denoises all blocks. A block attends to the earlier blocks at their own noise levels.

``self_rollout`` (Self-Forcing, arXiv 2506.08009): the student generates block by block through its KV cache, as in a
stream. Denoising stops at a random step, and only that step is differentiated. Cached context is a constant: no
gradient reaches an earlier block through its keys and values. The published Self-Forcing code has this gradient; here
:mod:`causvid_jax.distill.replay` computes it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from causvid_jax.config import CausalConfig, require
from causvid_jax.diffusion import flow
from causvid_jax.distill.exit_steps import Rollout, exit_steps_of, noise_key, timestep_table
from causvid_jax.distill.ode_regression import BlockCausalFn, sample_block_steps
from causvid_jax.models import cache_undo, kv_cache, transformer
from causvid_jax.models.image_branch import Picture, beside
from causvid_jax.models.kv_cache import KVCache, TextCache

Params = Any


def data_rollout(
    velocity_fn: BlockCausalFn,
    params: Params,
    latents: jax.Array,
    text: jax.Array,
    key: jax.Array,
    *,
    timesteps: Sequence[float],
    block_sizes: Sequence[int],
    include_clean: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return the student's ``x0 = x_t - sigma v(x_t, t)`` of real latents, noised per block, in one block-causal pass.

    Args:
        velocity_fn: ``(params, x, timestep [B, F], text) -> velocity``.
        params: the student's parameters.
        latents: real latents, ``[B, F, h, w, C]``.
        text: prompt embeddings, ``[B, S, E]``.
        key: draws one step per sample and block, and the noise.
        timesteps: the student's timesteps, ``flow.student_timesteps``, in (0, 1000].
        block_sizes: latent frames of each block, adding up to F.
        include_clean: also draw t = 0; such a block is returned unchanged and carries no gradient.

    Returns:
        x0 ``[B, F, h, w, C]``, and bool ``[B, F]``: True for frames that were noised, False for clean context, which is
        masked out of the loss.

    Raises:
        ConfigError: the blocks do not add up to F.
    """
    batch, frames = latents.shape[:2]
    require(sum(block_sizes) == frames, f"blocks {tuple(block_sizes)} do not add up to {frames} latent frames")
    step_key, noise_key = jax.random.split(key)
    index = sample_block_steps(step_key, batch, block_sizes, len(timesteps) + include_clean)
    timestep = jnp.asarray((*timesteps, 0.0), jnp.float32)[index]
    sigma = flow.sigma_from_timestep(timestep)
    x_t = flow.add_noise(latents, jax.random.normal(noise_key, latents.shape), sigma)
    velocity = velocity_fn(params, x_t, timestep, text)
    return flow.x0_from_velocity(x_t, velocity.astype(jnp.float32), sigma), timestep > 0


def predict_x0(
    rollout: Rollout,
    params: Params,
    text_cache: TextCache,
    x: jax.Array,
    timestep: jax.Array,
    cache: KVCache,
    channels: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Return ``x0 = x - sigma v(x, t)`` of one block ``[B, K, h, w, C]``, and the cache with the block written."""
    velocity, cache = transformer.cached(
        params,
        beside(x, channels),
        jnp.full(x.shape[:2], timestep),
        text_cache,
        cache,
        config=rollout.network,
        causal=rollout.causal,
    )
    return flow.x0_from_velocity(x, velocity.astype(jnp.float32), flow.sigma_from_timestep(timestep)), cache


def noisy_context(x0: jax.Array, key: jax.Array, index: int, causal: CausalConfig) -> jax.Array:
    """Return the latents of the context pass for ``x0``: ``(1 - s) x0 + s noise``, ``s = context_noise / 1000``.

    The noise is drawn from ``fold_in(key, index)``. Without ``causal.add_context_noise`` the result is x0 itself. JAX's
    ``split(key, n)[i]`` is ``fold_in(key, i)``, so ``index`` must be at least n if ``key`` is also split into n keys.
    """
    if causal.add_context_noise == "never":
        return x0
    noise = jax.random.normal(jax.random.fold_in(key, index), x0.shape)
    return flow.add_noise(x0, noise, flow.sigma_from_timestep(causal.context_noise))


def write_context(
    rollout: Rollout,
    params: Params,
    text_cache: TextCache,
    x0: jax.Array,
    cache: KVCache,
    channels: jax.Array | None = None,
) -> KVCache:
    """Return the cache with the keys and values of a finished block ``x0 [B, K, h, w, C]``.

    The pass has the timestep ``causal.context_noise``. It does not move the position of the cache;
    :func:`causvid_jax.models.kv_cache.advance` does.
    """
    timestep = jnp.full(x0.shape[:2], rollout.causal.context_noise, jnp.float32)
    _, cache = transformer.cached(
        params, beside(x0, channels), timestep, text_cache, cache, config=rollout.network, causal=rollout.causal
    )
    return cache


def generate_block(
    rollout: Rollout,
    params: Params,
    text_cache: TextCache,
    cache: KVCache,
    key: jax.Array,
    inputs: "BlockInputs",
    shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
    """Denoise one block of ``shape`` (B, K, h, w, C) from noise to its exit step, and advance the cache.

    ``key`` draws all noise of the block, and ``inputs`` are those of this block only. If no later block reads the
    block's keys and values, there is no context pass, and the cache keeps those of the exit step.

    Returns:
        The clean estimate x0, the noisy input of the exit step and the latents of the context pass, all of ``shape``,
        and the cache after the block.
    """
    timesteps, exit_step, channels = inputs.timesteps, inputs.exit_step, inputs.channels

    def noise(step: jax.Array | int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, step), shape)

    def denoise(step: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        x0, cache = predict_x0(rollout, params, text_cache, carry[0], timesteps[step], carry[1], channels)
        return flow.add_noise(x0, noise(step + 1), flow.sigma_from_timestep(timesteps[step + 1])), cache

    # If the first timestep is below 1000 (rCM), the block starts from noise times its noise level.
    start = noise(0) if rollout.timesteps[0] == 1000.0 else noise(0) * flow.sigma_from_timestep(timesteps[0])
    # The number of passes is a run-time value, so no pass is wasted.
    x, cache = jax.lax.fori_loop(0, exit_step, denoise, (start, cache))
    x0, cache = predict_x0(rollout, params, text_cache, x, timesteps[exit_step], cache, channels)
    context_latents = noisy_context(x0, key, timesteps.shape[0], rollout.causal)
    if rollout.causal.context_pass:

        def write(_: jax.Array, cache: KVCache) -> KVCache:
            return write_context(rollout, params, text_cache, context_latents, cache, channels)

        # The loop runs once or not at all, and updates the cache in place.
        cache = jax.lax.fori_loop(0, inputs.is_read.astype(jnp.int32), write, cache)
    return x0, x, context_latents, kv_cache.advance(cache, shape[1])


class BlockInputs(NamedTuple):
    """Inputs of n blocks of one size.

    Attributes:
        number: of each block in the clip, ``[n]``.
        exit_step: ``[n]``.
        timesteps: of each block, ``[n, Q]``.
        is_read: bool ``[n]``, whether a later block reads the keys and values of the block.
        channels: condition channels ``[n, B, K, h, w, D]``, for a student that reads a picture.
    """

    number: jax.Array
    exit_step: jax.Array
    timesteps: jax.Array
    is_read: jax.Array
    channels: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def generate_blocks(
    rollout: Rollout,
    shape: tuple[int, ...],
    params: Params,
    text_cache: TextCache,
    cache: KVCache,
    blocks: BlockInputs,
    key: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Generate ``blocks`` of one ``shape`` (B, K, h, w, C) one after the other by ``lax.scan``.

    Only the exit step of each block is differentiated (``params`` and ``text_cache``). From the last block to the
    first, the backward pass repeats the exit step and undoes the writes to the cache. So it keeps one cache instead of
    one per block (5.6 GiB each at 1.3B).

    Returns:
        x0 ``[n, B, K, h, w, C]`` and the cache after the last block.
    """
    return _generate_blocks_forward(rollout, shape, params, text_cache, cache, blocks, key)[0]


def _generate_blocks_forward(
    rollout: Rollout,
    shape: tuple[int, ...],
    params: Params,
    text_cache: TextCache,
    cache: KVCache,
    blocks: BlockInputs,
    key: jax.Array,
) -> tuple[tuple[jax.Array, KVCache], tuple[Any, ...]]:
    def block(cache: KVCache, inputs: BlockInputs) -> tuple[KVCache, tuple[jax.Array, jax.Array, Any]]:
        replaced = cache_undo.overwritten(cache, shape[1], rollout.causal)
        block_key = jax.random.fold_in(key, inputs.number)
        x0, x, _, cache = generate_block(rollout, params, text_cache, cache, block_key, inputs, shape)
        return cache, (x0, x, replaced)

    cache, (x0, x, replaced) = jax.lax.scan(block, cache, blocks)
    return (x0, cache), (params, text_cache, cache, blocks, x, replaced)


def _generate_blocks_backward(
    rollout: Rollout, shape: tuple[int, ...], residuals: tuple[Any, ...], cotangents: tuple[jax.Array, KVCache]
) -> tuple[Any, ...]:
    params, text_cache, cache, blocks, x, replaced = residuals
    # The context is a constant: the cotangent of the cache is dropped.
    x0_cotangent, _ = cotangents

    def block(
        carry: tuple[KVCache, Any], inputs: tuple[BlockInputs, jax.Array, Any, jax.Array]
    ) -> tuple[tuple[KVCache, Any], None]:
        cache, total = carry
        own, x, replaced, cotangent = inputs
        timestep = own.timesteps[own.exit_step]
        cache = cache_undo.undo(cache, replaced, shape[1], rollout.causal)

        def exit_pass(p: Any, t: TextCache) -> jax.Array:
            return predict_x0(rollout, p, t, x, timestep, cache, own.channels)[0]

        _, pull = jax.vjp(exit_pass, params, text_cache)
        return (cache, jax.tree.map(jnp.add, total, pull(cotangent))), None

    zero = jax.tree.map(jnp.zeros_like, (params, text_cache))
    (_, gradient), _ = jax.lax.scan(block, (cache, zero), (blocks, x, replaced, x0_cotangent), reverse=True)
    return (*gradient, None, None, None)


generate_blocks.defvjp(_generate_blocks_forward, _generate_blocks_backward)


def fill_context(
    rollout: Rollout, params: Params, text_cache: TextCache, context: jax.Array, cache: KVCache
) -> KVCache:
    """Return the cache after clean latents ``[B, P, h, w, C]``, P a whole number of blocks, are written block by block.

    Raises:
        ConfigError: P is no multiple of ``causal.frames_per_block``.
    """
    size = rollout.causal.frames_per_block
    require(
        context.shape[1] % size == 0,
        f"the context has {context.shape[1]} latent frames; it must have a multiple of {size}",
    )
    params, text_cache = jax.lax.stop_gradient((params, text_cache))

    def write(cache: KVCache, latents: jax.Array) -> tuple[KVCache, None]:
        return kv_cache.advance(write_context(rollout, params, text_cache, latents, cache), size), None

    blocks = rearrange(context, "b (n k) h w c -> n b k h w c", k=size)
    return jax.lax.scan(write, cache, blocks)[0]


def roll(
    generate: Callable[..., tuple[Any, KVCache]],
    rollout: Rollout,
    params: Params,
    text: jax.Array,
    key: jax.Array,
    exit_steps: jax.Array,
    *,
    shape: tuple[int, int, int, int, int],
    context: jax.Array | None,
    has_context: jax.Array | bool,
    picture: Picture | None,
) -> Any:
    """Apply ``generate`` to all blocks of a clip and join the results.

    ``generate`` is :func:`generate_blocks` or ``replay.record_blocks``. ``key`` draws the noise, and ``exit_steps [n]``
    holds the exit step of every block. The other arguments are those of :func:`self_rollout`; without a context,
    ``has_context`` is False. The arrays ``[n, B, K, h, w, C]`` of ``generate`` become ``[B, F, h, w, C]``.
    """
    batch, frames, height, width, _ = shape
    sizes = rollout.causal.block_sizes(frames)
    embeds = () if picture is None or not rollout.network.image_dim else (picture.embeds,)
    text_cache = transformer.encode_text(params, text, *embeds, config=rollout.network)
    longest = frames + (0 if context is None else context.shape[1])
    cache = transformer.init_cache(
        rollout.network, rollout.causal, batch=batch, height=height, width=width, frames=longest
    )
    if context is not None:
        context = noisy_context(context, key, len(sizes), rollout.causal)  # the blocks fold in the numbers below
        filled: Callable[[KVCache], KVCache] = functools.partial(fill_context, rollout, params, text_cache, context)
        cache = jax.lax.stop_gradient(jax.lax.cond(has_context, filled, lambda cache: cache, cache))
    table = timestep_table(rollout, len(sizes), has_context)
    parts, start = [], 0
    # A scan needs blocks of one size, so a separate scan generates an independent first frame.
    first = int(sizes[0] != rollout.causal.frames_per_block)
    for size, count in ((sizes[0], first), (rollout.causal.frames_per_block, len(sizes) - first)):
        if count:
            end = start + count
            channels = None
            if picture is not None and rollout.network.image_channels:
                channels = picture.channels(sum(sizes[:start]), count * size)
                channels = rearrange(channels, "b (n k) ... -> n b k ...", k=size)
            numbers = jnp.arange(start, end)
            inputs = BlockInputs(numbers, exit_steps[start:end], table[start:end], numbers < len(sizes) - 1, channels)
            outputs, cache = generate(rollout, (batch, size, *shape[2:]), params, text_cache, cache, inputs, key)
            cache, start = jax.lax.stop_gradient(cache), end
            parts.append(jax.tree.map(lambda x: rearrange(x, "n b k h w c -> b (n k) h w c"), outputs))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def self_rollout(
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
    """Return the student's own rollout. Every block stops at a random step, and only that step has a gradient.

    Block i starts from noise that depends on ``(key, i)`` only. Step j predicts ``x0 = x - sigma_j v`` and, before the
    exit, adds fresh noise, ``x = (1 - sigma_{j+1}) x0 + sigma_{j+1} noise``. One more pass writes the finished x0 to
    the cache at ``causal.context_noise``, and the next block attends to it as a constant. The last block needs no such
    pass. With ``causal.context_pass`` off the keys and values of the exit step stay instead.

    Args:
        rollout: network, block structure, timesteps.
        params: the student's parameters.
        text: prompt embeddings, ``[B, S, E]``.
        key: draws the exit steps (:func:`exit_steps_of`) and every noise.
        shape: ``(B, F, h, w, C)`` of the clip; the blocks must fit F.
        exit_step: index in 0 ... Q - 1 into the timesteps, for all blocks, instead of drawn exit steps; Q - 1 runs
            all steps.
        context: clean latents ``[B, P, h, w, C]``, P whole blocks, that the rollout continues. They are written like
            its own blocks, with noise if ``causal.add_context_noise`` says so.
        has_context: bool scalar; False ignores ``context`` in the same compiled program.
        picture: first frame of the clip, for a student with an image branch; not together with a context.

    Returns:
        x0, ``[B, F, h, w, C]`` float32.

    Raises:
        ConfigError: the blocks do not fit the length or the context, or ``exit_step`` is out of range.
    """
    has_context = False if context is None else has_context
    exits = exit_steps_of(rollout, key, shape[1], exit_step, has_context)
    options: dict[str, Any] = {"shape": shape, "context": context, "has_context": has_context, "picture": picture}
    return roll(generate_blocks, rollout, params, text, noise_key(key), exits, **options)
