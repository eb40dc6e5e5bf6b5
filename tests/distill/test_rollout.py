"""Rollouts against a numpy loop over a toy student whose cache can be differentiated by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ConfigError, TransformerConfig
from causvid_jax.distill import exit_steps, replay, rollout
from causvid_jax.models import kv_cache, transformer
from tests import tiny

TIMESTEPS = (1000.0, 800.0, 500.0)
SHAPE = (2, 6, 2, 1, 3)
TEXT = np.random.default_rng(0).standard_normal((2, 1, 1)).astype(np.float32)
PARAMS = {"own": 0.4, "context": 0.7, "key": 0.9, "text": 0.3, "time": 0.2}
CAUSAL = CausalConfig(frames_per_block=2)


def cached(params, x, timestep, text_cache, cache):
    """v = own x + time sigma + text + context * memory; the block writes ``key * its frame mean + sigma``."""
    sigma = timestep[:, :, None, None, None] / 1000
    velocity = params["own"] * x + params["time"] * sigma + text_cache + params["context"] * cache["memory"]
    return velocity, cache | {"block": params["key"] * x.mean(1, keepdims=True) + sigma[:, :1]}


@pytest.fixture(autouse=True)
def toy(request, monkeypatch):
    """Replace the transformer by the toy student, except in tests of the real one."""
    if "real" in request.node.name:
        return
    jax.clear_caches()
    empty = jnp.zeros((2, 1, *SHAPE[2:]))
    for module, functions in (
        (
            rollout.transformer,
            {
                "cached": lambda *inputs, config, causal: cached(*inputs),
                "encode_text": lambda params, text, *, config: params["text"] * text[:, :, None, None],
                "init_cache": lambda *_, **__: {"memory": empty, "block": empty},
            },
        ),
        (
            rollout.kv_cache,
            {"advance": lambda cache, frames: cache | {"memory": cache["memory"] + frames * cache["block"]}},
        ),
        (
            rollout.cache_undo,
            {
                "overwritten": lambda cache, frames, causal: cache,
                "undo": lambda cache, replaced, frames, causal: replaced,
            },
        ),
    ):
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)


@functools.partial(jax.jit, static_argnames=("shape", "causal"))
def rolled(params, key, exit_step=None, shape=SHAPE, causal=CAUSAL, **context):
    settings = rollout.Rollout(TransformerConfig(), causal, TIMESTEPS)
    return rollout.self_rollout(settings, params, TEXT, key, shape=shape, exit_step=exit_step, **context)


def by_hand(key, exit_step, causal=CAUSAL, past=None):
    """x0, and the derivative of x0 by every parameter when earlier blocks and earlier steps are constants."""
    noise_key = jax.random.split(key)[1]
    text = PARAMS["text"] * TEXT[:, :, None, None]
    memory, outputs, slopes = np.zeros((2, 1, *SHAPE[2:])), [], []
    if past is not None:  # blocks of two frames, each written once
        written = PARAMS["key"] * past.reshape(2, -1, 2, *SHAPE[2:]).mean(2) + causal.context_noise / 1000
        memory = 2 * written.sum(1, keepdims=True)
    for i, size in enumerate(causal.block_sizes(SHAPE[1])):
        block_key = jax.random.fold_in(noise_key, i)

        def noise(step, block_key=block_key, size=size):
            return np.asarray(jax.random.normal(jax.random.fold_in(block_key, step), (2, size, *SHAPE[2:])), np.float64)

        x = noise(0)
        for j in range(exit_step + 1):
            s = TIMESTEPS[j] / 1000
            velocity = PARAMS["own"] * x + PARAMS["time"] * s + text + PARAMS["context"] * memory
            x0 = x - s * velocity
            written = PARAMS["key"] * x.mean(1, keepdims=True) + s
            if j < exit_step:
                s = TIMESTEPS[j + 1] / 1000
                x = (1 - s) * x0 + s * noise(j + 1)
        ones = np.ones_like(x)
        parts = {
            "own": x,
            "context": memory * ones,
            "key": 0 * x,
            "text": TEXT[:, :, None, None] * ones,
            "time": s * ones,
        }
        slopes.append({name: -s * part for name, part in parts.items()})
        outputs.append(x0)
        if causal.context_pass:
            written = PARAMS["key"] * x0.mean(1, keepdims=True) + causal.context_noise / 1000
        memory = memory + size * written
    return np.concatenate(outputs, 1), {k: np.concatenate([s[k] for s in slopes], 1) for k in PARAMS}


@pytest.mark.parametrize(
    "exit_step,causal",
    [
        (0, CAUSAL),
        (2, CAUSAL),
        (1, CausalConfig(frames_per_block=2, context_pass=False)),
        (1, CausalConfig(frames_per_block=5, independent_first_frame=True, context_noise=100.0)),
        (2, CausalConfig(frames_per_block=6)),
    ],
)
def test_self_rollout_and_its_gradient_match_the_loop(exit_step, causal):
    key = jax.random.key(7)
    weight = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)

    def loss(params):
        x0 = rolled(params, key, exit_step, causal=causal)
        return jnp.sum(weight * x0), x0

    (_, x0), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    expected, slopes = by_hand(key, exit_step, causal)
    np.testing.assert_allclose(x0, expected, atol=2e-5)
    for name in PARAMS:
        np.testing.assert_allclose(gradient[name], (weight * slopes[name]).sum(), atol=2e-4, err_msg=name)


@pytest.mark.parametrize("shown", [True, False])
def test_rollout_from_a_past_matches_the_loop(shown):
    key, causal = jax.random.key(11), CausalConfig(frames_per_block=2, context_noise=50.0)
    past = np.random.default_rng(4).standard_normal((2, 4, *SHAPE[2:])).astype(np.float32)

    def loss(params):
        x0 = rolled(params, key, 1, causal=causal, context=past, has_context=shown)
        return x0.sum(), x0

    (_, x0), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    expected, slopes = by_hand(key, 1, causal, past if shown else None)
    np.testing.assert_allclose(x0, expected, atol=3e-5)
    for name in PARAMS:
        np.testing.assert_allclose(gradient[name], slopes[name].sum(), rtol=2e-4, atol=2e-4, err_msg=name)
    np.testing.assert_array_equal(gradient["key"], 0)


def test_past_of_part_of_a_block_is_refused():
    with pytest.raises(ConfigError, match="context has 3 latent frames; it must have a multiple of 2"):
        rolled(PARAMS, jax.random.key(0), context=jnp.zeros((2, 3, *SHAPE[2:])))


def test_no_gradient_through_the_cache_though_the_output_depends_on_it():
    """``key`` acts through the cache alone: later blocks move with it, and its gradient is exactly zero."""
    key = jax.random.key(0)
    moved = rolled(PARAMS | {"key": 1.0}, key, 2) - rolled(PARAMS, key, 2)
    np.testing.assert_array_equal(moved[:, :2], 0)
    assert np.abs(moved[:, 2:]).max() > 0.01
    jacobian = jax.jit(jax.jacrev(lambda p: rolled(p, key, 2)[0, :, 0, 0, 0]))(PARAMS)
    np.testing.assert_array_equal(jacobian["key"], 0)
    assert np.all(np.asarray(jacobian["own"]) != 0)


def test_context_is_constant_for_later_blocks():
    """d(last block)/d(own) is what its exit step alone gives: the blocks before it are constants."""
    key = jax.random.key(3)
    gradient = jax.jit(jax.grad(lambda p: rolled(p, key, 1)[:, 4:].sum()))(PARAMS)
    slopes = by_hand(key, 1)[1]
    for name in PARAMS:
        np.testing.assert_allclose(gradient[name], slopes[name][:, 4:].sum(), rtol=1e-4, atol=1e-5)


def test_noise_depends_on_the_block_alone():
    key = jax.random.key(5)
    longer = rolled(PARAMS, key, shape=(2, 10, *SHAPE[2:]))
    np.testing.assert_array_equal(longer[:, :6], rolled(PARAMS, key))
    blocks = np.asarray(longer).reshape(2, 5, -1)
    assert len(np.unique(blocks[:, :, 0])) == 10


def test_exit_step_is_uniform_and_no_pass_is_wasted(monkeypatch):
    calls = []

    def counted(params, x, timestep, text_cache, cache, *, config, causal):
        jax.debug.callback(lambda t: calls.append(float(t)), timestep[0, 0])
        return cached(params, x, timestep, text_cache, cache)

    monkeypatch.setattr(rollout.transformer, "cached", counted)
    settings = rollout.Rollout(TransformerConfig(), CAUSAL, TIMESTEPS)
    run = jax.jit(lambda key: rollout.self_rollout(settings, PARAMS, TEXT, key, shape=SHAPE))
    exits = []
    for seed in range(60):
        calls.clear()
        jax.block_until_ready(run(jax.random.key(seed)))
        jax.effects_barrier()
        exits.append(len(calls) // 3 - 1)  # 3 blocks of exit + 1 denoising passes; all but the last write the cache
        assert sorted(calls) == sorted([*TIMESTEPS[: exits[-1] + 1] * 3, 0.0, 0.0])
    assert np.bincount(exits, minlength=3).min() >= 10


def test_data_rollout_noises_each_block_to_its_own_timestep():
    latents = np.random.default_rng(2).standard_normal((64, 7, 2, 1, 3)).astype(np.float32)
    sizes = CausalConfig(frames_per_block=2, independent_first_frame=True).block_sizes(7)
    key, seen = jax.random.key(1), {}

    def network(params, x, timestep, text):
        seen.update(x=np.asarray(x), timestep=np.asarray(timestep))
        return params * x

    x0, noisy = rollout.data_rollout(
        network, 0.5, latents, None, key, timesteps=TIMESTEPS, block_sizes=sizes, include_clean=True
    )
    timestep = seen["timestep"]
    np.testing.assert_array_equal(noisy, timestep > 0)
    np.testing.assert_array_equal(timestep[:, 1::2], timestep[:, 2::2])
    assert set(np.unique(timestep)) == {0.0, 500.0, 800.0, 1000.0}
    assert np.corrcoef(np.asarray(timestep)[:, [0, 1, 3, 5]].T)[~np.eye(4, dtype=bool)].max() < 0.4
    sigma = np.asarray(timestep)[:, :, None, None, None] / 1000
    noise = np.asarray(jax.random.normal(jax.random.split(key)[1], latents.shape))
    np.testing.assert_allclose(seen["x"], (1 - sigma) * latents + sigma * noise, atol=1e-6)
    np.testing.assert_allclose(x0, seen["x"] * (1 - 0.5 * sigma), atol=1e-6)
    clean = np.asarray(timestep) == 0
    np.testing.assert_array_equal(np.asarray(x0)[clean], latents[clean])

    _, noisy = rollout.data_rollout(
        network, 0.5, latents, None, key, timesteps=TIMESTEPS, block_sizes=sizes, include_clean=False
    )
    assert np.all(noisy) and seen["timestep"].min() == 500
    with pytest.raises(ConfigError, match="do not add up to 7"):
        rollout.data_rollout(
            network, 0.5, latents, None, key, timesteps=TIMESTEPS, block_sizes=(3, 3), include_clean=False
        )


def test_unfit_clip_is_refused():
    with pytest.raises(ConfigError, match="5 latent frames do not fit"):
        rolled(PARAMS, jax.random.key(0), shape=(2, 5, *SHAPE[2:]))


NETWORK = TransformerConfig(
    dim=16, ffn_dim=16, num_heads=2, num_layers=1, in_channels=3, out_channels=3, text_dim=5, text_length=4, freq_dim=8
)


def unrolled(params, text, key, exit_steps, causal, context, keep=jax.lax.stop_gradient, lists=(TIMESTEPS,) * 2):
    """The self rollout of the real network as a plain loop, for autodiff; ``keep`` makes every cache a constant.

    ``lists`` are the timesteps of every block.
    """
    stop, most = jax.lax.stop_gradient, max(map(len, (*lists, TIMESTEPS)))
    text_cache = transformer.encode_text(params, text, config=NETWORK)
    frames, noise_key = 4, jax.random.split(key)[1]
    cache = transformer.init_cache(NETWORK, causal, batch=2, height=4, width=4, frames=frames)

    def forward(x, timestep, cache):
        timestep = jnp.full(x.shape[:2], timestep, jnp.float32)
        return transformer.cached(params, x, timestep, text_cache, keep(cache), config=NETWORK, causal=causal)

    level = causal.context_noise / 1000 * (causal.add_context_noise != "never")
    if context is not None:
        noise = jax.random.normal(jax.random.fold_in(noise_key, frames // 2), context.shape)
        context = (1 - level) * context + level * noise
    for latents in [] if context is None else jnp.split(context, context.shape[1] // 2, axis=1):
        cache = kv_cache.advance(forward(latents, causal.context_noise, cache)[1], 2)
    outputs = []
    for i in range(frames // 2):
        block_key, timesteps = jax.random.fold_in(noise_key, i), lists[i]
        x = jax.random.normal(jax.random.fold_in(block_key, 0), (2, 2, 4, 4, 3))
        for j in range(exit_steps[i] + 1):
            velocity, cache = forward(stop(x), timesteps[j], cache)
            x0 = stop(x) - timesteps[j] / 1000 * velocity
            if j < exit_steps[i]:
                sigma = timesteps[j + 1] / 1000
                x = (1 - sigma) * x0 + sigma * jax.random.normal(jax.random.fold_in(block_key, j + 1), x.shape)
        if causal.context_pass:
            noise = jax.random.normal(jax.random.fold_in(block_key, most), x.shape)
            _, cache = forward(stop((1 - level) * x0 + level * noise), causal.context_noise, cache)
        cache = kv_cache.advance(cache, 2)
        outputs.append(x0)
    return jnp.concatenate(outputs, axis=1)


PLAIN = CausalConfig(frames_per_block=2)
WINDOW = CausalConfig(frames_per_block=2, window=4, sink=2, context_noise=60.0, add_context_noise="training")
NOISY = dataclasses.replace(WINDOW, sink=0)
NO_PASS = CausalConfig(frames_per_block=2, window=4, positions="relative", context_pass=False)
FIRST = ((1000.0, 900.0, 700.0, 400.0), (1000.0, 600.0))
"""Timesteps of the two blocks in the case with noise, where each block has an exit step of its own."""


@pytest.mark.parametrize(
    "causal,context_frames,method",
    [(PLAIN, 0, "replay"), (WINDOW, 4, "stop"), (WINDOW, 4, "replay"), (NOISY, 0, "replay"), (NO_PASS, 2, "stop")],
    ids=["plain, replay", "window, stop", "window, replay", "noise and own steps, replay", "no pass, stop"],
)
def test_real_rollout_and_its_gradient_equal_autodiff_of_the_unrolled_loop(causal, context_frames, method):
    """Replay adds the gradient through all keys and values. The latents that pass from block to block are constants."""
    rng = np.random.default_rng(0)
    params = tiny.random_transformer(NETWORK)
    text = rng.standard_normal((2, 4, 5)).astype(np.float32)
    context = rng.standard_normal((2, context_frames, 4, 4, 3)).astype(np.float32) if context_frames else None
    weight = rng.standard_normal((2, 4, 4, 4, 3)).astype(np.float32)
    own = causal == NOISY
    settings, lists = rollout.Rollout(NETWORK, causal, TIMESTEPS), (TIMESTEPS,) * 2
    if own:
        settings, lists = dataclasses.replace(settings, exit_steps="per_block", first_timesteps=FIRST), FIRST

    def exits_of(key):
        return [int(i) for i in rollout.exit_steps_of(settings, key, 4, None if own else 1)]

    # With exit steps of their own: the last of the first block's four, and the last of the two of the other.
    exits = [3, 1] if own else [1, 1]
    key = next(key for key in map(jax.random.key, range(99)) if exits_of(key) == exits)
    run, keep = rollout.self_rollout, jax.lax.stop_gradient
    if method == "replay":
        run, keep = replay.replay_rollout, lambda x: x

    def product(params):
        x0 = run(settings, params, text, key, shape=weight.shape, exit_step=None if own else 1, context=context)
        return jnp.sum(weight * x0), x0

    def oracle(params):
        x0 = unrolled(params, text, key, exits, causal, context, keep, lists)
        return jnp.sum(weight * x0), x0

    compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # in half the time
    (_, x0), gradient = compiled(jax.value_and_grad(product, has_aux=True))(params)
    (_, expected), slopes = compiled(jax.value_and_grad(oracle, has_aux=True))(params)
    np.testing.assert_allclose(x0, expected, atol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    assert scale > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), gradient, slopes)


def test_real_rollout_that_continues_without_a_window_keeps_every_frame():
    """A window as long as context and clip hides nothing, so it gives the same as no window."""
    params, text = tiny.random_transformer(NETWORK), np.ones((2, 4, 5), np.float32)
    past = np.random.default_rng(0).standard_normal((2, 2, 4, 4, 3)).astype(np.float32)
    options = {"shape": (2, 2, 4, 4, 3), "context": past, "exit_step": 0}

    @functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    def run(causal, params):
        settings = rollout.Rollout(NETWORK, causal, TIMESTEPS)
        return rollout.self_rollout(settings, params, text, jax.random.key(1), **options)

    plain, window = (run(causal, params) for causal in (PLAIN, CausalConfig(frames_per_block=2, window=4)))
    np.testing.assert_allclose(plain, window, atol=1e-5)


@pytest.mark.parametrize("exit_step,lists,most", [(3, (), 2), (-1, (), 2), (2, FIRST, 1)])
def test_an_exit_step_outside_the_timesteps_is_refused(exit_step, lists, most):
    settings = exit_steps.Rollout(NETWORK, PLAIN, TIMESTEPS, lists)
    with pytest.raises(ConfigError, match=f"exit_step is {exit_step}; .* the steps 0 to {most}"):
        exit_steps.exit_steps_of(settings, jax.random.key(0), 4, exit_step)
    exit_steps.exit_steps_of(settings, jax.random.key(0), 4, most)


def test_real_replay_repeats_the_rollout_whether_or_not_it_continues():
    settings, params = rollout.Rollout(NETWORK, WINDOW, TIMESTEPS), tiny.random_transformer(NETWORK)
    text, past = np.ones((2, 4, 5), np.float32), np.ones((2, 2, 4, 4, 3), np.float32)
    results = {}
    for continued in (True, False):
        options = {"shape": (2, 8, 4, 4, 3), "context": past, "has_context": jnp.array(continued)}
        rolled_out = rollout.self_rollout(settings, params, text, jax.random.key(1), **options)
        results[continued] = replay.replay_rollout(settings, params, text, jax.random.key(1), **options)
        np.testing.assert_allclose(results[continued], rolled_out, atol=1e-5)
    assert np.abs(results[True] - results[False]).max() > 0.1
    moved = dataclasses.replace(settings, causal=dataclasses.replace(WINDOW, positions="relative"))
    with pytest.raises(ConfigError, match="a rollout ends at latent frame 8; .* moves its sink after 6 frames"):
        replay.replay_rollout(moved, params, text, jax.random.key(1), shape=(2, 8, 4, 4, 3))


@pytest.mark.parametrize(
    "mode,expected",
    [("shared", [1 / 3] * 3), ("per_block", [1 / 3] * 3), ("last", [0, 0, 1]), ("first_block", [0, 0, 1])],
)
def test_exit_steps_have_their_distribution(mode, expected):
    settings = rollout.Rollout(NETWORK, PLAIN, TIMESTEPS, exit_steps=mode)
    keys = jax.random.split(jax.random.key(0), 900)
    exits = np.asarray(jax.vmap(lambda key: exit_steps.draw_exit_steps(settings, key, 4))(keys))
    np.testing.assert_allclose(np.bincount(exits[:, 2], minlength=3) / 900, expected, atol=0.05)
    first = [0, 0, 1] if mode == "last" else [1 / 3] * 3
    np.testing.assert_allclose(np.bincount(exits[:, 0], minlength=3) / 900, first, atol=0.05)
    same = (exits[:, 1] == exits[:, 2]).mean()
    assert abs(same - (1 / 3 if mode == "per_block" else 1)) < 0.05


@pytest.mark.parametrize("mode,random", [("shared", [0, 1]), ("per_block", [0, 1]), ("last", []), ("first_block", [0])])
def test_first_blocks_draw_from_lists_of_their_own(mode, random):
    """Blocks of 4, 2, 3 and 3 steps; a rollout that continues another has none of its own."""
    settings = rollout.Rollout(NETWORK, PLAIN, TIMESTEPS, FIRST, mode)
    keys = jax.random.split(jax.random.key(0), 900)
    exits = np.asarray(jax.vmap(lambda key: exit_steps.draw_exit_steps(settings, key, 4))(keys))
    for block, steps in enumerate((4, 2)):
        expected = np.full(steps, 1 / steps) if block in random else np.eye(steps)[-1]
        np.testing.assert_allclose(np.bincount(exits[:, block], minlength=steps) / 900, expected, atol=0.05)
    plain = dataclasses.replace(settings, first_timesteps=())
    later = jax.vmap(lambda key: exit_steps.draw_exit_steps(plain, key, 4))(keys)
    np.testing.assert_array_equal(exits[:, 2:], later[:, 2:])
    continued = jax.vmap(lambda key: exit_steps.draw_exit_steps(settings, key, 4, jnp.array(True)))(keys)
    np.testing.assert_array_equal(continued, later)

    rows = [[1000, 900, 700, 400], [1000, 600, 0, 0], [1000, 800, 500, 0], [1000, 800, 500, 0]]
    np.testing.assert_array_equal(exit_steps.timestep_table(settings, 4), rows)
    np.testing.assert_array_equal(exit_steps.timestep_table(settings, 1), rows[:1])
    np.testing.assert_array_equal(exit_steps.timestep_table(settings, 4, jnp.array(True)), [rows[2]] * 4)
