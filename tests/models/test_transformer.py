"""The transformer: parity with diffusers, and equalities between the three forward modes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import make_image_branch
import make_transformer
import numpy as np
import pytest

from causvid_jax.checkpoints import load
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import CausalConfig, ConfigError, TransformerConfig
from causvid_jax.models import attention, kv_cache, rope, transformer, unstacked

CONFIG = TransformerConfig(
    dim=40, ffn_dim=48, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=10, text_length=6
)
BATCH, HEIGHT, WIDTH = 2, 4, 4


@pytest.fixture(scope="module")
def params():
    """Return parameters that are all random, also the head and the modulation tables."""
    shapes = network_of(CONFIG).shapes(CONFIG, "original")
    state = make_transformer.random_weights(shapes, 1)
    return load(state, config=CONFIG)[0]


def inputs(frames: int, seed: int = 0):
    """Return latents, timesteps that are equal inside blocks of three frames, and text."""
    x_key, t_key, text_key = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(x_key, (BATCH, frames, HEIGHT, WIDTH, CONFIG.in_channels))
    t = jnp.repeat(jax.random.uniform(t_key, (BATCH, -(-frames // 3)), maxval=1000.0), 3, axis=1)[:, :frames]
    return x, t, jax.random.normal(text_key, (BATCH, CONFIG.text_length, CONFIG.text_dim))


@functools.partial(jax.jit, static_argnames=("causal",))
def block_causal(params, x, t, text, clean=None, *, causal):
    return transformer.block_causal(params, x, t, text, config=CONFIG, causal=causal, clean=clean)


@functools.partial(jax.jit, static_argnames=("causal",))
def cached(params, x, t, text_cache, cache, *, causal):
    return transformer.cached(params, x, t, text_cache, cache, config=CONFIG, causal=causal)


@functools.partial(jax.jit)
def bidirectional(params, x, t, text):
    return transformer.bidirectional(params, x, t, text, config=CONFIG)


def stream(params, x, t, text, causal):
    """Return the velocity of every block, one pass each through the cache."""
    text_cache = transformer.encode_text(params, text, config=CONFIG)
    size = {"batch": BATCH, "height": HEIGHT, "width": WIDTH, "frames": x.shape[1]}
    cache = transformer.init_cache(CONFIG, causal, **size, unstacked=isinstance(params["blocks"], tuple))
    outputs, start = [], 0
    for size in causal.block_sizes(x.shape[1]):
        part = slice(start, start + size)
        velocity, cache = cached(params, x[:, part], t[:, part], text_cache, cache, causal=causal)
        cache, start = transformer.advance(cache, size), start + size
        outputs.append(velocity)
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("golden", [make_transformer, make_image_branch], ids=["text", "image branch"])
def test_equals_diffusers(golden):
    arrays = dict(np.load(golden.GOLDEN))
    config = TransformerConfig(**golden.SIZES)
    state = make_transformer.random_weights(network_of(config).shapes(config, "diffusers"), golden.SEED)
    assert 0.5 < arrays["velocity"].std() < 2
    assert golden.error_of(state, arrays) <= 5e-5


def test_init_has_the_abstract_shapes_and_a_zero_head():
    fresh = transformer.init(jax.random.key(0), CONFIG)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), transformer.abstract(CONFIG))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == shapes
    assert not bidirectional(fresh, *inputs(3)).any()
    # Layers must not start equal.
    q = fresh["blocks"]["self_attn"]["q"]["kernel"]
    assert jnp.abs(q[0] - q[1]).max() > 0.1


CAUSALS = [
    CausalConfig(3),
    CausalConfig(2, independent_first_frame=True),
    CausalConfig(3, window=6),
    CausalConfig(3, window=3, sink=2),
    CausalConfig(3, window=4, sink=1),
]


@pytest.mark.parametrize("causal", CAUSALS, ids=str)
def test_cached_equals_block_causal(params, causal):
    x, t, text = inputs(9)
    if causal.independent_first_frame:
        t = jnp.concatenate([t[:, :1], jnp.repeat(t[:, ::2][:, :4], 2, axis=1)], axis=1)
    np.testing.assert_allclose(
        stream(params, x, t, text, causal), block_causal(params, x, t, text, causal=causal), atol=1e-5
    )


@pytest.mark.parametrize("causal", [CausalConfig(3, window=6), CausalConfig(3, window=6, sink=3)], ids=str)
def test_ring_cache_equals_the_masked_computation_far_past_the_wrap(params, causal):
    """24 blocks through 6 (and 9) slots, against one pass under an explicit frame-by-frame mask."""
    frames = 72
    x, t, text = inputs(frames)
    ends = (np.arange(frames) // 3 + 1) * 3
    key = np.arange(frames)
    mask = (key < ends[:, None]) & ((key >= ends[:, None] - causal.window) | (key < causal.sink))  # [query, key]

    tokens = (HEIGHT // 2) * (WIDTH // 2)
    full = jnp.asarray(np.kron(mask, np.ones((tokens, tokens), bool)))
    rotation = rope.rotation(jnp.arange(frames), 2, 2, head_dim=CONFIG.head_dim, theta=CONFIG.rope_theta)

    def masked(q, k, v, _):
        q, k = (rope.rotate(z, rotation).reshape(BATCH, -1, CONFIG.num_heads, CONFIG.head_dim) for z in (q, k))
        scores = jnp.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(CONFIG.head_dim)
        weights = jax.nn.softmax(jnp.where(full, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bnts,bsnd->btnd", weights, v.reshape(q.shape))
        return out.reshape(v.shape), None

    whole = jax.jit(lambda p: transformer._apply(p, CONFIG, masked, x, t, text)[0])(params)
    np.testing.assert_allclose(stream(params, x, t, text, causal), whole, atol=1e-5)


def test_first_block_equals_the_bidirectional_reading_of_it_alone(params):
    x, t, text = inputs(9)
    causal = block_causal(params, x, t, text, causal=CausalConfig(3))[:, :3]
    np.testing.assert_allclose(causal, bidirectional(params, x[:, :3], t[:, :3], text), atol=1e-5)


@pytest.mark.parametrize("causal", CAUSALS, ids=str)
def test_no_gradient_from_the_past_to_the_future(params, causal):
    x, t, text = inputs(9)
    end = 0
    for size in causal.block_sizes(9)[:-1]:
        end += size

        def past(x, t, end=end):
            return jnp.sum(block_causal(params, x, t, text, causal=causal)[:, :end] ** 2)

        gradients = jax.grad(past, argnums=(0, 1))(x, t)
        for gradient in gradients:
            assert not np.asarray(gradient[:, end:]).any()
            assert np.asarray(gradient[:, end - 1]).any()


def test_a_window_as_long_as_the_clip_changes_nothing(params):
    x, t, text = inputs(9)
    plain = block_causal(params, x, t, text, causal=CausalConfig(3))
    np.testing.assert_array_equal(block_causal(params, x, t, text, causal=CausalConfig(3, window=9)), plain)
    np.testing.assert_allclose(stream(params, x, t, text, CausalConfig(3, window=9)), plain, atol=1e-5)


def test_one_block_of_the_whole_clip_is_the_bidirectional_reading(params):
    x, t, text = inputs(6)
    one = block_causal(params, x, t, text, causal=CausalConfig(6))
    np.testing.assert_allclose(one, bidirectional(params, x, t, text), atol=1e-5)


@pytest.mark.parametrize("causal", [CausalConfig(3), CausalConfig(3, window=6, sink=1)], ids=str)
def test_teacher_forcing_equals_streaming_over_a_clean_cache(params, causal):
    """Noisy blocks that attend to cached *clean* blocks, one by one, equal one pass of teacher forcing."""
    noise = 150.0 if causal.window else 0.0  # of the context
    x, t, text = inputs(9)
    clean = inputs(9, seed=7)[0]
    text_cache = transformer.encode_text(params, text, config=CONFIG)
    cache = transformer.init_cache(CONFIG, causal, batch=BATCH, height=HEIGHT, width=WIDTH, frames=9)
    outputs = []
    for start in range(0, 9, 3):
        part = slice(start, start + 3)
        velocity, cache = cached(params, x[:, part], t[:, part], text_cache, cache, causal=causal)
        _, cache = cached(params, clean[:, part], 0 * t[:, part] + noise, text_cache, cache, causal=causal)
        cache = transformer.advance(cache, 3)
        outputs.append(velocity)
    forced = transformer.block_causal(
        params, x, t, text, config=CONFIG, causal=causal, clean=clean, clean_timestep=noise
    )
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), forced, atol=1e-5)


def test_teacher_forcing_of_one_block_costs_no_clean_copy(params):
    """The first block has no past, so it has the same bits and FLOPs as without a clean copy."""
    x, t, text = inputs(3)
    clean = inputs(3, seed=7)[0]
    causal = CausalConfig(3, window=9)
    plain = block_causal(params, x, t, text, causal=causal)
    np.testing.assert_array_equal(block_causal(params, x, t, text, clean, causal=causal), plain)
    flops = [
        block_causal.lower(params, x, t, text, copy, causal=causal).compile().cost_analysis()["flops"]
        for copy in (None, clean)
    ]
    assert flops[0] == flops[1]


def test_clean_copies_that_do_not_fit_are_refused(params):
    """Fewer copies than frames would be left out without a word; a past of part of a block has no plan."""
    x, t, text = inputs(6)
    with pytest.raises(ConfigError, match="3 latent frames, fewer than the 6 noisy"):
        block_causal(params, x, t, text, inputs(3)[0], causal=CausalConfig(3))
    with pytest.raises(ConfigError, match="11 clean frames with 6 noisy ones: .* frame 5; blocks begin at 0, 1, 6"):
        block_causal(params, x, t, text, inputs(11)[0], causal=CausalConfig(5, independent_first_frame=True))


def test_a_rewritten_block_leaves_no_trace(params):
    """Denoising steps of one block overwrite each other, so the cache depends on the last one alone."""
    x, t, text = inputs(6)
    causal = CausalConfig(3, window=6)
    text_cache = transformer.encode_text(params, text, config=CONFIG)
    cache = transformer.init_cache(CONFIG, causal, batch=BATCH, height=HEIGHT, width=WIDTH)
    _, once = cached(params, x[:, :3], t[:, :3], text_cache, cache, causal=causal)
    _, twice = cached(params, x[:, 3:], t[:, :3], text_cache, cache, causal=causal)
    _, twice = cached(params, x[:, :3], t[:, :3], text_cache, twice, causal=causal)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_relative_positions_keep_a_sink_at_a_fixed_distance(params):
    """With a sink, a block far into a stream with relative positions equals the first one after the window moved."""
    causal = CausalConfig(3, window=6, sink=3, positions="relative")
    frame = jnp.array([0, 1, 2, 33, 34, 35, 30, 31, 32])
    positions = kv_cache.read_positions(frame, jnp.int32(33), 3, causal)
    np.testing.assert_array_equal(positions, [-6, -5, -4, 0, 1, 2, -3, -2, -1])
    absolute = kv_cache.read_positions(frame, jnp.int32(33), 3, dataclasses.replace(causal, positions="absolute"))
    np.testing.assert_array_equal(absolute, frame - 33)
    # Before the window has left the sink behind, both are the same.
    early = jnp.array([0, 1, 2, 3, 4, 5, -1, -1, -1])
    np.testing.assert_array_equal(kv_cache.read_positions(early, jnp.int32(3), 3, causal), early - 3)


def test_rope_has_no_length_limit_and_depends_on_differences_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 3, 4, 2, 20)) for i in range(2))

    def scores(offset):
        rotation = rope.rotation(jnp.arange(3) + offset, 2, 2, head_dim=20, theta=10000.0)
        return jnp.einsum("bfnhd,bgmhd->bhfngm", rope.rotate(q, rotation), rope.rotate(k, rotation))

    np.testing.assert_allclose(scores(5000), scores(0), atol=2e-3)
    np.testing.assert_allclose(scores(20), scores(0), atol=2e-5)


def test_rope_equals_complex_multiplication():
    """Compare with interleaved pairs as complex numbers and frequencies by the formula, split 22/21/21 at D = 128."""
    assert rope.axis_pairs(128) == (22, 21, 21)
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 1, 20))
    positions = np.array([3, 11])
    angle = np.zeros((2, 6, 10))
    for f in range(2):
        for n in range(6):
            place = (positions[f], n // 3, n % 3)
            parts = [p * 50.0 ** (-np.arange(c) / c) for p, c in zip(place, (4, 3, 3), strict=True)]
            angle[f, n] = np.concatenate(parts)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[None, :, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    ours = rope.rotate(jnp.asarray(x), rope.rotation(jnp.asarray(positions), 2, 3, head_dim=20, theta=50.0))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_bfloat16_gradients_follow_float32(params):
    x, t, text = inputs(6)

    def loss(params, dtype):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        return jnp.mean(transformer.bidirectional(params, x, t, text, config=config) ** 2)

    exact, rounded = (jax.jit(jax.grad(loss), static_argnums=1)(params, d) for d in ("float32", "bfloat16"))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert jnp.linalg.norm(a - b) <= 0.05 * jnp.linalg.norm(a) + 1e-6


def test_gradient_equals_finite_differences(params):
    x, t, text = inputs(3)
    direction = jax.tree.map(lambda p: jnp.sign(jax.random.normal(jax.random.key(p.size), p.shape)), params)

    @jax.jit
    def loss(amount):
        moved = jax.tree.map(lambda p, d: p + amount * d, params, direction)
        return jnp.mean(bidirectional(moved, x, t, text) ** 2)

    step = 1e-3
    estimate = (loss(step) - loss(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(0.0), estimate, rtol=2e-2)


def test_visible_frames():
    causal = CausalConfig(3, window=6, sink=2)
    assert attention.visible_frames(6, causal) == [(0, 6)]
    assert attention.visible_frames(9, causal) == [(0, 2), (3, 9)]
    assert attention.visible_frames(7, CausalConfig(3, window=6, sink=2)) == [(0, 1), (1, 7)]


def test_a_cache_without_window_needs_a_length():
    with pytest.raises(ConfigError, match="frames is .*; a cache without a window needs its length in latent frames"):
        transformer.init_cache(CONFIG, CausalConfig(3), batch=1, height=4, width=4)


@pytest.mark.parametrize("causal", [*CAUSALS[2:4], CausalConfig(3, window=3, sink=2, positions="relative")], ids=str)
def test_layers_of_their_own_compute_what_stacked_ones_do(params, causal):
    """Compare every forward mode and cache slot; only the order of columns in a head and the rounding may differ."""
    x, t, text = inputs(9)
    own = transformer.unstack(params, CONFIG)
    assert len(own["blocks"]) == CONFIG.num_layers
    assert sum(leaf.size for leaf in jax.tree.leaves(own)) == sum(leaf.size for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(stream(own, x, t, text, causal), stream(params, x, t, text, causal), atol=1e-5)
    np.testing.assert_allclose(bidirectional(own, x, t, text), bidirectional(params, x, t, text), atol=1e-5)
    shapes = transformer.inference(CONFIG, unstacked=True)
    assert jax.tree.map(lambda a: a.shape, own) == jax.tree.map(lambda a: a.shape, shapes)


def test_a_cpu_splits_layers_without_compiling(params, monkeypatch):
    """The seven programs of the digits student took 0.2 s of its start. Inside jit the compiled form is used."""
    params = jax.tree.map(jnp.asarray, params)
    compiled = jax.jit(lambda params: transformer.unstack(params, CONFIG))(params)
    monkeypatch.setattr(unstacked, "_split_on_device", lambda *_: pytest.fail("compiled"))
    jax.tree.map(np.testing.assert_array_equal, transformer.unstack(params, CONFIG), compiled)
    for placed in (params, jax.device_put(params, jax.devices()[-1])):  # other placements would compile anew
        own, given = (jax.tree.leaves(tree["blocks"])[0] for tree in (transformer.unstack(placed, CONFIG), placed))
        assert (own.sharding, own.committed) == (given.sharding, given.committed)


def test_layers_of_their_own_are_traced_once(params, monkeypatch):
    """The time until a stream starts must not grow with the number of layers: 30 or 40 in published models."""
    calls, block = [], transformer.block
    monkeypatch.setattr(transformer, "block", lambda *args: calls.append(args) or block(*args))
    own, causal = transformer.unstack(params, CONFIG), CAUSALS[2]
    x, t, text = inputs(3)
    size = {"batch": BATCH, "height": HEIGHT, "width": WIDTH, "frames": 9, "unstacked": True}
    cache = transformer.init_cache(CONFIG, causal, **size)
    step = functools.partial(transformer.cached, config=CONFIG, causal=causal)
    jax.jit(step).lower(own, x, t, transformer.encode_text(own, text, config=CONFIG), cache)
    assert len(own["blocks"]) == CONFIG.num_layers > 1 and len(calls) == 1


def test_a_stream_of_a_million_frames_is_as_exact_as_its_first():
    """The product of a rotated key and query depends on their distance alone, with the angle of float64."""
    grid = {"rows": 2, "columns": 3, "head_dim": 24, "theta": 10000.0}
    distance, frequencies = 20, 10000.0 ** (-np.arange(4) / 4)
    for start in (0, 1_000_000):
        rotations = (rope.stream_rotation(jnp.asarray([start + d], jnp.int32), **grid) for d in (distance, 0))
        q, k = (np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64) for cos, sin in rotations)
        turned = (q * k.conj())[0, :, :4]
        exact = np.exp(1j * distance * frequencies)
        np.testing.assert_allclose(turned, np.broadcast_to(exact, turned.shape), atol=1e-6)
