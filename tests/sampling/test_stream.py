"""The streaming sampler against a cache-free oracle, and everything it promises: one trace, bit-identity, modes."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ConfigError, DiffusionConfig
from causvid_jax.diffusion import flow
from causvid_jax.models import transformer, vae
from causvid_jax.sampling import schedule, stream
from tests.refusals import refused
from tests.sampling.conftest import FIRST, PLAIN, WINDOW, next_blocks, prompt
from tests.tiny import changed, stream_recipe

NET = PLAIN.student
NOISED = stream_recipe(context_noise=300.0)
ADDED = stream_recipe(context_noise=300.0, add_context_noise="always")


def run(params, config, blocks, text=None, seed=0, state=None, frames=None):
    """Return the result of ``next_blocks``, by default of a new stream."""
    if state is None:
        state = stream.init_stream(params, prompt(0) if text is None else text, config=config, seed=seed, frames=frames)
    return next_blocks(params, state, config, blocks)


@functools.cache
def oracle_velocity(config):
    """One pass of the block-causal reading over all frames, without any cache."""
    return jax.jit(functools.partial(transformer.block_causal, config=NET, causal=config.causal))


def oracle(params, config, seed, shown=(), given=None, start=0):
    """The same stream without a cache: every pass reads the whole clip again. ``[1, F, 4, 4, 4]``.

    The first blocks are ``shown``; ``given`` blocks are noised to step ``start`` instead of starting from noise. Frames
    not reached yet are zeros, which a causal reading does not see.
    """
    sigmas = [t / 1000 for t in flow.student_timesteps(config.diffusion)]
    sizes = config.causal.block_sizes(config.video.latent_frames)
    clip, begin = jnp.zeros((1, sum(sizes), 4, 4, 4)), 0

    def noise(block, step, size):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), block), step)
        return jax.random.normal(key, (size, 4, 4, 4))[None]

    for i, size in enumerate(sizes):
        here = slice(begin, begin + size)
        if i < len(shown):
            x0 = shown[i]
        else:
            x = noise(i, start, size)
            if given is not None:
                x = (1 - sigmas[start]) * given[i] + sigmas[start] * x
            for j in range(start, len(sigmas)):
                timestep = jnp.full((1, sum(sizes)), config.causal.context_noise).at[:, here].set(1000 * sigmas[j])
                v = oracle_velocity(config)(params["student"], clip.at[:, here].set(x), timestep, prompt(0))
                x0 = x - sigmas[j] * v[:, here]
                if j + 1 < len(sigmas):
                    x = (1 - sigmas[j + 1]) * x0 + sigmas[j + 1] * noise(i, j + 1, size)
        clip, begin = clip.at[:, here].set(x0), begin + size
    return np.asarray(clip)


@pytest.mark.parametrize(
    "config, sizes",
    [(PLAIN, (2, 2, 2)), (FIRST, (1, 2, 2)), (NOISED, (2, 2, 2))],
    ids=["plain", "first", "context noise"],
)
def test_stream_equals_the_cache_free_reading(params, config, sizes):
    latents, _ = run(params, config, 3, seed=5)
    assert tuple(x.shape[1] for x in latents) == sizes
    np.testing.assert_allclose(np.concatenate(latents, axis=1), oracle(params, config, 5), atol=1e-4)


def by_block(params, config, blocks, **inputs):
    """Latents and frames of a stream given block by block, and what it held on the way."""
    state = stream.init_stream(params, prompt(0), config=config, **inputs)
    sizes, live, parts = [x.shape for x in jax.tree.leaves(state)], set(), []
    for i in range(blocks):
        latents, frames, state = stream.next_frames(params, state, config=config)
        if i < 3:
            parts.append((np.asarray(latents), np.asarray(frames)))
        elif i > 4:
            live.add(len(jax.live_arrays()))
    assert [x.shape for x in jax.tree.leaves(state)] == sizes
    return [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)], (latents, frames, state), live


def test_three_hundred_blocks_are_one_trace_in_constant_memory_and_begin_like_a_scan(params, monkeypatch):
    traces, cached = [], transformer.cached
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "cached", lambda *a, **k: traces.append(1) or cached(*a, **k))
        begin, (latents, frames, state), live = by_block(params, WINDOW, 300, seed=3)
    assert len(traces) == 1
    assert len(live) == 1
    assert np.isfinite(latents).all() and np.isfinite(frames).all()
    assert int(state.block) == 300 and int(state.cache.position) == 600
    assert 0.1 < np.std(latents) < 30  # neither faded nor blown up

    clip, video = stream.generate(params, prompt(0), config=WINDOW, seed=3)
    np.testing.assert_array_equal(clip, begin[0])
    np.testing.assert_array_equal(video, begin[1][:, stream.LEAD :])


def test_an_independent_first_frame_has_one_trace_more_and_scans_the_same(params):
    before = stream.next_frames._cache_size()
    begin, _, _ = by_block(params, FIRST, 3, seed=3)
    assert stream.next_frames._cache_size() - before == 2
    clip, video = stream.generate(params, prompt(0), config=FIRST, seed=3)
    np.testing.assert_array_equal(clip, begin[0])
    np.testing.assert_array_equal(video, begin[1][:, stream.LEAD :])
    assert video.shape == (1, 17, 16, 16, 3)
    # What was decoded block by block is what the VAE makes of the whole clip.
    np.testing.assert_allclose(video, vae.decode(params["vae"], clip, config=FIRST.vae), atol=1e-5)


def test_noise_depends_on_seed_and_block_only(params):
    """A stream of a batch is the same video as that stream alone."""
    text = prompt(0, batch=2)
    both, _ = run(params, PLAIN, 2, text=text, seed=7)
    alone, _ = run(params, PLAIN, 2, text=text[1:], seed=8)
    np.testing.assert_allclose(np.stack(both)[:, 1:], np.stack(alone), atol=1e-5)
    chosen, _ = run(params, PLAIN, 2, text=text, seed=[8, 7])
    assert np.abs(np.stack(chosen) - np.stack(both)).max() > 0.1
    noise = stream.block_noise(jnp.array([4, 5], jnp.uint32), jnp.int32(9), 2, (3, 2))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 9), 2)
    np.testing.assert_array_equal(noise[1], jax.random.normal(key, (3, 2)))
    refused("3 seeds are given for 2 prompts", stream.init_stream, params, text, config=PLAIN, seed=[1, 2, 3])


@contextlib.contextmanager
def timesteps_of_passes():
    """Yield a list that gets the timestep of every pass; programs are traced anew if their recipe has a new name."""
    calls, cached = [], transformer.cached

    def counted(*args, **kwargs):
        jax.debug.callback(lambda t: calls.append(float(t[0, 0])), args[2])
        return cached(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "cached", counted)
        yield calls
        jax.effects_barrier()


def count_passes(params, config, blocks=2):
    with timesteps_of_passes() as calls:
        latents, _ = run(params, dataclasses.replace(config, name="counted"), blocks)
    return np.reshape(calls, (blocks, -1)), latents


def test_passes_and_their_timesteps(params):
    clean, latents = count_passes(params, PLAIN)
    steps = [1000.0, 900.0, 750.0, 500.0]  # 1000 u s / (1 + u (s - 1)) at shift s = 3
    np.testing.assert_allclose(clean, [[*steps, 0.0]] * 2, atol=1e-3)
    without = changed(PLAIN, causal={"context_pass": False})
    noisy, other = count_passes(params, without)
    np.testing.assert_allclose(noisy, [steps] * 2, atol=1e-3)
    assert (schedule.passes_per_block(PLAIN), schedule.passes_per_block(without)) == (5, 4)
    # The first block has no context; the second sees other keys and values.
    np.testing.assert_array_equal(latents[0], other[0])
    assert np.abs(latents[1] - other[1]).max() > 1e-3


def test_finished_given_and_rewritten_blocks_are_written_at_the_context_noise(params):
    config = changed(PLAIN, causal={"context_noise": 125.0})
    with timesteps_of_passes() as calls:
        state = stream.init_stream(params, prompt(0), config=config)
        latents, state = stream.next_block(params, state, config=config)
        state = stream.append(params, state, latents, config=config)
        jax.block_until_ready(stream.recompute_context(params, state, config=config))
    np.testing.assert_allclose(calls, [1000.0, 900.0, 750.0, 500.0, 125.0, 125.0, 125.0, 125.0], atol=1e-3)


def test_positions_agree_until_the_window_leaves_the_sink(params):
    absolute, _ = run(params, changed(WINDOW, causal={"positions": "absolute"}), 6)
    relative, _ = run(params, WINDOW, 6)
    # Sink 2 and window 5: the first seven frames, three blocks, are seen at their true distances.
    np.testing.assert_allclose(np.stack(absolute[:3]), np.stack(relative[:3]), atol=1e-5)
    assert np.abs(absolute[4] - relative[4]).max() > 1e-4


def test_a_window_is_seen_and_a_long_one_is_not(params):
    plain, _ = run(params, PLAIN, 3)
    long, _ = run(params, changed(PLAIN, causal={"window": 6}), 3)
    short, _ = run(params, changed(PLAIN, causal={"window": 4}), 3)
    np.testing.assert_allclose(np.stack(plain), np.stack(long), atol=1e-5)
    np.testing.assert_allclose(np.stack(plain[:2]), np.stack(short[:2]), atol=1e-5)
    assert np.abs(plain[2] - short[2]).max() > 1e-4


def test_prompt_switch_keeps_the_past_and_changes_the_future(params):
    unswitched, _ = run(params, WINDOW, 6)
    before, state = run(params, WINDOW, 3)
    state = stream.switch_prompt(params, state, prompt(1), config=WINDOW)
    after, _ = run(params, WINDOW, 3, state=state)
    np.testing.assert_array_equal(np.stack(before), np.stack(unswitched[:3]))
    for switched, kept in zip(after, unswitched[3:], strict=True):
        assert np.abs(switched - kept).max() > 1e-2


@pytest.mark.parametrize("config", [FIRST, NOISED, ADDED], ids=["first", "context noise", "added noise"])
def test_recache_without_a_switch_changes_nothing_in_sight(params, config):
    """Under the same prompt the keys and values that come back are those that were there (full history in sight)."""
    _, state = run(params, config, 3)
    kept = stream.copy_stream(state)
    again = stream.recompute_context(params, state, config=config)
    np.testing.assert_allclose(again.cache.k, kept.cache.k, atol=1e-5)
    np.testing.assert_allclose(again.cache.v, kept.cache.v, atol=1e-5)
    assert int(again.cache.position) == int(kept.cache.position)


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_a_recomputed_cache_has_no_empty_slot_in_use(params, sink):
    """A kernel of a GPU reads the first slots without a mask, here behind a first frame that left the window."""
    config = changed(FIRST, causal={"window": 5, "sink": sink})
    _, state = run(params, config, 6)
    state = stream.switch_prompt(params, state, prompt(1), config=config)
    state = stream.recompute_context(params, state, config=config)
    slots = sink + 5
    used = min(int(state.cache.position) + 2, slots) - 2  # without the next block
    assert (np.asarray(state.cache.frame)[:used] >= 0).all()


def test_a_block_of_other_timesteps_is_recomputed_with_the_noise_of_its_first_write(params):
    state = stream.init_stream(params, prompt(0), config=ADDED)
    _, state = stream.next_block(params, state, config=ADDED, timesteps=(1000.0, 600.0))
    kept = stream.copy_stream(state)
    again = stream.recompute_context(params, state, config=ADDED)
    np.testing.assert_allclose(again.cache.k, kept.cache.k, atol=1e-5)


def test_an_appended_block_is_written_with_the_noise_of_a_generated_one(params):
    (latents,), state = run(params, ADDED, 1)
    again = stream.append(params, stream.init_stream(params, prompt(0), config=ADDED), latents, config=ADDED)
    np.testing.assert_allclose(again.cache.k, state.cache.k, atol=1e-5)
    plain = stream.append(params, stream.init_stream(params, prompt(0), config=NOISED), latents, config=NOISED)
    assert np.abs(again.cache.k - plain.cache.k).max() > 1e-2


def test_appended_and_forced_context_is_read_at_its_noise(params):
    """A pass of the stream after ``append`` and one of teacher forcing equal the cache-free pass at context noise."""
    rng = np.random.default_rng(3)
    clip, x = (jnp.asarray(rng.standard_normal((1, 6, 4, 4, 4)), jnp.float32) for _ in range(2))
    forced = transformer.block_causal(
        params["student"],
        x,
        jnp.full((1, 6), 500.0),
        prompt(0),
        config=NET,
        causal=NOISED.causal,
        clean=clip,
        clean_timestep=NOISED.causal.context_noise,
    )
    state = stream.init_stream(params, prompt(0), config=NOISED)
    for begin in (0, 2, 4):
        here = slice(begin, begin + 2)
        timestep = jnp.full((1, 6), NOISED.causal.context_noise).at[:, here].set(500.0)
        one = oracle_velocity(NOISED)(params["student"], clip.at[:, here].set(x[:, here]), timestep, prompt(0))
        np.testing.assert_allclose(forced[:, here], one[:, here], atol=1e-4)
        streamed, _ = transformer.cached(
            params["student"],
            x[:, here],
            jnp.full((1, 2), 500.0),
            state.text,
            state.cache,
            config=NET,
            causal=NOISED.causal,
        )
        np.testing.assert_allclose(streamed, one[:, here], atol=1e-4)
        state = stream.append(params, state, clip[:, here], config=NOISED)


def test_recache_before_the_first_block_changes_nothing(params):
    """Also with an independent first frame, before which there is no block."""
    start = stream.init_stream(params, prompt(0), config=FIRST)
    again = stream.recompute_context(params, stream.copy_stream(start), config=FIRST)
    assert int(again.cache.position) == 0
    jax.tree.map(np.testing.assert_array_equal, again, start)


@pytest.mark.parametrize("config", [PLAIN, WINDOW], ids=["plain", "window"])
def test_recache_after_a_switch_equals_a_past_under_the_new_prompt(params, config):
    """The result is the cache of a stream of the last blocks alone, under the new prompt."""
    blocks = 3 if config is PLAIN else 5
    latents, state = run(params, config, blocks)
    state = stream.switch_prompt(params, state, prompt(1), config=config)
    state = stream.recompute_context(params, state, config=config)
    # Blocks have two frames. A sink of two is one block, and a window of five shows the last two.
    last = 3
    expected = stream.init_stream(params, prompt(1), config=config)
    for block in latents[-last:]:
        expected = stream.append(params, expected, block, config=config)
    assert int(state.cache.position) == 2 * last and int(state.block) == blocks
    np.testing.assert_array_equal(state.cache.frame, expected.cache.frame)
    filled = np.asarray(expected.cache.frame) >= 0
    np.testing.assert_allclose(state.cache.k[:, :, filled], expected.cache.k[:, :, filled], atol=1e-5)
    np.testing.assert_allclose(state.cache.v[:, :, filled], expected.cache.v[:, :, filled], atol=1e-5)
    after, _ = run(params, config, 2, state=state)
    alone, _ = run(params, config, 2, state=dataclasses.replace(expected, block=jnp.int32(blocks)))
    np.testing.assert_allclose(after, alone, atol=1e-4)


@pytest.mark.parametrize("config", [PLAIN, WINDOW], ids=["plain", "window"])
def test_a_stream_that_forgets_at_a_switch_is_a_new_one_of_the_new_prompt(params, config):
    """The same frames, from the same noise, as a stream that has shown nothing; past the ring's wrap-around too."""
    config = changed(config, causal={"on_prompt_switch": "reset"})
    blocks = 2 if config.causal.window == 0 else 4

    def show(state):
        shown = []
        for _ in range(blocks):
            _, frames, state = stream.next_frames(params, state, config=config)
            shown.append(np.asarray(frames))
        return np.concatenate(shown, axis=1), state

    old, state = show(stream.init_stream(params, prompt(0), config=config))
    cut, _ = show(stream.change_prompt(params, state, prompt(1), config=config))
    new = stream.init_stream(params, prompt(1), config=config)
    expected, _ = show(dataclasses.replace(new, block=jnp.int32(blocks)))  # the noise of a block is its number's
    np.testing.assert_allclose(cut, expected, atol=1e-5)
    # A new clip's first latent frame has one frame; the block's three before it show the same.
    for early in range(stream.LEAD):
        np.testing.assert_array_equal(cut[:, early], cut[:, stream.LEAD])
    assert np.abs(cut[:, stream.LEAD] - cut[:, stream.LEAD + 1]).max() > 1e-3
    latents, _ = run(params, config, blocks)
    whole = vae.decode(params["vae"], np.concatenate(latents, axis=1), config=config.vae)
    np.testing.assert_allclose(old[:, stream.LEAD :], whole, atol=1e-4)


def test_what_happens_to_the_cache_at_a_switch_is_a_setting(params):
    caches = {}
    for name in ("keep", "recompute", "reset"):
        _, state = run(params, PLAIN, 2)
        config = changed(PLAIN, causal={"on_prompt_switch": name})
        caches[name] = stream.change_prompt(params, state, prompt(1), config=config).cache
    _, state = run(params, PLAIN, 2)
    jax.tree.map(np.testing.assert_array_equal, caches["keep"], state.cache)
    state = stream.switch_prompt(params, state, prompt(1), config=PLAIN)
    again = stream.recompute_context(params, state, config=PLAIN).cache
    np.testing.assert_allclose(caches["recompute"].k, again.k, atol=1e-5)
    assert np.abs(caches["recompute"].k - caches["keep"].k).max() > 1e-3
    assert int(caches["reset"].position) == 0 and (np.asarray(caches["reset"].frame) == -1).all()
    with pytest.raises(ConfigError, match="causal.on_prompt_switch is 'cut'; accepted: 'keep', 'recompute', 'reset'"):
        changed(PLAIN, causal={"on_prompt_switch": "cut"})
    with pytest.raises(
        ConfigError, match="a clip would start with a block of one frame.*accepted: 'keep', 'recompute'"
    ):
        changed(FIRST, causal={"on_prompt_switch": "reset"})


@pytest.mark.parametrize("config", [PLAIN, FIRST], ids=["block", "frame"])
def test_image_becomes_the_first_latents_and_is_remembered(params, config):
    image = jax.random.uniform(jax.random.key(4), (1, 16, 16, 3), minval=-1)
    latents = stream.encode_image(params, image, config=config)
    count = 1 if config is FIRST else 2
    still = jnp.repeat(image[:, None], 4 * count - 3, axis=1)
    np.testing.assert_allclose(latents, vae.encode(params["vae"], still, config=config.vae), atol=1e-5)

    state = stream.init_stream(params, prompt(0), config=config, seed=2)
    state = stream.append(params, state, latents, config=config)
    assert int(state.cache.position) == count and state.started
    frames, state = stream.decode_block(params, state, latents, config=config)
    expected = vae.decode(params["vae"], latents, config=config.vae)
    np.testing.assert_allclose(frames[:, stream.LEAD :], expected, atol=1e-5)
    after, _ = run(params, config, 1, state=state)

    begin = oracle(params, config, 2, shown=[latents])
    np.testing.assert_allclose(after[0], begin[:, count : count + 2], atol=1e-4)
    with pytest.raises(ConfigError, match="latents of the next block are"):
        stream.append(params, stream.init_stream(params, prompt(0), config=config), latents[:, :, :2], config=config)


def test_video_to_video_starts_at_the_chosen_step(params):
    given = [jax.random.normal(jax.random.key(10 + i), (1, 2, 4, 4, 4)) for i in range(3)]
    distance = {}
    for start in (1, 3):
        state = stream.init_stream(params, prompt(0), config=PLAIN, seed=5)
        latents = []
        for block in given:
            x0, state = stream.next_block_from(params, state, block, start, config=PLAIN)
            latents.append(x0)
        latents = np.concatenate(latents, axis=1)
        expected = oracle(params, PLAIN, 5, given=given, start=start)
        np.testing.assert_allclose(latents, expected, atol=1e-4)
        distance[start] = np.abs(latents - np.concatenate(given, axis=1)).mean()
    assert distance[3] < distance[1]


def test_strength_is_a_nominal_noise_level():
    config = DiffusionConfig()
    assert [schedule.strength_step(config, s) for s in (1.0, 0.99, 0.75, 0.6, 0.5, 0.25)] == [0, 1, 1, 2, 2, 3]
    for strength in (0.2, 0.0, 1.5, -1.0):
        refused("accepted: 0.25", schedule.strength_step, config, strength)


@pytest.mark.parametrize("shift,steps", [(8.0, (1000.0, 757.0, 522.0)), (5.0, (1000.0, 946.0, 854.0, 681.0))])
def test_the_strength_that_a_message_names_is_accepted(shift, steps):
    """The lowest strengths of two published students, 0.120110446 and 0.2992091388, are shown with six digits."""
    config = DiffusionConfig(shift=shift, denoising_timesteps=steps, warp=False)
    with pytest.raises(ConfigError) as error:
        schedule.strength_step(config, 0.01)
    named = str(error.value).split("accepted: ")[1].split()[0]
    assert len(named) < 9 and schedule.strength_step(config, float(named)) == len(steps) - 1


def test_own_timesteps_of_every_shift_are_accepted():
    for shift in (0.1, 0.2, 0.3, 1.0, 5.0, 8.0):
        config = changed(PLAIN, diffusion=DiffusionConfig(shift=shift))
        assert schedule.schedule(config, None)[0][0] == pytest.approx(1000.0, abs=1e-9)


def test_impossible_clips_are_refused(params):
    refused("7 latent frames do not fit", stream.generate, params, prompt(0), config=PLAIN, frames=7)


@pytest.mark.parametrize("steps", [(), (500.0, 1000.0), (1000.0, 1000.0), (1000.001, 500.0), (500.0, 0.0), (np.nan,)])
def test_timesteps_that_are_no_schedule_are_refused(params, steps):
    """No step would make a block of zeros, and an ascending list one that is more noise than video."""
    with pytest.raises(ConfigError, match="timesteps are .*; they must be at least one, distinct, descending"):
        stream.next_block(params, stream.init_stream(params, prompt(0), config=PLAIN), config=PLAIN, timesteps=steps)


@pytest.mark.parametrize("config,entries", [(PLAIN, 4), (ADDED, 5)], ids=["plain", "context pass"])
def test_noise_without_an_entry_for_every_step_is_refused(params, config, entries):
    """A missing entry would be replaced by the last one, so two steps would add the same noise."""
    noise = jnp.ones((entries, 1, 2, *config.latent_size, config.vae.z_dim))
    start = lambda: stream.init_stream(params, prompt(0), config=config)  # noqa: E731
    for given in (noise[:-1], noise[:, :, :1], noise[:, 0]):
        refused("the noise of a block has shape", stream.next_block, params, start(), config=config, noise=given)
    stream.next_block(params, start(), config=config, noise=noise)


def test_no_frames_are_not_the_length_of_the_recipe(params):
    for run_of in (stream.init_stream, stream.generate):
        with pytest.raises(ConfigError, match="frames is 0; a cache without a window needs its length"):
            run_of(params, prompt(0), config=PLAIN, frames=0)
    refused("0 latent frames do not fit", stream.generate, params, prompt(0), config=WINDOW, frames=0)


def test_the_first_blocks_have_timesteps_of_their_own(params):
    """Blocks of 4, 2, 1 and 1 steps are those of recipes with one list each, one after the other; a cut begins anew."""
    four = WINDOW.diffusion.denoising_timesteps
    lists = [four, (1000.0, 500.0), (1000.0,)]
    alone = [dataclasses.replace(WINDOW, diffusion=DiffusionConfig(shift=3.0, denoising_timesteps=x)) for x in lists]
    own = DiffusionConfig(shift=3.0, denoising_timesteps=lists[2], first_block_timesteps=tuple(lists[:2]))
    config = changed(WINDOW, diffusion=own, causal={"on_prompt_switch": "reset"})
    blocks, state = run(params, config, 4)
    expected = stream.init_stream(params, prompt(0), config=WINDOW, seed=0)
    for block, recipe in zip(blocks, [*alone, alone[2]], strict=True):
        latents, expected = stream.next_block(params, expected, config=recipe)
        np.testing.assert_allclose(block, latents, atol=1e-5)
    assert np.abs(run(params, alone[2], 1)[0][0] - blocks[0]).max() > 1e-3
    state = stream.change_prompt(params, state, prompt(0), config=config)
    cut, _ = stream.next_block(params, state, config=config)
    fresh = stream.init_stream(params, prompt(0), config=WINDOW, seed=0)
    fresh = dataclasses.replace(fresh, block=jnp.int32(4))  # the same noise
    np.testing.assert_allclose(cut, stream.next_block(params, fresh, config=WINDOW)[0], atol=1e-5)


def test_blocks_are_counted_from_their_first_frame():
    for causal in (CausalConfig(3), CausalConfig(3, independent_first_frame=True), CausalConfig(1)):
        starts = np.cumsum([0, *causal.block_sizes(19 if causal.independent_first_frame else 18)])[:-1]
        assert [schedule.block_number(int(start), causal) for start in starts] == list(range(len(starts)))


def test_a_first_timestep_below_1000_starts_from_scaled_noise(params):
    config = changed(PLAIN, diffusion={"shift": 1.0, "denoising_timesteps": (999.375,)})
    (block,), _ = run(params, config, 1)
    noise = stream.block_noise(jnp.zeros(1, jnp.uint32), 0, 0, block.shape[1:]) * 0.999375
    state = stream.init_stream(params, prompt(0), config=config)
    velocity, _ = transformer.cached(
        params["student"], noise, jnp.full((1, 2), 999.375), state.text, state.cache, config=NET, causal=config.causal
    )
    np.testing.assert_allclose(block, noise - 0.999375 * velocity, atol=1e-5)
