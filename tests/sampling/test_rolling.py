"""Windows of blocks that are denoised jointly, against a stream in numpy."""

import dataclasses

import jax
import numpy as np
import pytest

from causvid_jax import media
from causvid_jax.cli import train
from causvid_jax.config import CausalConfig, ConfigError
from causvid_jax.sampling import player, rolling, stream
from causvid_jax.sampling.request import SampleRequest
from causvid_jax.serve.programs import open_programs
from causvid_jax.training import stages
from tests.plain_stream import PlainStream
from tests.refusals import refused
from tests.sampling.conftest import FIRST, PLAIN, prompt

SINKS = dataclasses.replace(PLAIN, causal=CausalConfig(2, window=9, sink=2, positions="relative", context_noise=20.0))
TOGETHER = [dataclasses.replace(SINKS, rolling_blocks=blocks) for blocks in (1, 2, 4)]


@pytest.mark.parametrize(
    "config,blocks", [(TOGETHER[1], 7), (TOGETHER[2], 8), (TOGETHER[2], 2)], ids=["2 of 7", "4 of 8", "4 of 2"]
)
def test_latents_and_cache_are_those_of_numpy(params, config, blocks):
    state = rolling.init_rolling(params, prompt(0), config=config, seed=5)
    parts = []
    for enters in rolling.rounds(blocks, config):
        latents, state = rolling.next_round(params, state, config=config, enters=enters)
        parts += [] if latents is None else [latents]
    reference = PlainStream(config, params["student"], prompt(0), seed=5)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), reference.rolling(blocks), atol=3e-5)
    cache, causal = state.stream.cache, config.causal
    frames = [f for f in range(2 * blocks) if f < causal.sink or f >= 2 * blocks - causal.window]
    assert sorted(f for f in np.asarray(cache.frame) if f >= 0) == frames == sorted(reference.kept)
    assert (int(cache.position), int(state.stream.block), state.window.shape[1]) == (2 * blocks, blocks, 0)
    for slot, frame in enumerate(np.asarray(cache.frame)):
        if frame >= 0:
            keys, values = (np.stack(part) for part in zip(*reference.kept[frame], strict=True))
            np.testing.assert_allclose(cache.k[:, :, slot], keys, atol=3e-5)
            np.testing.assert_allclose(cache.v[:, :, slot], values, atol=3e-5)


def test_a_window_of_one_block_is_the_ordinary_sampler(params):
    state = rolling.init_rolling(params, prompt(0, 2), config=TOGETHER[0], seed=3)
    single = stream.init_stream(params, prompt(0, 2), config=SINKS, seed=3)
    for _ in range(6):
        latents, state = rolling.next_round(params, state, config=TOGETHER[0])
        expected, single = stream.next_block(params, single, config=SINKS)
        np.testing.assert_allclose(latents, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.stream, single)


def test_a_clip_that_ends_is_finished_before_another_block_enters(params):
    """A block that had done two stages did the second one again beside a new block."""
    config = TOGETHER[2]
    state = rolling.init_rolling(params, prompt(0), config=config, seed=5)
    with pytest.raises(ConfigError, match="enters=False is asked for; accepted: True, since the window is empty"):
        rolling.next_round(params, state, config=config, enters=False)
    for enters in (True, False):
        _, state = rolling.next_round(params, state, config=config, enters=enters)
    with pytest.raises(ConfigError, match="enters=True is asked for; accepted: False, since the blocks of the window"):
        rolling.next_round(params, state, config=config)
    for _ in range(2):
        latents, state = rolling.next_round(params, state, config=config, enters=False)
    reference = PlainStream(config, params["student"], prompt(0), seed=5)
    np.testing.assert_allclose(latents, reference.rolling(1), atol=3e-5)
    for enters in (True, False, False, False):
        latents, state = rolling.next_round(params, state, config=config, enters=enters)
    np.testing.assert_allclose(latents, reference.rolling(1), atol=3e-5)


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
    refused(message, dataclasses.replace, dataclasses.replace(PLAIN, rolling_blocks=4), **changes)


def test_what_works_on_one_block_at_a_time_is_refused(params, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe 'tiny' denoises 2 blocks jointly \(rolling_blocks\)"):
        stream.init_stream(params, prompt(0), config=TOGETHER[1])
    refused("for one block at a time use rolling_blocks 0", open_programs, TOGETHER[1])
    with pytest.raises(ConfigError, match="rolling_blocks is 2; training denoises one block after the other"):
        train.Options(config=TOGETHER[1], stage="distill", workdir="x")
    refused("rolling_blocks is 2; training denoises", stages.train, "distill", TOGETHER[1], tmp_path)
    for flag, value in (("video", "x.mp4"), ("switch", ("5:a b",)), ("decode_device", 0)):
        with pytest.raises(ConfigError, match=f"--{flag} is given with rolling_blocks 2 of recipe 'tiny'"):
            SampleRequest(config=TOGETHER[1], prompt=("a b",), **{flag: value})
