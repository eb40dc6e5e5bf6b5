"""The streaming sampler (paper, Algorithm 2): generate K latent frames per call, for videos of any length.

    state = init_stream(params, text, config=recipe, seed=0)
    while True:
        latents, frames, state = next_frames(params, state, config=recipe)

``params`` is ``{"student": ..., "vae": ...}``, and also ``"taehv"`` if that is the recipe's decoder. Every function is
pure and jitted, and donates ``state``: :func:`copy_stream` keeps one. One compilation serves every block, except for
the first with ``causal.independent_first_frame``, which has one frame. The VAE decodes the first latent frame to one
frame and others to four; a decoded block has four per latent, so drop the first :data:`LEAD` frames of a stream.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from causvid_jax.config import Recipe, require
from causvid_jax.diffusion import flow
from causvid_jax.models import adapters, decoder, precision, transformer, vae
from causvid_jax.models.decoder import LEAD, DecodeCache
from causvid_jax.models.image_branch import Picture, check_picture, with_channels
from causvid_jax.models.kv_cache import TEXT_AXES, KVCache, TextCache
from causvid_jax.models.unstacked import is_unstacked
from causvid_jax.sampling import schedule
from causvid_jax.sampling.schedule import strength_step as strength_step
from causvid_jax.sharding import constraints

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """The state of a stream. Its size never changes."""

    cache: KVCache  # self-attention keys and values of the frames in the window and the sink
    text: TextCache  # the prompt
    decode: DecodeCache  # the decoder's past
    recent: jax.Array  # [B, R, h, w, C] float32, the last latent frames, newest at the end, for recompute_context()
    seed: jax.Array  # [B] uint32
    block: jax.Array  # [] int32: blocks finished
    adapters: "Adapters | None" = None  # strengths of LoRAs, if the student has any
    picture: Picture | None = None  # what the video starts from, if the student has an image branch
    started: bool = dataclasses.field(default=True, metadata={"static": True})  # False: an independent frame is next


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """The strengths of a stream's LoRAs, and the prompt, whose keys and values depend on them."""

    scale: jax.Array  # [r] float32: one factor per column of the adapters (models.adapters)
    prompt_embeds: jax.Array  # [B, S, E]


def block_frames(state: StreamState, config: Recipe) -> int:
    """Return the latent frames of the next block."""
    return config.causal.frames_per_block if state.started else 1


def init_stream(
    params: Params,
    text: jax.Array,
    *,
    config: Recipe,
    seed: int | Sequence[int] = 0,
    frames: int | None = None,
    picture: Picture | None = None,
) -> StreamState:
    """Return the state before the first block.

    Args:
        params: ``{"student"}`` is read.
        text: prompt embeddings ``[B, S, E]``; B streams run side by side.
        config: the recipe.
        seed: one integer s, or B integers. With one s, stream b has seed s + b and equals a single stream of that seed.
        frames: maximum latent frames of the stream (default: the trained length). Only a recipe without
            ``causal.window`` needs it; with a window a stream has no maximum.
        picture: of a student with an image branch, which generates the first block too; refused for any other.
    """
    check_picture(picture, config.student, "student")
    capacity = None if config.causal.window else frames or config.video.latent_frames
    seeds = seeds_of(seed, text.shape[0])
    return first_state(params, text, seeds, config=config, capacity=capacity, picture=picture)


def seeds_of(seed: int | Sequence[int], batch: int) -> jax.Array:
    """Return the seeds uint32 ``[batch]`` that :func:`init_stream` makes of ``seed``."""
    each = np.asarray(seed, np.int64)
    each = each + np.arange(batch) if each.ndim == 0 else each
    require(each.shape == (batch,), f"{each.size} seeds are given for {batch} prompts; accepted: 1 or {batch}")
    return jnp.asarray(each.astype(np.uint32))


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def first_state(
    params: Params,
    text: jax.Array,
    seeds: jax.Array,
    *,
    config: Recipe,
    capacity: int | None = None,
    picture: Picture | None = None,
) -> StreamState:
    """Return the first state for uint32 ``seeds [B]``; ``capacity`` latent frames at most, None with a window."""
    schedule.check_single_blocks(config)
    batch, (height, width), causal = text.shape[0], config.latent_size, config.causal
    size = {"batch": batch, "height": height, "width": width}
    # With a window, these are the earlier blocks of which the next block sees at least one frame.
    if capacity is None:
        recent_frames = causal.past_frames()
    else:
        recent_frames = capacity - int(causal.independent_first_frame)
        recent_frames -= recent_frames % causal.frames_per_block
    return StreamState(
        cache=transformer.init_cache(
            config.student, causal, frames=capacity, unstacked=is_unstacked(params["student"]), **size
        ),
        text=_prompt(params, text, config, None, picture),
        decode=decoder.init_decode_cache(config, **size),
        recent=jnp.zeros((batch, recent_frames, height, width, config.vae.z_dim), jnp.float32),
        seed=seeds,
        block=jnp.zeros((), jnp.int32),
        started=not causal.independent_first_frame,
        picture=picture,
    )


def _student(params: Params, strengths: Adapters | None) -> Any:
    """Return the student's parameters, with the stream's strengths in its adapters."""
    return params["student"] if strengths is None else adapters.scaled(params["student"], strengths.scale)


def _prompt(
    params: Params, text: jax.Array, config: Recipe, strengths: Adapters | None, picture: Picture | None
) -> TextCache:
    """Return the prompt's keys and values in the type that attention reads: the same bits, half the memory of float32.

    They include those of the picture's embeds. On a mesh no device holds those of other devices' streams."""
    net = config.student
    embeds = () if picture is None or picture.embeds is None else (picture.embeds,)
    cache = transformer.encode_text(_student(params, strengths), text, *embeds, config=net)
    return jax.tree.map(lambda x: constraints.constrain(x.astype(net.dtype), TEXT_AXES[-x.ndim :], net.rules), cache)


def copy_stream(state: StreamState) -> StreamState:
    """Copy a state, so that one stream can be continued in two ways."""
    return jax.tree.map(jnp.copy, state)


# ---- one block ------------------------------------------------------------------------------------------------------


def block_noise(seed: jax.Array, block: jax.Array, step: jax.Array | int, shape: Sequence[int]) -> jax.Array:
    """Draw N(0, 1) of one stream's ``shape`` for each seed, ``[B, *shape]``: a function of (seed, block, step) only."""

    def one(s: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(s), block), step)
        return jax.random.normal(key, tuple(shape), jnp.float32)

    return jax.vmap(one)(seed)


def _noise(state: StreamState, step: jax.Array | int, config: Recipe, noise: jax.Array | None = None) -> jax.Array:
    """Return the noise ``[B, K, h, w, C]`` of a step: from the state's seeds, or entry ``step`` of ``noise``."""
    shape = (block_frames(state, config), *config.latent_size, config.vae.z_dim)
    if noise is None:
        values = block_noise(state.seed, state.block, step, shape)
    else:
        # The step after the last reads an entry that does not exist; its noise level is 0.
        values = noise[jnp.minimum(step, len(noise) - 1)]
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
    """Run one network pass on the current block; all its frames have ``timestep``, or one each of ``[K]``."""
    timesteps = jnp.full(x.shape[:2], timestep, jnp.float32)
    student, causal = config.student, config.causal
    x = with_channels(x, state.picture, student, cache.position)
    options: dict[str, Any] = {"config": student, "causal": causal, "rewrites": rewrites}
    return transformer.cached(_student(params, state.adapters), x, timesteps, state.text, cache, **options)


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
        level = flow.sigma_from_timestep(config.causal.context_noise)
        context_latents = flow.add_noise(x0, _noise(state, count - 1, config, noise), level)
        context_latents = precision.round_all(context_latents, config.student)
        _, cache = network_pass(params, state, cache, context_latents, config.causal.context_noise, config)
        return x0, cache


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
_sample = functools.partial(jax.jit, static_argnames=("config", "timesteps"), donate_argnames=("state",))


@_sample
def next_block(
    params: Params,
    state: StreamState,
    *,
    config: Recipe,
    noise: jax.Array | None = None,
    timesteps: tuple[float, ...] | None = None,
) -> tuple[jax.Array, StreamState]:
    """Generate the next block: clean latents ``[B, K, h, w, C]`` and the next state. Nothing is decoded.

    Args:
        params, state, config: as in :func:`init_stream`.
        noise: ``[steps, B, K, h, w, C]``, the noise that the block starts from and that each later step adds; None
            draws it from the state's seeds.
        timesteps: static denoising timesteps, descending from at most 1000; None: those of ``config``.
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
    """Generate and decode the next block: latents ``[B, K, h, w, C]``, frames ``[B, 4K, H, W, 3]``, the next state.

    Arguments are those of :func:`next_block`.
    """
    latents, state = _next_block(params, state, config, noise, timesteps)
    frames, state = _decode(params, state, latents, config)
    return latents, frames, state


@_step
def decode_block(
    params: Params, state: StreamState, latents: jax.Array, *, config: Recipe
) -> tuple[jax.Array, StreamState]:
    """Decode the last finished block to frames ``[B, 4K, H, W, 3]``. Call it once for every block, or for none."""
    return _decode(params, state, latents, config)


@_step
def append(params: Params, state: StreamState, latents: jax.Array, *, config: Recipe) -> StreamState:
    """Append clean latents ``[B, K, h, w, C]`` as the next block: one pass writes them to the cache.

    The stream then continues an image (:func:`encode_image`) or the latents of a video.
    """
    _check_block(state, latents, config)
    _, cache = network_pass(params, state, state.cache, latents, config.causal.context_noise, config)
    return finish(state, latents, cache)


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
    """Generate the next block from an incoming one, ``latents [B, K, h, w, C]`` (video to video).

    The incoming block is noised to denoising step ``start`` (:func:`strength_step`; traced, so that one compilation
    serves every strength) and denoised by the remaining steps, conditioned on the prompt and all earlier blocks (paper,
    section 5.3). ``noise`` is that of :func:`next_block`.
    """
    _check_block(state, latents, config)
    _, sigmas = schedule.schedule(config, None)
    x = flow.add_noise(latents, _noise(state, start, config, noise), jnp.asarray(sigmas, jnp.float32)[start])
    x0, cache = _denoise(
        params, state, precision.round_all(x, config.student), start, config, noise, None, own_steps=False
    )
    return x0, finish(state, x0, cache)


def _check_block(state: StreamState, latents: jax.Array, config: Recipe) -> None:
    expected = (state.seed.shape[0], block_frames(state, config), *config.latent_size, config.vae.z_dim)
    require(latents.shape == expected, f"latents of the next block are {latents.shape}; they must be {expected}")


# ---- image, prompt switch, whole clip -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config",))
def encode_image(params: Params, image: jax.Array, *, config: Recipe) -> jax.Array:
    """Return the latents of a first block that shows ``image [B, H, W, 3]`` (float, [-1, 1]), for :func:`append`.

    With an independent first frame the image is encoded as a video of one frame, ``[B, 1, h, w, C]``; otherwise as a
    still video of 1 + 4 (K - 1) frames, ``[B, K, h, w, C]`` (paper, section 5.3).
    """
    latents = 1 if config.causal.independent_first_frame else config.causal.frames_per_block
    still = repeat(image, "b h w c -> b t h w c", t=1 + vae.time_factor(config.vae) * (latents - 1))
    return vae.encode(params["vae"], still, config=config.vae)


@_step
def change_prompt(params: Params, state: StreamState, text: jax.Array, *, config: Recipe) -> StreamState:
    """Switch the prompt, and keep, recompute or reset the cache as ``config.causal.on_prompt_switch`` says.

    Recomputing uses the new prompt (:func:`recompute_context`). A reset shows as a cut.
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
    return dataclasses.replace(state, text=_prompt(params, text, config, state.adapters, state.picture))


@_step
def set_adapters(
    params: Params, state: StreamState, scale: jax.Array, text: jax.Array | None = None, *, config: Recipe
) -> StreamState:
    """Return the stream with other strengths of its LoRAs from the next block on; one program serves all strengths.

    Args:
        params, state, config: as in :func:`init_stream`.
        scale: ``[r]``, one factor per column of the student's adapters.
        text: the prompt ``[B, S, E]``; needed once, for a state that has no strengths yet.
    """
    if state.adapters is not None:
        text = state.adapters.prompt_embeds
    require(text is not None, "the first strengths of a stream need its prompt; give text")
    assert text is not None
    strengths = Adapters(scale, text)
    return dataclasses.replace(state, adapters=strengths, text=_prompt(params, text, config, strengths, state.picture))


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
    """Recompute the keys and values of the blocks in the window with the current prompt.

    Cached keys and values depend on the prompt with which they were computed. After :func:`switch_prompt` this updates
    them, at the cost of one pass per block. The sink and an independent first frame are not updated. Blocks that have
    left the window are not available, so the oldest blocks are recomputed with less context than before.
    """
    k, independent = config.causal.frames_per_block, int(config.causal.independent_first_frame)
    recent_frames = state.recent.shape[1]
    if not recent_frames:  # a window of one block holds no earlier block
        return state
    finished = (state.cache.position - independent) // k  # -1 before an independent first frame
    blocks = jnp.clip(finished, 0, recent_frames // k)

    def rewrite(i: jax.Array, cache: KVCache) -> transformer.KVCache:
        latents = jax.lax.dynamic_slice_in_dim(state.recent, recent_frames - (blocks - i) * k, k, axis=1)
        _, cache = network_pass(params, state, cache, latents, config.causal.context_noise, config, rewrites=True)
        return transformer.advance(cache, k)

    # Every slot stores the index of its frame, so moving the position back hides later frames.
    rewound = dataclasses.replace(state.cache, position=state.cache.position - blocks * k)
    return dataclasses.replace(state, cache=jax.lax.fori_loop(0, blocks, rewrite, rewound))


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
        frames: latent frames F, which must fit the blocks; default: the recipe's clip.
        decode: static; without it the second result is None.
        params, text, config, seed, picture: as in :func:`init_stream`.

    Returns:
        latents ``[B, F, h, w, C]`` and video ``[B, 1 + 4 (F - 1), H, W, 3]`` in [-1, 1].
    """
    frames = frames or config.video.latent_frames
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
