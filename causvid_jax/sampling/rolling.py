"""Rolling Forcing (arXiv 2509.25161): a window of blocks at rising noise levels is denoised jointly.

The window holds the next N blocks of a stream, ``N = rolling_blocks``, the oldest first. The Q denoising steps of a
block are N stages of Q / N steps. In one round the newest block does the first stage, the block before it the second,
and the oldest block the last:

    round r:   block r - 2 at stage 2 | block r - 1 at stage 1 | block r at stage 0      (N = 3)

Every pass runs on the whole window. Its tokens attend to each other, in both directions, and to the finished blocks in
the cache; ``causal.window`` counts the frames of the window too. A finished block is written to the cache by one more
pass, as in :mod:`~causvid_jax.sampling.stream`. At the start the window grows, and at the end it shrinks. With N = 1
this is the ordinary sampler; Rolling Forcing has N = Q = 5.

    state = init_rolling(params, text, config=recipe, seed=0)
    latents, state = next_round(params, state, config=recipe)  # latents: None in the first N - 1 rounds
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange

from causvid_jax.config import Recipe, require
from causvid_jax.diffusion import flow
from causvid_jax.models import precision
from causvid_jax.sampling import schedule, stream
from causvid_jax.sampling.stream import LEAD, Params, StreamState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RollingState:
    """The state between two rounds.

    Attributes:
        stream: of the finished blocks; its cache holds no noisy frame.
        window: noisy latents of the n blocks that are begun and not finished, ``[B, n, K, h, w, C]``, oldest first.
        age: rounds that the newest of them has done (static).
    """

    stream: StreamState
    window: jax.Array
    age: int = dataclasses.field(default=0, metadata={"static": True})


def init_rolling(
    params: Params, text: jax.Array, *, config: Recipe, seed: int | Sequence[int] = 0, frames: int | None = None
) -> RollingState:
    """Return the state before the first round; arguments are those of :func:`stream.init_stream`."""
    single = dataclasses.replace(config, rolling_blocks=0)
    state = stream.init_stream(params, text, config=single, seed=seed, frames=frames)
    shape = (text.shape[0], 0, config.causal.frames_per_block, *config.latent_size, config.vae.z_dim)
    return RollingState(state, jnp.zeros(shape, jnp.float32))


def rounds(blocks: int, config: Recipe) -> list[bool]:
    """Return whether a new block enters the window, for every round of a clip of ``blocks`` blocks."""
    return [number < blocks for number in range(blocks + config.rolling_blocks - 1)]


def next_round(
    params: Params, state: RollingState, *, config: Recipe, enters: bool = True
) -> tuple[jax.Array | None, RollingState]:
    """Run one round: every block of the window does one stage.

    Args:
        params, config: as in :func:`stream.init_stream`.
        state: of :func:`init_rolling` or the round before.
        enters: whether a block of noise enters the window first; False at the end of a clip, until the window is empty.
            Without ``causal.window`` all blocks must fit the stream's maximum length.

    Returns:
        The latents ``[B, K, h, w, C]`` of the block that is finished, None if none is, and the next state.

    Raises:
        ConfigError: a block enters between others that are being finished, or no block is begun.
    """
    begun = state.window.shape[1]
    require(
        enters if not begun else not (enters and state.age),
        f"a round with enters={enters} is asked for; accepted: {not enters}, since "
        + ("the blocks of the window are being finished" if begun else "the window is empty"),
    )
    age = 0 if enters else state.age + 1
    latents, single, window = run_round(params, state.stream, state.window, config=config, enters=enters, age=age)
    return latents, RollingState(single, window, age)


@functools.partial(jax.jit, static_argnames=("config", "enters", "age"), donate_argnames=("state",))
def run_round(
    params: Params, state: StreamState, window: jax.Array, *, config: Recipe, enters: bool, age: int
) -> tuple[jax.Array | None, StreamState, jax.Array]:
    """Return the finished block or None, the next state of the stream and the next window; see :func:`next_round`.

    ``age`` is the stage of the newest block, 0 if it ``enters``. Each size of the window compiles once.
    """
    if enters:
        noise = _noise(state, [window.shape[1]], [0], config)
        start = schedule.schedule(config, None)[1][0]
        window = jnp.concatenate([window, noise if start == 1 else start * noise], axis=1)
    stages = [age + place for place in reversed(range(window.shape[1]))]
    window = _denoise(params, state, window, stages, config)
    if stages[0] < config.rolling_blocks - 1:
        return None, state, window
    # The last step's noise level is 0, so the oldest block is its x0.
    latents = window[:, 0]
    cache = stream.write_context(params, state, state.cache, latents, config)
    return latents, stream.finish(state, latents, cache), window[:, 1:]


def _denoise(params: Params, state: StreamState, window: jax.Array, stages: Sequence[int], config: Recipe) -> jax.Array:
    """Return the window ``[B, n, K, h, w, C]`` after one stage; block i does that of ``stages [n]``.

    One step computes ``x0 = x_t - sigma v`` and adds fresh noise at the block's next level. The passes read the cache
    but do not change it, because their keys and values are those of noisy frames.
    """
    size = config.causal.frames_per_block
    times, sigmas = schedule.schedule(config, None)
    timesteps, levels = jnp.asarray(times, jnp.float32), jnp.asarray(sigmas, jnp.float32)
    steps = len(times) // config.rolling_blocks
    first = steps * jnp.asarray(stages)
    places = list(range(len(stages)))

    def step(j: jax.Array, x: jax.Array) -> jax.Array:
        index = first + j  # [n]: the denoising step of every block
        frames = rearrange(x, "b n k h w c -> b (n k) h w c")
        per_frame = jnp.repeat(timesteps[index], size)
        velocity, _ = stream.network_pass(params, state, state.cache, frames, per_frame, config)
        velocity = rearrange(velocity, "b (n k) h w c -> b n k h w c", k=size)
        now, later = (jnp.broadcast_to(levels[i], x.shape[:2]) for i in (index, index + 1))
        x0 = precision.round_all(flow.x0_from_velocity(x, velocity, now), config.student)
        noise = _noise(state, places, [index[place] + 1 for place in places], config)
        return precision.round_all(flow.add_noise(x0, noise, later), config.student)

    with jax.named_scope("denoise"):
        return jax.lax.fori_loop(0, steps, step, window)


def _noise(state: StreamState, places: Sequence[int], steps: Sequence[jax.Array | int], config: Recipe) -> jax.Array:
    """Return the noise ``[B, n, K, h, w, C]`` of one step for the blocks at ``places`` after the finished blocks.

    The same blocks and steps have this noise in the ordinary sampler.
    """
    shape = (config.causal.frames_per_block, *config.latent_size, config.vae.z_dim)
    parts = [
        stream.block_noise(state.seed, state.block + place, step, shape)
        for place, step in zip(places, steps, strict=True)
    ]
    return precision.round_all(jnp.stack(parts, axis=1), config.student)


def generate(
    params: Params,
    text: jax.Array,
    *,
    config: Recipe,
    frames: int | None = None,
    seed: int | Sequence[int] = 0,
    decode: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """Generate a whole clip; arguments and results are those of :func:`stream.generate`."""
    frames = config.video.latent_frames if frames is None else frames
    state = init_rolling(params, text, config=config, seed=seed, frames=frames)
    clip, video = [], []
    for enters in rounds(len(config.causal.block_sizes(frames)), config):
        latents, state = next_round(params, state, config=config, enters=enters)
        if latents is None:
            continue
        clip.append(latents)
        if decode:
            part, finished = stream.decode_block(params, state.stream, latents, config=config)
            video.append(part)
            state = dataclasses.replace(state, stream=finished)
    return jnp.concatenate(clip, axis=1), jnp.concatenate(video, axis=1)[:, LEAD:] if decode else None
