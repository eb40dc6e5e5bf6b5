"""Losses and gradients of every variant of the distillation against the paper's formulas in plain JAX.

The oracle reads the weights of the stages from their files and calls the networks; rollouts, noise, masks, guidance and
both losses are written out here, and gradients are those of autodiff through an unrolled loop.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.checkpoints import store
from causvid_jax.models import kv_cache, transformer
from tests import tiny

stop = jax.lax.stop_gradient
SHIFT, TIMESTEPS = 3.0, (1000.0, 750.0)  # 1000 and 500 of the recipe, shifted by 3: 3 * 0.5 / (1 + 2 * 0.5)
LOW, HIGH = 20.0, 980.0
CONTINUED = "continued rollouts with prompt switches"
VARIANTS: dict[str, dict[str, Any]] = {
    "data": {"rollout": "data"},
    "data, never clean": {"rollout": "data", "include_clean": False},
    "causal teacher, critic from the student": {"teacher": "causal", "critic_init": "student"},
    "from the teacher, not guided": {"init": "teacher", "guidance_scale": 1.0},
    CONTINUED: {"continuation_prob": 0.6, "prompt_switch_prob": 0.5, "critic_steps": 4},
}


def wide(sigma):
    return sigma[:, :, None, None, None]


def drawn_exit(key):
    """Return the step at which the self rollout of an update's ``key`` stops."""
    exit_key, _ = jax.random.split(jax.random.split(key)[0])
    return int(jax.random.randint(exit_key, (), 0, len(TIMESTEPS)))


def self_rollout(recipe, params, text, key, shape, exit_step, context=None):
    """Return x0 of blocks of one frame; every cache that a block reads is a constant."""
    noise_key = jax.random.split(key)[1]
    batch, frames, height, width, _ = shape
    config, causal = recipe.student, recipe.causal
    text_cache = transformer.encode_text(params, text, config=config)
    cache = transformer.init_cache(config, causal, batch=batch, height=height, width=width, frames=frames)

    def forward(x, timestep, cache):
        timestep = jnp.full((batch, 1), timestep, jnp.float32)
        return transformer.cached(params, x, timestep, text_cache, stop(cache), config=config, causal=causal)

    for i in range(0 if context is None else context.shape[1]):
        cache = kv_cache.advance(forward(context[:, i : i + 1], causal.context_noise, cache)[1], 1)
    outputs = []
    for i in range(frames):
        noise = [
            jax.random.normal(jax.random.fold_in(jax.random.fold_in(noise_key, i), j), (batch, 1, *shape[2:]))
            for j in range(len(TIMESTEPS))
        ]
        x = noise[0]
        for j in range(exit_step + 1):
            velocity, cache = forward(stop(x), TIMESTEPS[j], cache)
            x0 = stop(x) - TIMESTEPS[j] / 1000 * velocity
            if j < exit_step:
                sigma = TIMESTEPS[j + 1] / 1000
                x = (1 - sigma) * x0 + sigma * noise[j + 1]
        cache = kv_cache.advance(forward(stop(x0), causal.context_noise, cache)[1], 1)
        outputs.append(x0)
    return jnp.concatenate(outputs, axis=1)


def data_rollout(recipe, params, latents, text, key):
    """Return x0 of real latents whose frames are noised to levels of their own, and the frames that were noised."""
    step_key, noise_key = jax.random.split(key)
    levels = jnp.array((*TIMESTEPS, 0.0)[: 2 + recipe.train_distill.include_clean], jnp.float32)
    timestep = levels[jax.random.randint(step_key, latents.shape[:2], 0, len(levels))]
    sigma = wide(timestep / 1000)
    x_t = (1 - sigma) * latents + sigma * jax.random.normal(noise_key, latents.shape)
    velocity = transformer.block_causal(params, x_t, timestep, text, config=recipe.student, causal=recipe.causal)
    return x_t - sigma * velocity, timestep > 0


def rollout(recipe, params, batch, key, exit_step):
    """Return the student's x0 and the frames ``[B, F]`` that the losses count."""
    config, text = recipe.train_distill, batch["text"]
    if config.rollout == "data":
        x0, noisy = data_rollout(recipe, params, batch["latents"], text, key)
        return x0, noisy if config.mask_clean else jnp.ones_like(noisy)
    context = batch.get("context")
    x0 = self_rollout(recipe, params, text, key, (len(text), *recipe.latent_shape), exit_step, context)
    counted = np.ones(x0.shape[:2], bool)
    counted[:, 0] = context is None
    return x0, counted


def noised(x0, key):
    """Return x_t, timestep ``[B, F]`` and noise of the scores."""
    time_key, noise_key = jax.random.split(key)
    u = jax.random.uniform(time_key, (len(x0),))
    timestep = jnp.clip(1000 * SHIFT * u / (1 + (SHIFT - 1) * u), LOW, HIGH)[:, None] * jnp.ones((1, x0.shape[1]))
    noise, sigma = jax.random.normal(noise_key, x0.shape), wide(timestep / 1000)
    return (1 - sigma) * x0 + sigma * noise, timestep, noise


def mean(values, counted):
    return (values * wide(counted)).sum() / (counted.sum() * np.prod(values.shape[2:]))


def critic_loss(recipe, exit_step, critic, student, batch, key):
    """Equation 2: flow matching of the fake score on the student's outputs."""
    rollout_key, loss_key = jax.random.split(key)
    x0, counted = rollout(recipe, student, batch, rollout_key, exit_step)
    x_t, timestep, noise = noised(stop(x0), loss_key)
    velocity = transformer.bidirectional(critic, x_t, timestep, batch["text"], config=recipe.fake_score)
    return mean((velocity - (noise - stop(x0))) ** 2, counted), x0


def student_loss(recipe, exit_step, student, critic, teacher, batch, negative, key):
    """Equation 4, as the published code writes it: half the squared distance to x0 minus the difference of scores."""
    rollout_key, loss_key = jax.random.split(key)
    x0, counted = rollout(recipe, student, batch, rollout_key, exit_step)
    x_t, timestep, _ = noised(stop(x0), loss_key)

    def real(text):
        if recipe.train_distill.teacher == "bidirectional":
            return transformer.bidirectional(teacher, x_t, timestep, text, config=recipe.teacher)
        context = {"clean": stop(x0), "clean_timestep": recipe.causal.context_noise, "causal": recipe.causal}
        return transformer.block_causal(teacher, x_t, timestep, text, config=recipe.teacher, **context)

    unconditional = real(jnp.broadcast_to(negative, batch["text"].shape))
    guided = unconditional + recipe.train_distill.guidance_scale * (real(batch["text"]) - unconditional)
    fake = transformer.bidirectional(critic, x_t, timestep, batch["text"], config=recipe.fake_score)
    sigma = wide(timestep / 1000)
    fake_x0, real_x0 = x_t - sigma * fake, x_t - sigma * guided
    normalizer = jnp.abs(x0 - real_x0).mean((1, 2, 3, 4), keepdims=True)
    target = stop(x0 - (fake_x0 - real_x0) / normalizer)
    return mean(0.5 * (x0 - target) ** 2, counted), x0


def with_context(batch, previous, key, config):
    """Return the batch, which may continue the rollout before it, and the key that is left."""
    if not config.continuation_prob:
        return batch, key
    context_key, key = jax.random.split(key)
    continue_key, switch_key = jax.random.split(context_key)
    if previous is None or jax.random.uniform(continue_key) >= config.continuation_prob:
        return batch, key
    switched = jax.random.uniform(switch_key, (len(batch["text"]), 1, 1)) < config.prompt_switch_prob
    text = np.where(switched, batch["text"], previous["text"])
    return {"text": text, "context": previous["x0"][:, -1:]}, key


# Continued rollouts are unrolled with and without context for either exit step, which compiles for minutes.
CASES = [
    pytest.param(changes, id=name, marks=pytest.mark.slow if name == CONTINUED else ())
    for name, changes in VARIANTS.items()
]


@pytest.mark.parametrize("changes", CASES)
def test_losses_and_gradients_of_every_variant_match_the_paper(workdir, monkeypatch, changes):
    still = {"optimizer": {"learning_rate": 0.0}, "critic_optimizer": {"learning_rate": 0.0}}
    recipe = tiny.tiny_recipe(
        causal={"context_noise": 30.0}, train_distill={"steps": 1, "critic_steps": 1} | still | changes
    )
    config, passed = recipe.train_distill, []

    def recorded(step, state, teacher, batch, negative_prompt_embeds, **options):
        passed.append(jax.tree.map(np.array, (batch, negative_prompt_embeds)))
        return step(state, teacher, batch, negative_prompt_embeds, **options)

    tiny.watch_dmd_steps(monkeypatch, recorded)
    record = tiny.RecordedRun("distill", recipe, workdir).train().records[0]
    (batches, negative), updates = passed[0], config.critic_steps

    def weights(stage):
        return store.load_params(workdir / stage / "weights.safetensors")[0]

    teacher = weights("causal" if config.teacher == "causal" else "teacher")
    student = weights("init" if config.init == "ode" else "teacher")
    critic = student if config.critic_init == "student" else weights("teacher")
    critic_key, student_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    losses, norms, previous, continued = [], [], None, 0

    @functools.cache
    def with_gradient(loss, exit_step):
        return jax.jit(jax.value_and_grad(functools.partial(loss, recipe, exit_step), has_aux=True))

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))

    for i, key in enumerate(jax.random.split(critic_key, updates)):
        batch, key = with_context(jax.tree.map(lambda x, i=i: x[i], batches), previous, key, config)
        continued += "context" in batch
        (loss, x0), gradient = with_gradient(critic_loss, drawn_exit(key))(critic, student, batch, key)
        losses.append(loss)
        norms.append(norm(gradient))
        previous = {"x0": x0, "text": batch["text"]}
    batch, key = with_context(jax.tree.map(lambda x: x[-1], batches), previous, student_key, config)
    inputs = student, critic, teacher, batch, negative, key
    (loss, _), gradient = with_gradient(student_loss, drawn_exit(key))(*inputs)
    assert not config.continuation_prob or 0 < continued < updates - 1
    np.testing.assert_allclose(record["critic_loss"], np.mean(losses), rtol=2e-5)
    np.testing.assert_allclose(record["critic_gradient_norm"], np.mean(norms), rtol=2e-4)
    np.testing.assert_allclose(record["generator_loss"], loss, rtol=2e-5)
    np.testing.assert_allclose(record["generator_gradient_norm"], norm(gradient), rtol=2e-4)
