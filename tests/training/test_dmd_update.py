"""The DMD train step against an unrolled one, and end to end on Gaussian data with a learnt fake score."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from causvid_jax.config import CausalConfig, ConfigError, DiffusionConfig, DistillStageConfig, OptimizerConfig, Recipe
from causvid_jax.distill import dmd
from causvid_jax.training import dmd as trainer
from tests.tiny import gaussian_velocity

DIFFUSION = DiffusionConfig(shift=2.0)
SHAPE = (64, 2, 2, 2, 1)
CAUSAL = CausalConfig(frames_per_block=1, window=3)
NULL = jnp.zeros((1, 1))


def velocity(params, x, timestep, text):
    return gaussian_velocity(x, timestep, params["mean"], jnp.exp(params["log_std"]))


def generate(params, batch, key):
    x0 = params["mean"] + jnp.exp(params["log_std"]) * jax.random.normal(key, SHAPE) + 0 * batch["text"].sum()
    return x0, jnp.ones(SHAPE[:2], bool).at[:, 0].set(batch["text"][:, 0, 0] > 0)


def gaussian(mean, std):
    return {"mean": jnp.array(mean), "log_std": jnp.log(std)}


@pytest.fixture(autouse=True)
def gaussian_networks(monkeypatch):
    """Replace the three networks and the rollout by Gaussians."""

    def score(params, x, timestep, text, *, recipe, clean=None, picture=None):
        return velocity(params, x, timestep, text)

    monkeypatch.setattr(trainer, "real_score", score)
    monkeypatch.setattr(trainer, "fake_score", score)

    def rollout(params, batch, key, *, recipe):
        return *generate(params, batch, key), None

    monkeypatch.setattr(trainer, "generate", rollout)


TEACHER = gaussian(0.8, 0.5)


def batches(k):
    text = jnp.broadcast_to(jnp.arange(k + 1)[:, None, None, None] % 2, (k + 1, SHAPE[0], 1, 1)).astype(jnp.float32)
    return {"text": text}


def step_fn(distill, student_optimizer, fake_optimizer):
    return functools.partial(
        trainer.train_step,
        optimizers=trainer.Optimizers(student_optimizer, fake_optimizer),
        recipe=Recipe(name="gaussian", causal=CAUSAL, diffusion=DIFFUSION, train_distill=distill),
    )


def init_state(student, critic, student_optimizer, fake_optimizer, **options):
    return trainer.init_state(student, critic, trainer.Optimizers(student_optimizer, fake_optimizer), **options)


def test_step_equals_the_unrolled_one():
    distill = DistillStageConfig(critic_steps=3, guidance_scale=2.0, optimizer=OptimizerConfig(ema_decay=0.9), seed=9)
    student_optimizer, fake_optimizer = optax.sgd(0.3), optax.adam(0.1)
    state = init_state(gaussian(-0.5, 1.2), gaussian(-0.2, 1.0), student_optimizer, fake_optimizer)
    run = jax.jit(step_fn(distill, student_optimizer, fake_optimizer), donate_argnums=0)
    root, data = jax.random.key(9), batches(3)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=0)
    def critic(fake, student, text, key):
        rollout_key, loss_key = jax.random.split(key)
        x0, mask = generate(student, {"text": text}, rollout_key)
        fn = functools.partial(velocity, fake)
        return dmd.critic_loss(x0, text, loss_key, fake=fn, diffusion=DIFFUSION, distill=distill, mask=mask)[0]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=0)
    def generator(student, fake, text, key):
        rollout_key, loss_key = jax.random.split(key)
        x0, mask = generate(student, {"text": text}, rollout_key)
        return dmd.generator_loss(
            x0,
            text,
            NULL,
            loss_key,
            teacher=functools.partial(velocity, TEACHER),
            fake=functools.partial(velocity, fake),
            diffusion=DIFFUSION,
            distill=distill,
            mask=mask,
        )[0]

    student, ema, fake = (gaussian(-0.5, 1.2), gaussian(-0.5, 1.2), gaussian(-0.2, 1.0))
    fake_opt = fake_optimizer.init(fake)
    for step in range(2):
        state, metrics = run(state, TEACHER, data, NULL)

        critic_key, generator_key = jax.random.split(jax.random.fold_in(root, step))
        losses = []
        for i, key in enumerate(jax.random.split(critic_key, 3)):
            loss, gradient = critic(fake, student, data["text"][i], key)
            losses.append(loss)
            change, fake_opt = fake_optimizer.update(gradient, fake_opt, fake)
            fake = optax.apply_updates(fake, change)
        loss, gradient = generator(student, fake, data["text"][3], generator_key)
        student = {k: student[k] - 0.3 * gradient[k] for k in student}
        ema = {k: 0.9 * ema[k] + 0.1 * student[k] for k in ema}

        assert int(state.step) == step + 1 and int(state.critic.opt[0].count) == 3 * (step + 1)
        for got, expected in ((state.student.params, student), (state.student.ema, ema), (state.critic.params, fake)):
            for name in expected:
                np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["critic_loss"], np.mean(losses), rtol=1e-5)
        np.testing.assert_allclose(metrics["generator_loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["generator_gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)


def test_student_reaches_the_data_with_a_learnt_fake_score():
    """Run the whole method: only the teacher's velocity depends on the data, and the fake score is trained."""
    distill = DistillStageConfig(critic_steps=5, guidance_scale=1.0, optimizer=OptimizerConfig(ema_decay=0.98))
    student_optimizer = optax.adam(optax.exponential_decay(0.03, 200, 0.4))
    fake_optimizer = optax.adam(optax.exponential_decay(0.03, 1000, 0.5))
    start = gaussian(-1.0, 1.5)
    state = init_state(start, start, student_optimizer, fake_optimizer)
    run = step_fn(distill, student_optimizer, fake_optimizer)
    data = {"text": jnp.ones((6, SHAPE[0], 1, 1))}

    def step(state, _):
        return run(state, TEACHER, data, NULL)

    state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, length=600))(state)
    for params, tolerance in ((state.student.ema, 0.03), (state.critic.params, 0.06)):
        assert abs(params["mean"] - 0.8) < tolerance
        assert abs(jnp.exp(params["log_std"]) - 0.5) < tolerance
    assert metrics["generator_gradient"][-50:].mean() < 0.3 * metrics["generator_gradient"][:50].mean()


def test_ema_off_is_the_student_and_wrong_batches_are_refused():
    distill = DistillStageConfig(critic_steps=1)
    optimizer = optax.sgd(0.1)
    state = init_state(gaussian(0.0, 1.0), gaussian(0.0, 1.0), optimizer, optimizer)
    run = jax.jit(step_fn(distill, optimizer, optimizer))
    after, _ = run(state, TEACHER, batches(1), NULL)
    np.testing.assert_array_equal(after.student.ema["mean"], after.student.params["mean"])
    assert after.student.params["mean"] != 0
    with pytest.raises(ConfigError, match="3 batches for 1 critic updates"):
        run(state, TEACHER, batches(2), NULL)


def test_rollouts_go_on_where_the_one_before_them_ended(monkeypatch):
    """Replace rollouts by counting: each ends three above its start, and one that continues starts from its past."""
    seen = []

    def count(params, batch, key):
        start = jnp.where(batch["has_context"][0], batch["context"][:, -1, 0, 0, 0], 0.0)
        x0 = start[:, None] + jnp.arange(1.0, 4.0) + 0 * params["mean"]
        watched = x0[:, -1], batch["text"][:, 0, 0], batch["has_context"]
        jax.debug.callback(lambda *a: seen.append([np.asarray(x) for x in a]), *watched)
        x0 = x0[..., None, None, None]
        return x0, None, x0[:, -2:]

    monkeypatch.setattr(trainer, "generate", lambda params, batch, key, *, recipe: count(params, batch, key))
    past = {"latents": jnp.zeros((8, 2, 1, 1, 1)), "text": jnp.zeros((8, 1, 1)), "rollouts": jnp.array(0)}
    optimizer = optax.sgd(0.0)
    state = init_state(gaussian(0.0, 1.0), gaussian(0.0, 1.0), optimizer, optimizer, past=past)
    prompts = np.arange(4 * 8.0, dtype=np.float32).reshape(4, 8)

    def run(state=state, **probabilities):
        seen.clear()
        data = {"text": jnp.asarray(prompts)[:, :, None, None]}
        step = step_fn(DistillStageConfig(critic_steps=3, seed=1, **probabilities), optimizer, optimizer)
        after, metrics = step(state, TEACHER, data, NULL)
        jax.effects_barrier()
        assert all(np.ndim(value) == 0 for value in metrics.values())
        ends, shown, has_context = (np.stack(x) for x in zip(*seen, strict=True))  # [3 + 1, 8]
        np.testing.assert_array_equal(has_context, ends > 3)
        return after, ends, shown

    after, ends, shown = run(continuation_prob=1.0)
    np.testing.assert_array_equal(ends, np.repeat([[3.0], [6.0], [9.0], [12.0]], 8, axis=1))
    np.testing.assert_array_equal(shown, np.repeat(prompts[:1], 4, axis=0))
    assert int(after.past["rollouts"]) == 3

    # The next step continues the last rollout of the critic, with the same prompts.
    after, ends, shown = run(after, continuation_prob=1.0)
    np.testing.assert_array_equal(ends, np.repeat([[12.0], [15.0], [18.0], [21.0]], 8, axis=1))
    np.testing.assert_array_equal(shown, np.repeat(prompts[:1], 4, axis=0))
    assert int(after.past["rollouts"]) == 6

    # Second rollouts always follow first ones, third ones hardly ever.
    _, ends, _ = run(continuation_prob=1.0, further_continuation_prob=1e-6)
    assert ends[:, 0].tolist() == [3, 6, 3, 6]

    # A step of another batch size begins anew and leaves the past as it is.
    monkeypatch.setattr(trainer, "no_past", lambda recipe, size: past)
    four = jax.tree.map(lambda x: x[:4] if x.ndim else x + 1, past)
    after, ends, _ = run(dataclasses.replace(state, past=four), continuation_prob=1.0)
    assert ends[:, 0].tolist() == [3, 6, 9, 12]
    jax.tree.map(np.testing.assert_array_equal, after.past, four)

    _, ends, shown = run(continuation_prob=1.0, prompt_switch_prob=0.5)
    assert ends[-1].tolist() == [12.0] * 8
    changed = shown[1:] != shown[:-1]
    np.testing.assert_array_equal(shown[1:][changed], prompts[1:][changed])
    assert 4 < changed.sum() < 20

    _, ends, shown = run(continuation_prob=0.5, prompt_switch_prob=1.0)
    np.testing.assert_array_equal(shown, prompts)
    anew = ends[1:, 0] == 3
    assert 0 < anew.sum() < 3  # with this key
    np.testing.assert_array_equal(ends[1:, 0], np.where(anew, 3, ends[:-1, 0] + 3))


@pytest.mark.parametrize("spoilt", [0, 1, 3])
def test_a_batch_that_is_not_finite_leaves_the_state_as_it_was(spoilt):
    distill = DistillStageConfig(critic_steps=3, guidance_scale=2.0, on_bad_loss="skip")
    optimizers = optax.sgd(0.3), optax.adam(0.1)
    run = jax.jit(step_fn(distill, *optimizers))
    state = init_state(gaussian(-0.5, 1.2), gaussian(-0.2, 1.0), *optimizers)
    state, metrics = run(state, TEACHER, batches(3), NULL)
    assert (int(metrics["applied"]), int(metrics["skipped"])) == (4, 0)
    data = {"text": batches(3)["text"].at[spoilt, 5].set(jnp.nan)}
    after, metrics = run(state, TEACHER, data, NULL)
    assert (int(metrics["applied"]), int(metrics["skipped"]), int(metrics["skipped_total"])) == (0, 4, 4)
    after = dataclasses.replace(after, history=state.history)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_student_update_that_explodes_leaves_the_fake_scores_in_place():
    distill = DistillStageConfig(critic_steps=2, guidance_scale=2.0, on_bad_loss="skip", bad_loss_factor=2.0)
    optimizers = optax.sgd(0.3), optax.adam(0.1)
    run = jax.jit(step_fn(distill, *optimizers))
    state = init_state(gaussian(-0.5, 1.2), gaussian(-0.2, 1.0), *optimizers, window=4)
    # So low a median of the student's losses that the next is far above it; the fake score's is unknown.
    recent = state.history.recent.at[1].set(1e-6)
    watched = dataclasses.replace(state, history=dataclasses.replace(state.history, recent=recent))
    after, metrics = run(watched, TEACHER, batches(2), NULL)
    assert (int(metrics["applied"]), int(metrics["skipped"])) == (2, 1)
    free, _ = run(state, TEACHER, batches(2), NULL)
    jax.tree.map(np.testing.assert_array_equal, after.critic, free.critic)
    jax.tree.map(np.testing.assert_array_equal, after.student, state.student)
    assert int(after.step) == int(state.step) + 1  # the critic's noise is not drawn again
    assert np.isfinite(np.asarray(after.history.recent[0])).sum() == 2
    # With "stop" nothing more is taken, of either network, until the host has seen it.
    stopping = jax.jit(step_fn(dataclasses.replace(distill, on_bad_loss="stop"), *optimizers))
    last, metrics = stopping(after, TEACHER, batches(2), NULL)
    assert (int(metrics["applied"]), int(metrics["skipped"])) == (0, 3)
    jax.tree.map(np.testing.assert_array_equal, last.critic, after.critic)
