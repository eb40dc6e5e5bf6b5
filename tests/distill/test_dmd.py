"""DMD losses against numpy, their gradient stops, and the exact answer on Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from causvid_jax.config import ConfigError, DiffusionConfig, DistillStageConfig
from causvid_jax.diffusion import flow
from causvid_jax.distill import dmd, scores, sid
from tests.tiny import gaussian_velocity

DIFFUSION = DiffusionConfig(shift=3.0)
SHAPE = (4, 3, 2, 2, 2)
TEXT = np.random.default_rng(5).standard_normal((4, 2, 3)).astype(np.float32)
NULL = np.zeros((2, 3), np.float32)
MEAN, STD = 0.8, 0.5


def teacher(x, timestep, text, scale=1.0):
    return scale * (jnp.tanh(x) + flow.expand(text.sum((1, 2)) + 0.001 * timestep[:, 0], x))


def fake(x, timestep, text, scale=1.0):
    return scale * (0.5 * x**2 - flow.expand(jnp.cos(text).sum((1, 2)) * 0.002 * timestep[:, 0], x))


def oracle_inputs(key, x0):
    """Return the losses' timesteps by the formula, and x_t."""
    time_key, noise_key = jax.random.split(key)
    u = np.asarray(jax.random.uniform(time_key, (SHAPE[0],)), np.float64)
    timestep = np.clip(1000 * 3 * u / (1 + 2 * u), 20, 980)
    noise = np.asarray(jax.random.normal(noise_key, SHAPE), np.float64)
    sigma = (timestep / 1000)[:, None, None, None, None]
    return timestep, sigma, noise, (1 - sigma) * x0 + sigma * noise


def per_sample(values):
    return values[:, None, None, None, None]


@pytest.mark.parametrize("masked,scale", [(False, 4.5), (True, 4.5), (False, 0.0)])
def test_generator_loss_matches_numpy(masked, scale):
    x0 = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    key = jax.random.key(3)
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]], np.float32) if masked else None
    distill = DistillStageConfig(guidance_scale=scale)

    def loss(x):
        return dmd.generator_loss(
            x, TEXT, NULL, key, teacher=teacher, fake=fake, diffusion=DIFFUSION, distill=distill, mask=mask
        )

    (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(x0)

    timestep, sigma, _, x_t = oracle_inputs(key, x0)
    cond = np.tanh(x_t) + per_sample(TEXT.sum((1, 2)) + 0.001 * timestep)
    uncond = np.tanh(x_t) + per_sample(0.001 * timestep)
    f = x_t - sigma * (0.5 * x_t**2 - per_sample(np.cos(TEXT).sum((1, 2)) * 0.002 * timestep))
    r_u, r_c = x_t - sigma * uncond, x_t - sigma * cond
    r = r_u + scale * (r_c - r_u)
    gradient = (f - r) / per_sample(np.abs(x0 - r).reshape(SHAPE[0], -1).mean(1))
    chosen = np.broadcast_to(np.ones((4, 3)) if mask is None else mask, SHAPE[:2])[..., None, None, None] * np.ones(
        SHAPE
    )
    count = chosen.sum()
    np.testing.assert_allclose(value, 0.5 * (chosen * gradient**2).sum() / count, rtol=1e-4)
    np.testing.assert_allclose(slope, chosen * gradient / count, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(metrics["gradient"], (chosen * np.abs(gradient)).sum() / count, rtol=1e-4)
    np.testing.assert_allclose(metrics["timestep"], timestep.mean(), rtol=1e-5)


def test_critic_loss_matches_numpy():
    x0 = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    key = jax.random.key(4)
    timestep, _, noise, x_t = oracle_inputs(key, x0)
    v = 0.5 * x_t**2 - per_sample(np.cos(TEXT).sum((1, 2)) * 0.002 * timestep)
    error = (v - (noise - x0)) ** 2
    some = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
    for mask, expected in ((None, error.mean()), (some, error[some].mean())):
        loss, _ = dmd.critic_loss(
            x0, TEXT, key, fake=fake, diffusion=DIFFUSION, distill=DistillStageConfig(), mask=mask
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_gradients_stop_at_scores_and_at_the_critics_data():
    x0 = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    key, distill = jax.random.key(0), DistillStageConfig()

    def generator(teacher_scale, fake_scale):
        return dmd.generator_loss(
            x0,
            TEXT,
            NULL,
            key,
            teacher=lambda *a: teacher(*a, scale=teacher_scale),
            fake=lambda *a: fake(*a, scale=fake_scale),
            diffusion=DIFFUSION,
            distill=distill,
        )[0]

    assert jax.grad(generator, (0, 1))(1.0, 1.0) == (0.0, 0.0)

    def critic(x0, scale):
        velocity = lambda *a: fake(*a, scale=scale)  # noqa: E731
        return dmd.critic_loss(x0, TEXT, key, fake=velocity, diffusion=DIFFUSION, distill=distill)[0]

    to_student, to_fake = jax.grad(critic, (0, 1))(x0, 1.0)
    np.testing.assert_array_equal(to_student, 0)
    assert abs(to_fake) > 0.1


def test_score_timesteps_are_shifted_uniform_clamped_and_equal_over_frames():
    distill = DistillStageConfig(score_timestep_min=20.0, score_timestep_max=980.0)
    t = np.asarray(scores.score_timesteps(jax.random.key(0), 20000, 3, DiffusionConfig(shift=8.0), distill))
    assert t.shape == (20000, 3) and t.min() == 20 and t.max() == 980
    np.testing.assert_array_equal(t, t[:, :1].repeat(3, 1))
    for level in (0.3, 0.6, 0.9):  # P(t < 1000 sigma) = u(sigma) = sigma / (shift - (shift - 1) sigma)
        assert abs((t[:, 0] < 1000 * level).mean() - level / (8 - 7 * level)) < 0.012


def test_undefined_gradient_is_zero():
    x = jnp.stack([jnp.ones((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))])
    real = x.at[1].set(3.0)
    gradient = dmd.dmd_gradient(x, x + 1.0, real)  # sample 0: x equals r, the mean is 0
    np.testing.assert_array_equal(gradient[0], 0.0)
    np.testing.assert_allclose(gradient[1], (2.0 - 3.0) / 2.0)
    np.testing.assert_array_equal(dmd.dmd_gradient(x, x, x), 0.0)


@pytest.mark.parametrize("broken", ["teacher", "fake"])
def test_a_score_that_is_not_finite_spoils_the_loss(broken):
    """Otherwise the student would train without any gradient, and no guard would notice."""
    x0 = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for value in (np.nan, np.inf):
        nets = {"teacher": teacher, "fake": fake} | {broken: lambda x, t, text, value=value: jnp.full_like(x, value)}
        settings = {"diffusion": DIFFUSION, "distill": DistillStageConfig(guidance_scale=1.0)}
        for loss in (dmd.generator_loss, sid.generator_loss):
            run = lambda x, loss=loss: loss(x, TEXT, NULL, jax.random.key(0), **nets, **settings)[0]  # noqa: B023, E731
            value_of, slope = jax.value_and_grad(run)(x0)
            assert not np.isfinite(value_of) and not np.isfinite(slope).all()


def train_generator(params, generate, distribution, guidance, teacher_fn, steps=400):
    """Descend the DMD loss with the exact score of the generator's own distribution as the fake score."""
    distill = DistillStageConfig(guidance_scale=guidance)
    text = jnp.ones((512, 1, 1))
    optimizer = optax.adam(optax.exponential_decay(0.05, steps // 4, 0.3))

    def step(carry, key):
        params, opt = carry
        noise_key, loss_key = jax.random.split(key)

        def loss(p):
            x0 = generate(p, jax.random.normal(noise_key, (512, 1, 2, 2, 1)))
            mean, std = distribution(p)
            return dmd.generator_loss(
                x0,
                text,
                jnp.zeros((1, 1)),
                loss_key,
                teacher=teacher_fn,
                fake=lambda x, t, _: gaussian_velocity(x, t, mean, std),
                diffusion=DIFFUSION,
                distill=distill,
            )[0]

        change, opt = optimizer.update(jax.grad(loss)(params), opt)
        return (optax.apply_updates(params, change), opt), None

    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys))(params)
    return params


def test_exact_scores_drive_mean_and_scale_to_the_data():
    mean, scale = train_generator(
        (jnp.array(-1.0), jnp.array(1.4)),
        lambda p, noise: p[0] + p[1] * noise,
        lambda p: p,
        1.0,
        lambda x, t, _: gaussian_velocity(x, t, MEAN, STD),
    )
    assert abs(mean - MEAN) < 0.01 and abs(scale - STD) < 0.015


def test_guidance_extrapolates_the_mean_exactly():
    """Two Gaussians of one width: guided scores are those of the mean ``m_u + g (m_c - m_u)`` = 0.2 + 3 * 0.3."""

    def teacher_fn(x, t, text):
        return gaussian_velocity(x, t, flow.expand(0.2 + 0.3 * text[:, 0, 0], x), STD)

    mean = train_generator(
        jnp.array(-1.0), lambda m, noise: m + STD * noise, lambda m: (m, STD), 3.0, teacher_fn, steps=600
    )
    assert abs(mean - 1.1) < 0.015


@pytest.mark.parametrize("timestep", [200.0, 700.0])
def test_critic_recovers_the_exact_linear_velocity(timestep):
    """At one noise level the flow loss is quadratic in ``v = w x + b``; its minimiser is the Gaussian's velocity."""
    distill = DistillStageConfig(score_timestep_min=timestep, score_timestep_max=timestep + 1e-3)
    x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (1000, 1, 8, 8, 1))

    def loss(p):
        return dmd.critic_loss(
            x0, None, jax.random.key(1), fake=lambda x, t, _: p[0] * x + p[1], diffusion=DIFFUSION, distill=distill
        )[0]

    start = jnp.zeros(2)
    fit = -np.linalg.solve(jax.jit(jax.hessian(loss))(start), jax.jit(jax.grad(loss))(start))
    sigma = timestep / 1000
    w = (sigma - (1 - sigma) * STD**2) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    np.testing.assert_allclose(fit, [w, -MEAN - w * (1 - sigma) * MEAN], atol=0.02)


def test_losses_take_noise_and_timesteps_instead_of_a_key():
    rng = np.random.default_rng(7)
    x0, noise = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    timestep = np.repeat(rng.uniform(20, 980, (SHAPE[0], 1)), SHAPE[1], 1).astype(np.float32)
    sigma = (timestep / 1000)[:, :, None, None, None]
    settings = {"fake": fake, "diffusion": DIFFUSION, "distill": DistillStageConfig()}
    loss, _ = dmd.critic_loss(x0, TEXT, timestep=timestep, noise=noise, **settings)
    x_t = (1 - sigma) * x0 + sigma * noise
    v = 0.5 * x_t**2 - per_sample(np.cos(TEXT).sum((1, 2)) * 0.002 * timestep[:, 0])
    np.testing.assert_allclose(loss, ((v - (noise - x0)) ** 2).mean(), rtol=1e-5)
    _, metrics = dmd.generator_loss(x0, TEXT, NULL, teacher=teacher, timestep=timestep, noise=noise, **settings)
    np.testing.assert_allclose(metrics["timestep"], timestep.mean(), rtol=1e-6)
    with pytest.raises(ConfigError, match="x_t has shape .* and velocity has shape .*; they must be equal"):
        dmd.critic_loss(x0, TEXT, timestep=timestep, noise=noise, **settings | {"fake": lambda x, *_: x[..., :1]})
    with pytest.raises(ConfigError, match="without a key needs both"):
        dmd.critic_loss(x0, TEXT, noise=noise, **settings)
