"""The streaming sampler (paper, Algorithm 2): generate K latent frames per call, for videos of any length.

    state = init_stream(params, text, config=recipe, seed=0)
    while True:
        latents, frames, state = next_frames(params, state, config=recipe)

``params`` is ``{"student": ..., "vae": ...}``, and also ``"taehv"`` if that is the recipe's decoder. Every function is
pure and jitted, and donates ``state``; :func:`copy_stream` makes a copy. One compilation serves every block, except an
independent first frame (``causal.independent_first_frame``). The first latent frame decodes to one pixel frame, others
to four. A decoded block always has four per latent frame, so drop the first :data:`LEAD` frames of a stream.

Letters: B streams, K latent frames of a block, ``[h, w, C]`` one latent frame, ``[H, W]`` pixels, S tokens of width E.
K is 1 for an independent first frame. Timesteps are in [0, 1000], noise levels ``sigma = timestep / 1000``.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from causvid_jax.config import Recipe, require
from causvid_jax.diffusion import flow
from causvid_jax.models import decoder, precision, transformer, vae
from causvid_jax.models.decoder import LEAD
from causvid_jax.models.image_branch import Picture, with_channels
from causvid_jax.models.kv_cache import KVCache
from causvid_jax.sampling import schedule
from causvid_jax.sampling.state import Adapters as Adapters
from causvid_jax.sampling.state import Params as Params
from causvid_jax.sampling.state import StreamState as StreamState
from causvid_jax.sampling.state import abstract_state as abstract_state
from causvid_jax.sampling.state import block_frames as block_frames
from causvid_jax.sampling.state import capacity_of as capacity_of
from causvid_jax.sampling.state import copy_stream as copy_stream
from causvid_jax.sampling.state import encode_prompt, student_params
from causvid_jax.sampling.state import first_state as first_state
from causvid_jax.sampling.state import init_stream as init_stream
from causvid_jax.sampling.state import seeds_of as seeds_of

CONTEXT_STEP = 2**31 - 1
"""Number of the step whose noise the context pass adds: that of no denoising step, so a block has one such noise."""

# ---- one block ------------------------------------------------------------------------------------------------------


def block_noise(seed: jax.Array, block: jax.Array, step: jax.Array | int, shape: Sequence[int]) -> jax.Array:
    """Draw N(0, 1) of one stream's ``shape`` for each of the uint32 ``seed [B]``: float32 ``[B, *shape]``.

    The values depend on seed, block and step only, not on the batch: ``fold_in(fold_in(key(seed), block), step)``.
    """

    def one(s: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(s), block), step)
        return jax.random.normal(key, tuple(shape), jnp.float32)

    return jax.vmap(one)(seed)


def _block_shape(state: StreamState, config: Recipe) -> tuple[int, ...]:
    return (state.seed.shape[0], block_frames(state, config), *config.latent_size, config.vae.z_dim)


def _noise(state: StreamState, step: jax.Array | int, config: Recipe, noise: jax.Array | None = None) -> jax.Array:
    """Return the noise ``[B, K, h, w, C]`` of a step: from the state's seeds, or entry ``step`` of ``noise``."""
    if noise is None:
        values = block_noise(state.seed, state.block, step, _block_shape(state, config)[1:])
    else:
        # The step after the last reads an entry that does not exist; its noise level is 0.
        values = noise[jnp.minimum(step, len(noise) - 1)].astype(jnp.float32)
    return precision.round_all(values, config.student)


def network_pass(
    params: Params,
    state: StreamState,
    cache: KVCache,
    x: jax.Array,
    timestep: jax.Array | float,
    config: Recipe,
    rewrites: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Run one network pass on the current block, with one ``timestep`` for all its frames or ``[K]``, one for each."""
    timesteps = jnp.full(x.shape[:2], timestep, jnp.float32)
    run = functools.partial(transformer.cached, config=config.student, causal=config.causal, rewrites=rewrites)
    x = with_channels(x, state.picture, config.student, cache.position)
    return run(student_params(params, state.adapters), x, timesteps, state.text, cache)


def _denoise(
    params: Params,
    state: StreamState,
    x: jax.Array,
    start: jax.Array | int,
    config: Recipe,
    noise: jax.Array | None,
    timesteps: tuple[float, ...] | None,
    own_steps: bool = True,
) -> tuple[jax.Array, KVCache]:
    """Denoise the block ``x`` from denoising step ``start`` on; return its x0 and the cache with the block written.

    Step j computes ``x0 = x_t - sigma_j v`` and adds fresh noise at the next step's level. The cache write is one more
    iteration of the same loop, on x0 itself (sigma 0, ``context_noise``), so the network is compiled once.
    ``own_steps``: the first blocks have ``diffusion.first_block_timesteps``.
    """
    schedule.check_noise(noise, _block_shape(state, config), config, timesteps)
    block = schedule.block_number(state.cache.position, config.causal) if own_steps else None
    times, levels, count = schedule.tables(block, config, timesteps)

    def step(j: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        x, cache = carry
        velocity, cache = network_pass(params, state, cache, x, times[j], config)
        x0 = precision.round_all(flow.x0_from_velocity(x, velocity, levels[j]), config.student)
        x = flow.add_noise(x0, _noise(state, j + 1, config, noise), levels[j + 1])
        return precision.round_all(x, config.student), cache

    with jax.named_scope("denoise"):
        if config.causal.add_context_noise != "always":
            return jax.lax.fori_loop(start, count, step, (x, state.cache))
        # With noise, the context pass reads another input than the loop's last pass, so it runs after the loop.
        x0, cache = jax.lax.fori_loop(start, count - 1, step, (x, state.cache))
        return x0, write_context(params, state, cache, x0, config, noise)


def write_context(
    params: Params,
    state: StreamState,
    cache: KVCache,
    latents: jax.Array,
    config: Recipe,
    noise: jax.Array | None = None,
    rewrites: bool = False,
) -> KVCache:
    """Write the finished block ``state.block`` to the cache by one pass at ``context_noise``.

    With ``add_context_noise="always"`` the pass reads ``(1 - s) x0 + s noise``, ``s = context_noise / 1000``, with the
    noise of :data:`CONTEXT_STEP`, or the last entry of ``noise``.
    """
    causal = config.causal
    if causal.add_context_noise == "always":
        level = flow.sigma_from_timestep(causal.context_noise)
        latents = flow.add_noise(latents, _noise(state, CONTEXT_STEP, config, noise), level)
        latents = precision.round_all(latents, config.student)
    return network_pass(params, state, cache, latents, causal.context_noise, config, rewrites)[1]


def finish(state: StreamState, latents: jax.Array, cache: KVCache) -> StreamState:
    """Return the state after the block ``latents``, whose keys and values ``cache`` holds."""
    return dataclasses.replace(
        state,
        cache=transformer.advance(cache, latents.shape[1]),
        recent=jnp.concatenate([state.recent, latents], axis=1)[:, latents.shape[1] :],
        block=state.block + 1,
        started=True,
    )


def _next_block(
    params: Params,
    state: StreamState,
    config: Recipe,
    noise: jax.Array | None = None,
    timesteps: tuple[float, ...] | None = None,
) -> tuple[jax.Array, StreamState]:
    x = _noise(state, 0, config, noise)
    start = schedule.schedule(config, timesteps)[1][0]
    x = x if start == 1 else start * x
    x0, cache = _denoise(params, state, x, 0, config, noise, timesteps)
    return x0, finish(state, x0, cache)


def _decode(params: Params, state: StreamState, latents: jax.Array, config: Recipe) -> tuple[jax.Array, StreamState]:
    with jax.named_scope("decode"):
        frames, decode = decoder.decode_chunk(params, latents, state.decode, config=config)
        if config.causal.on_prompt_switch == "reset":
            # The caller drops the padding frames of a stream's first block, but not of a block after a reset.
            lead = (jnp.arange(frames.shape[1]) < LEAD) & (state.cache.position == latents.shape[1])
            frames = jnp.where(lead[:, None, None, None], frames[:, LEAD : LEAD + 1], frames)
    return frames, dataclasses.replace(state, decode=decode)


_step = functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
_sample = functools.partial(schedule.jit_sampler, donate_argnames=("state",))


@_sample
def next_block(
    params: Params,
    state: StreamState,
    *,
    config: Recipe,
    noise: jax.Array | None = None,
    timesteps: tuple[float, ...] | None = None,
) -> tuple[jax.Array, StreamState]:
    """Generate the next block without decoding it (paper, Algorithm 2).

    For each denoising timestep t, with level s, and the next level s' (0 after the last)::

        x0 = x_t - s v(x_t, t, prompt, cache),   x_t' = (1 - s') x0 + s' noise

    Then a pass on x0 at ``causal.context_noise`` writes the block to the cache (``causal.context_pass``).

    Args:
        params: ``{"student"}`` is read.
        state: of :func:`init_stream` or of the block before. It is donated. Without ``causal.window`` the block must
            fit the stream's maximum length: this function cannot check that.
        noise: ``[steps, B, K, h, w, C]``, the initial noise of the block and the noise that each later step adds (with
            ``causal.add_context_noise="always"`` the context pass reads the last entry); None draws it from the
            state's seeds.
        timesteps: static denoising timesteps, descending from at most 1000; None: those of ``config``.

    Returns:
        Clean latents ``[B, K, h, w, C]`` and the next state.

    Raises:
        ConfigError: noise of another shape, or timesteps that do not descend in (0, 1000].
    """
    return _next_block(params, state, config, noise, timesteps)


@_sample
def next_frames(
    params: Params,
    state: StreamState,
    *,
    config: Recipe,
    noise: jax.Array | None = None,
    timesteps: tuple[float, ...] | None = None,
) -> tuple[jax.Array, jax.Array, StreamState]:
    """Generate and decode the next block: :func:`next_block`, then :func:`decode_block`.

    Args:
        params: ``{"student"}`` and the recipe's decoder, ``"vae"`` or ``"taehv"``.
        state, config, noise, timesteps: as in :func:`next_block`, with its errors.

    Returns:
        Latents ``[B, K, h, w, C]``, float frames ``[B, 4K, H, W, 3]`` in [-1, 1], and the next state. The first
        :data:`LEAD` frames of a stream are padding.
    """
    latents, state = _next_block(params, state, config, noise, timesteps)
    frames, state = _decode(params, state, latents, config)
    return latents, frames, state


@_step
def decode_block(
    params: Params, state: StreamState, latents: jax.Array, *, config: Recipe
) -> tuple[jax.Array, StreamState]:
    """Decode the last finished block; return float frames ``[B, 4K, H, W, 3]`` in [-1, 1] and the next state.

    The decoder is causal and keeps its cache in the state, so call this once for every block, or for no block.

    Args:
        params: the recipe's decoder, ``"vae"`` or ``"taehv"``.
        state: after that block. It is donated.
        latents: of that block, ``[B, K, h, w, C]``.
    """
    return _decode(params, state, latents, config)


@_step
def append(params: Params, state: StreamState, latents: jax.Array, *, config: Recipe) -> StreamState:
    """Append clean latents as the next block: one pass at ``causal.context_noise`` writes them to the cache.

    The stream then continues an image (:func:`encode_image`) or the latents of a video.

    Args:
        params: ``{"student"}`` is read.
        state: before the block, as in :func:`next_block`. It is donated.
        latents: ``[B, K, h, w, C]``.

    Returns:
        The next state. :func:`decode_block` gives the frames.

    Raises:
        ConfigError: latents of another shape.
    """
    _check_block(state, latents, config)
    return finish(state, latents, write_context(params, state, state.cache, latents, config))


@_step
def next_block_from(
    params: Params,
    state: StreamState,
    latents: jax.Array,
    start: jax.Array | int,
    *,
    config: Recipe,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, StreamState]:
    """Generate the next block from an incoming one (video to video; paper, section 5.3).

    The incoming block is noised to the level s of denoising step ``start``, ``x = (1 - s) latents + s noise``, and
    denoised by the remaining steps, conditioned on the prompt and all earlier blocks. The paper takes only the last
    step; :func:`~causvid_jax.sampling.schedule.strength_step` converts a strength to a step.

    Args:
        params: ``{"student"}`` is read.
        state: before the block, as in :func:`next_block`. It is donated.
        latents: of the incoming block, ``[B, K, h, w, C]``.
        start: index of the first denoising step, clipped to the recipe's; traced: one compilation serves all strengths.
        noise: as in :func:`next_block`; entry ``start`` is the first that is used.

    Returns:
        Clean latents ``[B, K, h, w, C]`` and the next state.

    Raises:
        ConfigError: latents of another shape.
    """
    _check_block(state, latents, config)
    _, sigmas = schedule.schedule(config, None)
    start = jnp.clip(start, 0, len(sigmas) - 2)
    x = flow.add_noise(latents, _noise(state, start, config, noise), jnp.asarray(sigmas, jnp.float32)[start])
    x0, cache = _denoise(
        params, state, precision.round_all(x, config.student), start, config, noise, None, own_steps=False
    )
    return x0, finish(state, x0, cache)


def _check_block(state: StreamState, latents: jax.Array, config: Recipe) -> None:
    expected = _block_shape(state, config)
    require(latents.shape == expected, f"latents of the next block are {latents.shape}; they must be {expected}")


# ---- image, prompt switch, whole clip -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config",))
def encode_image(params: Params, image: jax.Array, *, config: Recipe) -> jax.Array:
    """Encode an image as the latents of a first block, for :func:`append` (image to video without an image branch).

    The image is repeated to fill the first block, as in the paper: a still video of 1 + 4 (K - 1) frames.

    Args:
        params: ``{"vae"}`` is read.
        image: float ``[B, H, W, 3]`` in [-1, 1], of the recipe's size.

    Returns:
        Latents ``[B, K, h, w, C]``; K is 1 with ``causal.independent_first_frame``.
    """
    latents = 1 if config.causal.independent_first_frame else config.causal.frames_per_block
    still = repeat(image, "b h w c -> b t h w c", t=1 + vae.time_factor(config.vae) * (latents - 1))
    return vae.encode(params["vae"], still, config=config.vae)


@_step
def change_prompt(params: Params, state: StreamState, text: jax.Array, *, config: Recipe) -> StreamState:
    """Switch the prompt from the next block on, and treat the cache as ``config.causal.on_prompt_switch`` says.

    ``"keep"`` does not change the cache, ``"recompute"`` recomputes it with the new prompt (:func:`recompute_context`),
    and ``"reset"`` clears it, which makes a cut in the video.

    Args:
        params: ``{"student"}`` is read.
        state: between two blocks. It is donated.
        text: prompt embeddings ``[B, S, E]``.

    Returns:
        The state with the new prompt.
    """
    state = switch_prompt(params, state, text, config=config)
    if config.causal.on_prompt_switch == "recompute":
        return recompute_context(params, state, config=config)
    return _reset_context(state, config) if config.causal.on_prompt_switch == "reset" else state


@_step
def switch_prompt(params: Params, state: StreamState, text: jax.Array, *, config: Recipe) -> StreamState:
    """Switch to the prompt embeddings ``text [B, S, E]`` from the next block on; the cache does not change."""
    if state.adapters is not None:
        state = dataclasses.replace(state, adapters=dataclasses.replace(state.adapters, prompt_embeds=text))
    return dataclasses.replace(state, text=encode_prompt(params, text, config, state.adapters, state.picture))


@_step
def set_adapters(
    params: Params, state: StreamState, scale: jax.Array, text: jax.Array | None = None, *, config: Recipe
) -> StreamState:
    """Return the state with other strengths of its LoRAs from the next block on; one program serves all strengths.

    Args:
        params: ``{"student"}``, with adapters.
        state: between two blocks. It is donated.
        scale: float ``[r]``, one factor per column of the adapters (``models.adapters``).
        text: the prompt ``[B, S, E]``; needed once, for a state that has no strengths yet.

    Raises:
        ConfigError: a state without strengths, and no ``text``.
    """
    if state.adapters is not None:
        text = state.adapters.prompt_embeds
    require(text is not None, "the first strengths of a stream need its prompt; give text")
    assert text is not None
    strengths = Adapters(scale, text)
    return dataclasses.replace(
        state, adapters=strengths, text=encode_prompt(params, text, config, strengths, state.picture)
    )


def _reset_context(state: StreamState, config: Recipe) -> StreamState:
    """Clear the KV cache and the decoder's cache, so that the next block is generated like the start of a clip.

    The video shows a cut. A first latent frame decodes to one pixel frame; it is repeated to fill the four of a
    stream's block.
    """
    height, width = config.latent_size
    cache = state.cache
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, frame=jnp.full_like(cache.frame, -1), position=jnp.zeros_like(cache.position)),
        decode=decoder.init_decode_cache(config, batch=state.seed.shape[0], height=height, width=width),
    )


@_step
def recompute_context(params: Params, state: StreamState, *, config: Recipe) -> StreamState:
    """Compute the cache anew from the last blocks, with the current prompt.

    Cached keys and values depend on the prompt with which they were computed. After :func:`switch_prompt` this function
    replaces them, at the cost of one pass per block. The result is the cache of a stream of these blocks alone
    (``state.recent``, ``causal.context_frames()`` latent frames), so the oldest of them become the sink. With an
    independent first frame the blocks keep their places, and that frame and a sink before them their keys and values.
    ``state``, between two blocks, is donated.
    """
    k, independent = config.causal.frames_per_block, int(config.causal.independent_first_frame)
    recent_frames = state.recent.shape[1]
    if not recent_frames:  # a window of one block without a sink holds no earlier block
        return state
    finished = (state.cache.position - independent) // k  # -1 before an independent first frame
    blocks = jnp.clip(finished, 0, recent_frames // k)

    def rewrite(i: jax.Array, cache: KVCache) -> transformer.KVCache:
        latents = jax.lax.dynamic_slice_in_dim(state.recent, recent_frames - (blocks - i) * k, k, axis=1)
        block = dataclasses.replace(state, block=state.block - blocks + i)  # whose noise is drawn again
        return transformer.advance(write_context(params, block, cache, latents, config, rewrites=True), k)

    # A pass reads the first slots of the cache up to its block (models.kv_cache), so none of them may stay empty.
    begin = state.cache.position - blocks * k if independent else jnp.zeros_like(state.cache.position)
    frame = jnp.where(state.cache.frame < begin, state.cache.frame, -1)
    start = dataclasses.replace(state.cache, frame=frame, position=begin)
    return dataclasses.replace(state, cache=jax.lax.fori_loop(0, blocks, rewrite, start))


def generate(
    params: Params,
    text: jax.Array,
    *,
    config: Recipe,
    frames: int | None = None,
    seed: int | Sequence[int] = 0,
    decode: bool = True,
    picture: Picture | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Generate a whole clip in one jitted scan over its blocks, equal to the blocks generated one by one.

    Args:
        params: ``{"student"}``, and the recipe's decoder if ``decode``.
        text, config, seed, picture: as in :func:`init_stream`.
        frames: latent frames F, which must fit the blocks; None: those of the recipe's clip.
        decode: whether to decode; static.

    Returns:
        Latents ``[B, F, h, w, C]``, and float video ``[B, 1 + 4 (F - 1), H, W, 3]`` in [-1, 1] or None.

    Raises:
        ConfigError: latent frames that do not fit the blocks, and the errors of :func:`init_stream`.
    """
    frames = config.video.latent_frames if frames is None else frames
    state = init_stream(params, text, config=config, seed=seed, frames=frames, picture=picture)
    return _scan_blocks(params, state, config=config, sizes=config.causal.block_sizes(frames), decode=decode)


@functools.partial(jax.jit, static_argnames=("config", "sizes", "decode"))
def _scan_blocks(
    params: Params, state: StreamState, *, config: Recipe, sizes: tuple[int, ...], decode: bool
) -> tuple[jax.Array, jax.Array | None]:
    def one(state: StreamState, _: None) -> tuple[StreamState, tuple[jax.Array, jax.Array | None]]:
        latents, state = _next_block(params, state, config)
        frames, state = _decode(params, state, latents, config) if decode else (None, state)
        return state, (latents, frames)

    parts = []
    if not state.started:
        state, part = one(state, None)
        parts.append(part)
    state, scanned = jax.lax.scan(one, state, length=len(sizes) - len(parts))
    parts.append(jax.tree.map(lambda x: rearrange(x, "n b f ... -> b (n f) ..."), scanned))
    latents, video = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    return latents, video[:, LEAD:] if decode else None
