"""Consistency losses against numpy and the exact consistency functions of Gaussian data; the blockwise tangent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import CausalConfig, TransformerConfig
from causvid_jax.diffusion import flow
from causvid_jax.distill import consistency
from causvid_jax.models import attention, layers, transformer
from causvid_jax.training.consistency import tangent_network
from tests import tiny

MEAN, STD, BLOCKS = 0.8, 0.5, (1, 2)
LATENTS = np.random.default_rng(0).standard_normal((4, 3, 2, 2, 2)).astype(np.float32)
KEY = jax.random.key(5)


gaussian = functools.partial(tiny.gaussian_velocity, mean=MEAN, std=STD)


def frames(values):
    return np.repeat(np.asarray(values, np.float64), BLOCKS, axis=1)[:, :, None, None, None]


def test_discrete_loss_is_zero_for_the_composed_euler_steps_and_matches_numpy():
    """Composed Euler steps of a linear teacher are the fixed point: x0_i = a_i x + b_i by backward recursion."""
    sigmas = flow.sigma_from_u(1 - np.arange(9) / 8, 3.0)
    a, b = np.ones(9), np.zeros(9)
    for i in reversed(range(8)):
        s, change = sigmas[i], sigmas[i + 1] - sigmas[i]
        gain = (s - (1 - s) * STD**2) / ((1 - s) ** 2 * STD**2 + s**2)
        slope, offset = 1 + change * gain, change * (-MEAN - gain * (1 - s) * MEAN)
        a[i], b[i] = a[i + 1] * slope, a[i + 1] * offset + b[i + 1]

    def exact(x, timestep):
        i = jnp.argmin(jnp.abs(timestep[..., None] / 1000 - sigmas), axis=-1)
        sigma = flow.expand(timestep / 1000, x)
        x0 = flow.expand(jnp.asarray(a)[i], x) * x + flow.expand(jnp.asarray(b)[i], x)
        return jnp.where(sigma > 0, (x - x0) / jnp.maximum(sigma, 1e-9), 0.0)

    options = {"sigmas": sigmas, "block_sizes": BLOCKS}
    loss, _ = consistency.discrete_loss(consistency.Networks(exact, exact, gaussian), LATENTS, KEY, **options)
    assert loss < 1e-10

    student, target = (lambda x, t: 0.3 * x), (lambda x, t: 0.6 * x)
    loss, _ = consistency.discrete_loss(consistency.Networks(student, target, gaussian), LATENTS, KEY, **options)
    step_key, noise_key = jax.random.split(KEY)
    step = np.asarray(jax.random.randint(step_key, (4, 2), 0, 8))
    s, after = frames(sigmas[step]), frames(sigmas[step + 1])
    x = (1 - s) * LATENTS + s * np.asarray(jax.random.normal(noise_key, LATENTS.shape))
    gain = (s - (1 - s) * STD**2) / ((1 - s) ** 2 * STD**2 + s**2)
    moved = x + (after - s) * (-MEAN + gain * (x - (1 - s) * MEAN))
    np.testing.assert_allclose(loss, np.mean((x * (1 - 0.3 * s) - moved * (1 - 0.6 * after)) ** 2), rtol=1e-4)


def trig_inputs():
    u_key, noise_key = jax.random.split(KEY)
    u = np.asarray(jax.random.uniform(u_key, (4, 2)), np.float64)
    s = frames(3 * u / (1 + 2 * u))
    t = np.arctan2(s, 1 - s)
    noise = np.asarray(jax.random.normal(noise_key, LATENTS.shape), np.float64)
    return t, np.cos(t) * LATENTS + np.sin(t) * noise, noise


def test_trig_velocity_of_the_true_noise_and_of_a_gaussian():
    t, x, noise = trig_inputs()
    perfect = consistency.trig_velocity(lambda x, _: noise - LATENTS, jnp.float32(x), jnp.float32(t[..., 0, 0, 0]))
    np.testing.assert_allclose(perfect, np.cos(t) * noise - np.sin(t) * LATENTS, atol=2e-6)
    F = consistency.trig_velocity(gaussian, jnp.float32(x), jnp.float32(t[..., 0, 0, 0]))
    variance = (np.cos(t) * STD) ** 2 + np.sin(t) ** 2
    x0 = MEAN + np.cos(t) * STD**2 / variance * (x - np.cos(t) * MEAN)
    np.testing.assert_allclose(F, (np.cos(t) * x - x0) / np.sin(t), atol=1e-4)


def test_continuous_tangent_vanishes_for_the_consistency_function_and_matches_numpy():
    """The ODE of a Gaussian keeps ``(x - cos t MEAN) / deviation(t)``, so x0 is MEAN + STD times that."""
    t, x, _ = trig_inputs()
    angle = t[..., 0, 0, 0]

    def exact(x_t, timestep):
        sigma = flow.expand(timestep / 1000, x_t)
        x0 = MEAN + STD * (x_t - (1 - sigma) * MEAN) / jnp.sqrt(((1 - sigma) * STD) ** 2 + sigma**2)
        return (x_t - x0) / sigma

    networks = consistency.Networks(exact, exact, gaussian)
    inputs = jnp.float32(x), jnp.float32(angle)
    F = consistency.trig_velocity(exact, *inputs)
    g = consistency.continuous_tangent(networks, *inputs, F, 1.0)
    assert np.abs(g).max() < 2e-4
    assert np.abs(consistency.continuous_tangent(networks, *inputs, F, 0.5)).max() > 0.01

    # v = 0.3 x_t: F = (cos - sin + 0.3 d) d x with d = 1 / (cos + sin), whose tangent is a closed form.
    c, s, ratio = np.cos(t), np.sin(t), 0.7
    d = 1 / (c + s)
    slope = (c - s) * d + 0.3 * d**2
    d_slope = -2 * d**2 + 0.6 * d**3 * (s - c)  # of (c - s) / (c + s) and of 0.3 / (c + s)^2 by t
    teacher = np.asarray(consistency.trig_velocity(gaussian, *inputs))
    tangent = slope * c * s * teacher + d_slope * c * s * x
    expected = -c * np.sqrt(1 - (ratio * s) ** 2) * (slope * x - teacher) - ratio * (c * s * x + tangent)
    linear = consistency.Networks(lambda x, _: 0.3 * x, lambda x, _: 0.3 * x, gaussian)
    student = consistency.trig_velocity(linear.student, *inputs)
    np.testing.assert_allclose(consistency.continuous_tangent(linear, *inputs, student, ratio), expected, atol=2e-4)

    def loss(scale):
        moved = linear._replace(student=lambda x, t: scale * 0.3 * x)
        options = {"shift": 3.0, "block_sizes": BLOCKS, "ratio": ratio, "scale": 100.0}
        return consistency.continuous_loss(moved, LATENTS, KEY, **options)[0]

    value, slope_of_loss = jax.value_and_grad(loss)(1.0)
    by_block = lambda z: np.stack([part.sum((1, 2, 3, 4)) for part in np.split(z, [1], axis=1)], 1)  # noqa: E731
    norm = np.sqrt(by_block(expected**2))
    np.testing.assert_allclose(value, 100 * np.mean((norm / (norm + 0.1)) ** 2), rtol=1e-3)
    direction = by_block(expected * (0.3 * d**2 * x)) / (norm + 0.1)
    np.testing.assert_allclose(slope_of_loss, -200 * np.mean(direction), rtol=1e-3)


def test_the_tangent_of_blockwise_attention_is_that_of_the_dense_one(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    rng = np.random.default_rng(0)
    inputs, tangents = (
        tuple(jnp.asarray(rng.standard_normal((2, n, 2, 6)), jnp.float32) for n in (21, 30, 30)) for _ in range(2)
    )
    for mask in (None, jnp.arange(30) % 3 > 0):
        run = {
            name: jax.jvp(
                functools.partial(attention.dense, dtype="float32", backend=name, mask=mask), inputs, tangents
            )
            for name in ("xla", "blockwise")
        }
        for dense, blockwise in zip(run["xla"], run["blockwise"], strict=True):
            np.testing.assert_allclose(blockwise, dense, atol=2e-6)


NETWORK = TransformerConfig(
    **{"dim": 16, "ffn_dim": 16, "num_heads": 2, "num_layers": 1, "in_channels": 3, "out_channels": 3},
    **{"text_dim": 5, "text_length": 4, "freq_dim": 8},
)
CAUSAL = CausalConfig(frames_per_block=2)


def network(params, x, timestep, text, config=NETWORK, clean=None):
    with layers.differentiable_by_jvp():
        return transformer.block_causal(
            params, x, timestep, text, config=tangent_network(config), causal=CAUSAL, clean=clean
        )


def test_the_tangent_of_the_network_is_its_finite_difference():
    params, rng = tiny.random_transformer(NETWORK), np.random.default_rng(0)
    x, dx, clean = (jnp.asarray(rng.standard_normal((1, 4, 4, 4, 3)), jnp.float32) for _ in range(3))
    t, text = jnp.full((1, 4), 500.0), rng.standard_normal((1, 4, 5)).astype(np.float32)
    run = jax.jit(lambda x, t: network(params, x, t, text, clean=clean))
    plain = transformer.block_causal(params, x, t, text, config=NETWORK, causal=CAUSAL, clean=clean)
    value, tangent = jax.jit(lambda x, t: jax.jvp(run, (x, t), (dx, jnp.full_like(t, 10.0))))(x, t)
    np.testing.assert_allclose(value, plain, atol=1e-5)
    h = 1e-2
    difference = (run(x + h * dx, t + 10 * h) - run(x - h * dx, t - 10 * h)) / (2 * h)
    np.testing.assert_allclose(tangent, difference, atol=5e-3 * float(np.abs(difference).max()))


def sizes(jaxpr):
    """Return the number of elements of every array in ``jaxpr``, also in its inner programs."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


def test_no_array_of_the_tangent_has_the_size_of_all_scores_at_32k_tokens():
    """8 latent frames of 4096 tokens and as many clean copies, traced abstractly; a block of queries is the most."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    x, t, text = spec(1, 8, 128, 128, 3), spec(1, 8), spec(1, 4, 5)

    def tangent(params, x, t, text, clean, dx, dt):
        return jax.jvp(lambda x, t: network(params, x, t, text, clean=clean), (x, t), (dx, dt))

    jaxpr = jax.make_jaxpr(tangent)(transformer.abstract(NETWORK), x, t, text, x, x, t)
    tokens = 8 * 64 * 64
    assert tokens == 32_768
    assert max(sizes(jaxpr.jaxpr)) <= attention.BLOCK * tokens * NETWORK.num_heads < tokens**2 / 10
