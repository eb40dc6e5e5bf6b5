"""SiD and DMD-GAN against numpy, and their minima on Gaussian data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from causvid_jax.config import DiffusionConfig, DistillStageConfig
from causvid_jax.distill import dmd, gan, scores, sid
from causvid_jax.models import transformer
from causvid_jax.sharding.params import init_tree
from tests import tiny
from tests.distill.test_dmd import MEAN, STD
from tests.tiny import gaussian_velocity

DIFFUSION = DiffusionConfig(shift=3.0)
SHAPE = (4, 3, 2, 2, 2)
TEXT = np.zeros((4, 1, 1), np.float32)
KEY = jax.random.key(3)


def noised(x0, key=KEY, low=0.0, high=1.0):
    """Return the timesteps ``[B]`` and x_t that the losses draw."""
    time_key, noise_key = jax.random.split(key)
    u = low + (high - low) * np.asarray(jax.random.uniform(time_key, (SHAPE[0],)), np.float64)
    sigma = (np.clip(1000 * 3 * u / (1 + 2 * u), 20, 980) / 1000)[:, None, None, None, None]
    return sigma, (1 - sigma) * x0 + sigma * np.asarray(jax.random.normal(noise_key, SHAPE))


def real(x, timestep, _):
    return 0.4 * x - 0.2


def fake(x, timestep, text):
    return 0.7 * x + 0.1 + 0.3 * text.sum((1, 2))[:, None, None, None, None]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_sid_and_its_slope_match_numpy(alpha):
    """r and f are linear in x_t, so the slope by x has a closed form."""
    x0 = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    distill = DistillStageConfig(guidance_scale=1.0, sid_alpha=alpha, objective="sid")
    options = {"teacher": real, "fake": fake, "diffusion": DIFFUSION, "distill": distill}
    loss, slope = jax.value_and_grad(lambda x: sid.generator_loss(x, TEXT, TEXT[0], KEY, **options)[0])(x0)
    sigma, x_t = noised(x0)
    r, f = x_t - sigma * (0.4 * x_t - 0.2), x_t - sigma * (0.7 * x_t + 0.1)
    scale = np.abs(x0 - r).reshape(4, -1).mean(1)[:, None, None, None, None]
    numerator = (r - f) * ((r - x0) - alpha * (r - f))
    np.testing.assert_allclose(loss, (numerator / scale).mean(), rtol=1e-5)
    dr, df = (1 - sigma) * (1 - 0.4 * sigma), (1 - sigma) * (1 - 0.7 * sigma)
    expected = (dr - df) * ((r - x0) - alpha * (r - f)) + (r - f) * ((dr - 1) - alpha * (dr - df))
    np.testing.assert_allclose(slope, expected / scale / x0.size, rtol=1e-3, atol=1e-6)
    given = {"timestep": 1000 * sigma[:, :, 0, 0, 0] * np.ones((1, 3)), "noise": (x_t - (1 - sigma) * x0) / sigma}
    alone = sid.generator_loss(x0, TEXT, TEXT[0], **given, **options)[0]
    np.testing.assert_allclose(alone, (numerator / scale).mean(), rtol=1e-5)
    masked = sid.generator_loss(x0, TEXT, TEXT[0], KEY, mask=jnp.zeros((4, 3), bool).at[:, 1].set(True), **options)[0]
    np.testing.assert_allclose(masked, (numerator / scale)[:, 1].mean(), rtol=1e-5)


def test_guidance_of_the_fake_score_and_levels_match_numpy():
    """The fake score's velocity differs by 0.3 between prompts of 1 and of 0; times come from a narrow range."""
    x0 = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    distill = DistillStageConfig(guidance_scale=1.0, fake_guidance_scale=2.5)
    options = {"teacher": real, "fake": fake, "diffusion": DIFFUSION, "distill": distill}
    levels = scores.Levels(0.25, 0.5)
    fake_x0, _, timestep = scores.predictions(jnp.asarray(x0), TEXT + 1, TEXT[0], KEY, levels=levels, **options)
    sigma, x_t = noised(x0, low=0.25, high=0.5)
    np.testing.assert_allclose(timestep, 1000 * sigma[:, :, 0, 0, 0] * np.ones((1, 3)), rtol=1e-5)
    np.testing.assert_allclose(fake_x0, x_t - sigma * (0.7 * x_t + 0.1 + 2.5 * 0.3), atol=1e-5)
    t = scores.score_timesteps(KEY, 5000, 3, DIFFUSION, distill, scores.Levels(0.25, 0.5, (1, 2)))
    np.testing.assert_array_equal(t[:, 1], t[:, 2])
    assert np.corrcoef(t[:, 0], t[:, 1])[0, 1] < 0.05
    assert 1000 * 0.75 / 1.5 <= t.min() < 502 and 748 < t.max() <= 750


def logit(x, timestep, mean, std):
    """log p_real(x_t) - log p_student(x_t) of Gaussians, summed over a clip: the best discriminator."""
    sigma = (timestep / 1000)[:, :, None, None, None]

    def log_density(mean, std):
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        return -0.5 * jnp.square(x - (1 - sigma) * mean) / variance - 0.5 * jnp.log(variance)

    return jnp.sum(log_density(MEAN, STD) - log_density(mean, std), axis=(1, 2, 3, 4))


def test_gan_losses_match_numpy():
    x0 = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    clips = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    distill = DistillStageConfig(objective="dmd_gan", gan_weight=0.4, gan_critic_weight=0.7, guidance_scale=1.0)
    options = {"fake": fake, "diffusion": DIFFUSION, "distill": distill}
    discriminator = lambda x, timestep, text: jnp.sum(x, axis=(1, 2, 3, 4)) / 5  # noqa: E731
    logits = {i: noised(x, jax.random.fold_in(KEY, i))[1].sum((1, 2, 3, 4)) / 5 for i, x in ((1, x0), (2, clips))}
    plain = dmd.generator_loss(x0, TEXT, TEXT[0], KEY, teacher=real, **options)[0]
    loss, metrics = gan.generator_loss(x0, TEXT, TEXT[0], KEY, teacher=real, discriminator=discriminator, **options)
    np.testing.assert_allclose(loss - plain, 0.4 * np.log1p(np.exp(-logits[1])).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss)
    plain = dmd.critic_loss(x0, TEXT, KEY, **options)[0]
    loss, _ = gan.critic_loss(x0, clips, TEXT, KEY, discriminator=discriminator, **options)
    expected = 0.7 * (np.log1p(np.exp(-logits[2])) + np.log1p(np.exp(logits[1]))).mean()
    np.testing.assert_allclose(loss - plain, expected, rtol=1e-4)


def test_r1_and_r2_match_numpy_and_the_slope():
    """D = sum of squares / 5, by the same draws; for a linear D the mean over many draws is the squared slope."""
    rng = np.random.default_rng(0)
    x0, clips = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    options = {"fake": fake, "diffusion": DIFFUSION}
    plain = DistillStageConfig(objective="dmd_gan")
    both = dataclasses.replace(plain, gan_r1_weight=0.3, gan_r2_weight=0.2, gan_r_sigma=0.5)
    square = lambda x, timestep, text: jnp.sum(jnp.square(x), axis=(1, 2, 3, 4)) / 5  # noqa: E731
    run = lambda distill, d: gan.critic_loss(x0, clips, TEXT, KEY, discriminator=d, distill=distill, **options)  # noqa: E731
    (without, _), (loss, metrics) = run(plain, square), run(both, square)
    expected = {}
    for i, name, x in ((1, "r2", x0), (2, "r1", clips)):
        x_t = np.asarray(noised(x, jax.random.fold_in(KEY, i))[1], np.float64)
        noise = np.asarray(jax.random.normal(jax.random.fold_in(KEY, i + 2), SHAPE), np.float64)
        moved = ((x_t + 0.5 * noise) ** 2 - x_t**2).sum((1, 2, 3, 4)) / 5 / 0.5
        expected[name] = np.mean(moved**2)
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)
    np.testing.assert_allclose(loss - without, 0.3 * expected["r1"] + 0.2 * expected["r2"], rtol=1e-3)

    slope = rng.standard_normal((1, 2, 2, 1)).astype(np.float32)
    linear = lambda x, timestep, text: jnp.sum(slope * x, axis=(1, 2, 3, 4))  # noqa: E731
    many = np.zeros((4096, 1, 2, 2, 1), np.float32)
    config = dataclasses.replace(both, gan_r_sigma=0.1)
    settings = {"discriminator": linear, "distill": config, "fake": lambda x, t, _: x, "diffusion": DIFFUSION}
    _, metrics = gan.critic_loss(many, many, np.zeros((4096, 1, 1), np.float32), KEY, **settings)
    np.testing.assert_allclose([metrics["r1"], metrics["r2"]], (slope**2).sum(), rtol=0.1)


@pytest.mark.parametrize("objective", ["sid", "sid half", "dmd_gan", "gan alone"])
def test_exact_scores_drive_mean_and_scale_to_the_data(objective):
    """With exact scores (and the best discriminator) each objective moves mean -1 and deviation 1.4 to the data's."""
    settings = {"sid half": {"objective": "sid", "sid_alpha": 0.5}, "sid": {"objective": "sid"}}
    distill = DistillStageConfig(
        guidance_scale=1.0, **settings.get(objective, {"objective": "dmd_gan", "gan_weight": 0.5})
    )
    text, optimizer = jnp.ones((512, 1, 1)), optax.adam(optax.exponential_decay(0.05, 100, 0.3))

    def loss(params, key, constant):
        x0 = params[0] + params[1] * jax.random.normal(key, (512, 1, 2, 2, 1))
        mean, std = constant
        options = {
            "teacher": lambda x, t, _: gaussian_velocity(x, t, MEAN, STD),
            "fake": lambda x, t, _: gaussian_velocity(x, t, mean, std),
            "diffusion": DIFFUSION,
            "distill": distill,
        }
        if objective.startswith("sid"):
            return sid.generator_loss(x0, text, text[0], jax.random.fold_in(key, 1), **options)[0]
        discriminator = lambda x, t, _: logit(x, t, mean, std)  # noqa: E731
        value, metrics = gan.generator_loss(
            x0, text, text[0], jax.random.fold_in(key, 1), discriminator=discriminator, **options
        )
        return metrics["adversarial"] if objective == "gan alone" else value

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(loss)(params, key, jax.lax.stop_gradient(params))
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, change), state), None

    start = (jnp.array(-1.0), jnp.array(1.4))
    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jax.random.split(jax.random.key(1), 400)))
    (mean, std), _ = run(start)[0]
    assert abs(mean - MEAN) < 0.04 and abs(abs(std) - STD) < 0.04


def test_the_discriminator_that_the_loss_finds_is_the_ratio_of_the_densities():
    """For two Gaussians of one width, at one noise level, the best logit is linear in x_t; Newton's method finds it."""
    low, high = {"score_timestep_min": 400.0}, {"score_timestep_max": 400.001}
    distill = DistillStageConfig(**low, **high, objective="dmd_gan", gan_critic_weight=1.0)
    noise = np.random.default_rng(0).standard_normal((2, 40_000, 1, 1, 1, 1)).astype(np.float32)
    other = -0.3

    def loss(p):
        discriminator = lambda x, t, _: p[0] * x[:, 0, 0, 0, 0] + p[1]  # noqa: E731
        options = {"fake": lambda x, t, _: 0 * x, "diffusion": DIFFUSION, "distill": distill}
        return gan.critic_loss(
            other + STD * noise[0], MEAN + STD * noise[1], None, KEY, discriminator=discriminator, **options
        )[0]

    p = jnp.zeros(2)
    for _ in range(6):
        p = p - jnp.linalg.solve(jax.hessian(loss)(p), jax.grad(loss)(p))
    variance = 0.6**2 * STD**2 + 0.4**2
    slope = 0.6 * (MEAN - other) / variance
    np.testing.assert_allclose(p, [slope, -slope * 0.6 * (MEAN + other) / 2], atol=0.06)


def test_features_are_pooled_at_the_chosen_layers_and_the_head_starts_at_zero():
    config = tiny.tiny_recipe(teacher={"num_layers": 3}).teacher
    distill = DistillStageConfig(objective="dmd_gan", gan_layers=(0, 2))
    params = tiny.random_transformer(config)
    head = init_tree(jax.random.key(0), gan.head_spec(config, distill))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 4, 4)).astype(np.float32)
    text = rng.standard_normal((2, config.text_length, config.text_dim)).astype(np.float32)
    discriminator = functools.partial(gan.discriminator, config=config, distill=distill)
    np.testing.assert_array_equal(discriminator(params | {gan.HEAD: head}, x, jnp.full((2, 3), 300.0), text), 0)
    assert gan.feature_layers(config, DistillStageConfig()) == (0, 1, 2)
    with_layers = dataclasses.replace(config, num_layers=30)
    assert gan.feature_layers(with_layers, DistillStageConfig()) == (13, 21, 29)
    # A query of zero pools the mean of normalised tokens; the first layer alone decides its own feature.
    queries = jnp.zeros((3, config.dim))
    run = functools.partial(transformer.pooled_features, config=config)
    pooled = run(params, x, jnp.full((2, 3), 300.0), text, queries)
    first = jax.tree.map(lambda p: p[:1], params["blocks"])
    short = dataclasses.replace(config, num_layers=1)
    alone = transformer.pooled_features(
        {**params, "blocks": first}, x, jnp.full((2, 3), 300.0), text, queries[:1], config=short
    )
    np.testing.assert_allclose(pooled[0], alone[0], atol=1e-5)
    moved = run(params, x, jnp.full((2, 3), 300.0), text, queries.at[2].set(rng.standard_normal(config.dim)))
    np.testing.assert_allclose(moved[:2], pooled[:2], atol=1e-6)
    assert np.abs(moved[2] - pooled[2]).max() > 1e-3
