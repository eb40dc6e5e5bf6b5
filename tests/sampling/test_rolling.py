"""Windows of blocks that are denoised jointly, against a plain loop that reads the whole clip again in every pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax import media
from causvid_jax.cli import train
from causvid_jax.config import CausalConfig, ConfigError
from causvid_jax.diffusion import flow
from causvid_jax.models import rope, transformer
from causvid_jax.sampling import player, rolling, stream
from causvid_jax.sampling.request import SampleRequest
from causvid_jax.serve.programs import open_programs
from tests.sampling.conftest import FIRST, PLAIN, prompt

NET = PLAIN.student
SINKS = dataclasses.replace(PLAIN, causal=CausalConfig(2, window=9, sink=2, positions="relative", context_noise=20.0))
TOGETHER = [dataclasses.replace(SINKS, rolling_blocks=blocks) for blocks in (1, 2, 4)]


@jax.jit
def whole_pass(params, x, timestep, text, visible, distance):
    """Return velocity, keys and values ``[L, F, n, N, D]`` of one pass over F frames, without a cache.

    Frame i attends to the frames of ``visible [F, F]``, whose keys are rotated by ``distance [F, F]`` for it.
    """
    grid = {"rows": 2, "columns": 2, "head_dim": NET.head_dim, "theta": NET.rope_theta}

    def attend(q, k, v, _):
        def one(query, sees, where):  # [B, n, N, D], [F], [F]
            keys = rope.rotate(k, rope.angles(where, **grid))
            query = rope.rotate(query[:, None], rope.angles(jnp.zeros(1), **grid))[:, 0]
            scores = jnp.einsum("bqnd,bfknd->bnqfk", query, keys) / np.sqrt(NET.head_dim)
            scores = jnp.where(sees[:, None], scores, -jnp.inf)
            weights = jax.nn.softmax(scores.reshape(*scores.shape[:3], -1), axis=-1).reshape(scores.shape)
            return jnp.einsum("bnqfk,bfknd->bqnd", weights, v)

        return jax.vmap(one, in_axes=(1, 0, 0), out_axes=1)(q, visible, distance), (k[0], v[0])

    return transformer._apply(params, NET, attend, x, timestep, text)


def loop(params, config, blocks, seed):
    """Return the latents of a rolling stream, and keys and values of its clean frames, without any cache.

    The pass reads the clean copies of all frames and, after them, the noisy frames of the window. Every block counts
    its own steps.
    """
    causal, size, frames = config.causal, config.causal.frames_per_block, 2 * blocks
    timesteps = flow.student_timesteps(config.diffusion)
    sigmas, count = [t / 1000 for t in timesteps] + [0.0], len(timesteps)
    clean, noisy = np.zeros((2, frames, 4, 4, 4), np.float32)
    step_of, finished = {}, 0
    visible, distance = np.zeros((2, 2 * frames, 2 * frames), int)

    def see(query, start, end, in_window):
        """Let frame ``query`` of the pass see the sink and the last frames up to ``end``."""
        first = max(end - causal.window, causal.sink)
        for frame in range(end):
            if frame < causal.sink or frame >= end - causal.window:
                key = frame + frames if in_window and frame >= start else frame
                place = frame + first - causal.sink if frame < causal.sink else frame
                visible[query, key], distance[query, key] = 1, place - query % frames

    for frame in range(frames):  # a clean frame sees the clean frames up to the end of its block
        start = frame // size * size
        see(frame, start, start + size, False)

    def network():
        noise_times = np.zeros(frames)
        for block, step in step_of.items():
            noise_times[size * block : size * (block + 1)] = timesteps[min(step, count - 1)]
        times = np.concatenate([np.full(frames, causal.context_noise), noise_times])
        x = np.concatenate([clean, noisy])[None]
        return whole_pass(
            params["student"], x, times[None].astype(np.float32), prompt(0), visible.astype(bool), distance
        )

    def fresh(block, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), block), step)
        return np.asarray(jax.random.normal(key, (size, 4, 4, 4)))

    while finished < blocks:
        newest = max(step_of, default=finished - 1)
        if newest + 1 < blocks:
            step_of[newest + 1] = 0
            noisy[size * (newest + 1) : size * (newest + 2)] = fresh(newest + 1, 0)
        start, end = size * finished, size * (max(step_of) + 1)
        for query in range(frames):
            visible[frames + query] = distance[frames + query] = 0
            see(frames + query, start, end if start <= query < end else query + 1, start <= query < end)
        for _ in range(count // config.rolling_blocks):
            velocity = np.asarray(network()[0])[0, frames:]
            for block in step_of:
                here, step = slice(size * block, size * (block + 1)), step_of[block]
                x0 = noisy[here] - sigmas[step] * velocity[here]
                step_of[block] += 1
                noisy[here] = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * fresh(block, step + 1)
        if step_of[finished] == count:
            clean[size * finished : size * (finished + 1)] = noisy[size * finished : size * (finished + 1)]
            del step_of[finished]
            finished += 1
    keys, values = (np.asarray(part)[:, :frames] for part in network()[1])
    return clean, keys, values


@pytest.mark.parametrize(
    "config,blocks", [(TOGETHER[1], 7), (TOGETHER[2], 8), (TOGETHER[2], 2)], ids=["2 of 7", "4 of 8", "4 of 2"]
)
def test_latents_and_cache_equal_a_loop_without_a_cache(params, config, blocks):
    state = rolling.init_rolling(params, prompt(0), config=config, seed=5)
    parts = []
    for enters in rolling.rounds(blocks, config):
        latents, state = rolling.next_round(params, state, config=config, enters=enters)
        parts += [] if latents is None else [latents]
    clean, keys, values = loop(params, config, blocks, 5)
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[0], clean, atol=3e-5)
    cache, causal = state.stream.cache, config.causal
    frames = [f for f in range(2 * blocks) if f < causal.sink or f >= 2 * blocks - causal.window]
    assert sorted(f for f in np.asarray(cache.frame) if f >= 0) == frames
    assert (int(cache.position), int(state.stream.block), state.window.shape[1]) == (2 * blocks, blocks, 0)
    for slot, frame in enumerate(np.asarray(cache.frame)):
        if frame >= 0:
            np.testing.assert_allclose(cache.k[:, 0, slot], keys[:, frame], atol=3e-5)
            np.testing.assert_allclose(cache.v[:, 0, slot], values[:, frame], atol=3e-5)


def test_a_window_of_one_block_is_the_ordinary_sampler(params):
    state = rolling.init_rolling(params, prompt(0, 2), config=TOGETHER[0], seed=3)
    single = stream.init_stream(params, prompt(0, 2), config=SINKS, seed=3)
    for _ in range(6):
        latents, state = rolling.next_round(params, state, config=TOGETHER[0])
        expected, single = stream.next_block(params, single, config=SINKS)
        np.testing.assert_allclose(latents, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.stream, single)


def test_a_played_window_shows_the_frames_of_the_clip(params):
    config, text, timing = TOGETHER[1], np.asarray(prompt(0)), player.Timing()
    parts = list(player.play(params, text, config=config, frames=18, seed=5, timing=timing))
    assert [part.shape[1] for part in parts] == [5, 8, 5] and timing.frames == 18
    latents, video = rolling.generate(params, prompt(0), config=config, frames=6, seed=5)
    assert latents.shape == (1, 6, 4, 4, 4)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), media.to_uint8(video)[:, :18])
    with pytest.raises(ConfigError, match="rolling_blocks is set, which generates from text only"):
        next(player.play(params, text, config=config, frames=18, switches={1: text}))


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"rolling_blocks": 3},
            "rolling_blocks is 3 with 4 diffusion.denoising_timesteps; accepted: 0 or a divisor, 1, 2",
        ),
        (
            {"causal": CausalConfig(2, window=6)},
            "causal.window is 6; it must hold the 8 latent frames of rolling_blocks 4",
        ),
        ({"causal": CausalConfig(2, context_pass=False)}, "causal.context_pass is off with rolling_blocks 4"),
        (
            {"causal": CausalConfig(2, independent_first_frame=True), "video": FIRST.video},
            "independent_first_frame is set with rolling_blocks 4",
        ),
    ],
)
def test_settings_that_do_not_go_with_a_window_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(dataclasses.replace(PLAIN, rolling_blocks=4), **changes)


def test_what_works_on_one_block_at_a_time_is_refused(params):
    with pytest.raises(ConfigError, match=r"recipe 'tiny' denoises 2 blocks jointly \(rolling_blocks\)"):
        stream.init_stream(params, prompt(0), config=TOGETHER[1])
    with pytest.raises(ConfigError, match="for one block at a time use rolling_blocks 0"):
        open_programs(TOGETHER[1])
    with pytest.raises(ConfigError, match="rolling_blocks is 2; training denoises one block after the other"):
        train.Options(config=TOGETHER[1], stage="distill", workdir="x")
    for flag, value in (("video", "x.mp4"), ("switch", ("5:a b",)), ("decode_device", 0)):
        with pytest.raises(ConfigError, match=f"--{flag} is given with rolling_blocks 2 of recipe 'tiny'"):
            SampleRequest(config=TOGETHER[1], prompt=("a b",), **{flag: value})
