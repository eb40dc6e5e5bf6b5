"""Settings of the distillation beyond the paper: what the losses see, where timesteps are drawn, whole steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import ConfigError
from causvid_jax.diffusion import flow
from causvid_jax.models import transformer
from causvid_jax.training import dmd_data, dmd_scores, flow_matching
from tests import tiny


@pytest.mark.parametrize("mode", ["above_exit", "at_exit", "all"])
def test_score_timesteps_follow_the_exit_step(mode):
    """The student's steps 1000 and 500 under its own shift 5: sigma 1 and 5/6, which is u = 5/8 under shift 3."""
    recipe = tiny.tiny_recipe(diffusion={"student_shift": 5.0}, train_distill={"score_timesteps": mode})
    np.testing.assert_allclose(flow.student_timesteps(recipe.diffusion), [1000, 1000 * 5 / 6])
    np.testing.assert_allclose(flow.u_from_sigma(flow.sigma_from_u(0.3, 3.0), 3.0), 0.3)
    exits = set()
    for seed in range(6):
        key = jax.random.key(seed)
        exit_step = int(jax.random.randint(jax.random.split(key)[0], (), 0, 2))
        low, high = {0: (5 / 8, 1.0), 1: (0.0, 5 / 8)}[exit_step]
        levels = dmd_scores.score_levels(key, 3, recipe)
        expected = {"all": (None, None), "above_exit": (low, None), "at_exit": (low, high)}[mode]
        for value, bound in zip((levels.low, levels.high), expected, strict=True):
            assert (value is None) == (bound is None)
            assert bound is None or abs(float(value) - bound) < 1e-6
        exits.add(exit_step)
    assert exits == {0, 1} and levels.block_sizes == ()
    causal = tiny.tiny_recipe(train_distill={"teacher": "causal", "critic_mode": "causal"})
    assert dmd_scores.score_levels(jax.random.key(0), 3, causal).block_sizes == (1, 1, 1)


def test_the_losses_see_a_window_of_a_longer_rollout():
    recipe = tiny.tiny_recipe(causal={"frames_per_block": 2, "window": 4}, video={"frames": 29})
    config = dataclasses.replace(recipe.train_distill, loss_frames=4)
    x0 = jnp.broadcast_to(jnp.arange(8.0)[None, :, None, None, None], (2, 8, 1, 1, 1))
    starts = set()
    for seed in range(40):
        window, mask = dmd_data.loss_window(x0, jax.random.key(seed), config, recipe.causal, None)
        start = int(window[0, 0, 0, 0, 0])
        np.testing.assert_array_equal(window[0, :, 0, 0, 0], start + np.arange(4))
        np.testing.assert_array_equal(mask, [[start == 0, True, True, True]] * 2)
        starts.add(start)
    assert starts == {0, 2, 4}
    last = dataclasses.replace(config, loss_window="last")
    assert dmd_data.loss_window(x0, jax.random.key(0), last, recipe.causal, None)[0][0, 0, 0, 0, 0] == 4
    whole = dataclasses.replace(config, loss_frames=0)
    assert dmd_data.loss_window(x0, jax.random.key(0), whole, recipe.causal, None)[1] is None
    for continued in (True, False):
        mask = dmd_data.loss_window(x0, jax.random.key(0), whole, recipe.causal, jnp.array(continued))[1]
        assert bool(mask[0, 0]) != continued and mask[:, 1:].all()


def test_a_window_is_uniform_and_its_key_draws_nothing_else(monkeypatch):
    recipe = tiny.tiny_recipe(causal={"frames_per_block": 2, "window": 4}, video={"frames": 45})
    config = dataclasses.replace(recipe.train_distill, loss_frames=4)
    x0, used, randint = jnp.arange(12.0)[None, :, None, None, None], [], jax.random.randint

    def start(key):
        return dmd_data.loss_window(x0, key, config, recipe.causal, None)[0][0, 0, 0, 0, 0]

    counts = np.unique(jax.vmap(start)(jax.random.split(jax.random.key(0), 10_000)), return_counts=True)
    np.testing.assert_array_equal(counts[0], [0, 2, 4, 6, 8])
    assert np.abs(counts[1] - 2000).max() < 4 * np.sqrt(1600)
    monkeypatch.setattr(jax.random, "randint", lambda key, *rest: used.append(key) or randint(key, *rest))
    start(jax.random.key(3))
    exit_key, noise_key = jax.random.split(jax.random.key(3))
    assert len(used) == 1 and used[0] != exit_key and used[0] != noise_key


def test_chunks_are_clips_of_their_own(monkeypatch):
    seen = []

    def network(params, x, timestep, text, *, config):
        seen.append((np.asarray(x), np.asarray(timestep), np.asarray(text)))
        return 0 * x

    monkeypatch.setattr(transformer, "bidirectional", network)
    recipe = tiny.tiny_recipe(
        causal={"frames_per_block": 3, "window": 3},
        video={"frames": 21},
        train_distill={"teacher": "chunk", "critic_mode": "chunk"},
        train_teacher={"chunks": True, "caption_dropout": 0.0},
    )
    x0 = np.random.default_rng(0).standard_normal((2, 6, *recipe.latent_shape[1:])).astype(np.float32)
    text = np.arange(2.0)[:, None, None] * np.ones((2, recipe.text.length, recipe.text.dim))
    x, mask, prompts = dmd_scores.scored(jnp.asarray(x0), None, text, recipe)
    np.testing.assert_array_equal(x, np.stack([x0[0, :3], x0[0, 3:], x0[1, :3], x0[1, 3:]]))
    np.testing.assert_array_equal(prompts[:, 0, 0], [0, 0, 1, 1])
    assert mask is None
    for score in (dmd_scores.real_score, dmd_scores.fake_score):
        score({}, x, jnp.ones((4, 3)), prompts, clean=x, recipe=recipe)
        np.testing.assert_array_equal(seen.pop()[0], x)
    # The teacher is trained on the same chunks, each at a timestep of its own.
    flow_matching.teacher_loss(None, {"latents": x0, "text": text}, jax.random.key(0), recipe=recipe)
    shown, timestep, prompts = seen.pop()
    assert shown.shape == x.shape and len(np.unique(timestep)) == 4
    np.testing.assert_array_equal(prompts[:, 0, 0], [0, 0, 1, 1])


WHOLE = {
    "sid, replay": {
        "train_distill": {"objective": "sid", "gradient": "replay", "exit_steps": "first_block", "init": "consistency"},
        "causal": {"context_noise": 50.0, "add_context_noise": "training"},
        "diffusion": {"first_block_timesteps": ((1000.0, 750.0, 500.0), (1000.0,))},
    },
    "gan": {"train_distill": {"objective": "dmd_gan", "fake_guidance_scale": 2.0}},
    "chunk, window": {
        "train_distill": {"teacher": "chunk", "critic_mode": "chunk", "loss_frames": 2, "score_timesteps": "at_exit"}
    },
    "causal, replay": {
        "train_distill": {"teacher": "causal", "critic_mode": "causal", "gradient": "replay", "continuation_prob": 0.5}
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_step_with_these_settings_moves_both_networks(workdir, name):
    changes = {key: dict(value) for key, value in WHOLE[name].items()}
    adam = {"learning_rate": 1e-3, "warmup_steps": 0}
    changes["train_distill"] |= {"steps": 1, "critic_steps": 1, "optimizer": adam, "critic_optimizer": adam}
    run = tiny.RecordedRun("distill", tiny.tiny_recipe(**changes), workdir).train()
    before, after = run.states
    for network in ("student", "critic"):
        kernels = [getattr(state, network).params["blocks"]["ffn"]["fc1"]["kernel"] for state in (before, after)]
        assert np.isfinite(kernels[1]).all() and np.abs(kernels[1] - kernels[0]).max() > 1e-4
    record = run.records[0]
    assert np.isfinite(record["generator_loss"]) and record["applied"] == 2
    if name == "gan":
        np.testing.assert_allclose(record["critic_discriminator"], 2 * np.log(2), rtol=1e-5)  # a new head says 0
        assert np.abs(after.critic.params["gan_head"]["fc2"]["kernel"]).max() > 0


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_stage_consistency_trains_from_the_causal_teacher(workdir, kind, monkeypatch):
    monkeypatch.setattr("causvid_jax.models.attention.BLOCK", 4)
    adam = {"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.5}
    changes = {"steps": 2, "kind": kind, "batch_size": 2, "optimizer": adam}
    run = tiny.RecordedRun("consistency", tiny.tiny_recipe(train_consistency=changes), workdir).train()
    saved = [state.network.params["blocks"]["ffn"]["fc1"]["kernel"] for state in run.states]
    assert len(run.records) == 2 and all(np.isfinite(record["loss"]) for record in run.records)
    assert np.abs(saved[1] - saved[0]).max() > 1e-4
    ema = run.states[-1].network.ema["blocks"]["ffn"]["fc1"]["kernel"]
    np.testing.assert_allclose(ema, 0.25 * saved[0] + 0.25 * saved[1] + 0.5 * saved[2], atol=1e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"train_distill": {"rollout": "data", "gradient": "replay"}}, "gradient is 'replay' with rollout 'data'"),
        ({"train_distill": {"rollout": "data", "loss_frames": 2}}, "loss_frames is 2 with rollout 'data'"),
        ({"train_distill": {"loss_frames": 4}}, "loss_frames is 4; a rollout has 3 latent frames"),
        (
            {"train_distill": {"loss_frames": 4, "frames": 6, "curriculum": ((1, 0, 2),)}},
            "a rollout has 3 latent frames",
        ),
        (
            {"causal": {"frames_per_block": 3, "window": 3}, "train_distill": {"loss_frames": 2}},
            "must be a multiple of",
        ),
        ({"train_distill": {"score_timesteps": "at_exit", "exit_steps": "per_block"}}, "one timestep for all blocks"),
        ({"train_distill": {"teacher": "chunk"}}, "'chunk' needs both"),
        ({"train_distill": {"objective": "dmd_gan", "continuation_prob": 0.5}}, "begin with a first frame"),
        ({"train_distill": {"objective": "dmd_gan", "critic_mode": "causal"}}, "accepted: 'bidirectional'"),
        ({"train_distill": {"objective": "dmd_gan", "gan_layers": (1,)}}, "has the layers 0 to 0"),
        (
            {"train_distill": {"objective": "dmd_gan", "rollout": "data", "accumulate": 2}},
            "accumulate is 2 with objective 'dmd_gan' and clean blocks left out",
        ),
        (
            {"train_distill": {"critic_optimizer": {"ema_decay": 0.9}}},
            "critic_optimizer.ema_decay is 0.9; the fake score has no EMA",
        ),
        ({"train_distill": {"objective": "lsgan"}}, "objective is 'lsgan'; accepted: 'dmd', 'sid', 'dmd_gan'"),
        ({"diffusion": {"student_shift": 5.0, "warp": False}}, "student_shift is 5 with warp off"),
        (
            {"diffusion": {"first_block_timesteps": ((1000.0, 500.0),)}, "train_distill": {"rollout": "data"}},
            "they need train_distill.rollout 'self'",
        ),
        ({"causal": {"add_context_noise": "always"}}, "a causal.context_noise above 0, which is 0"),
        ({"train_causal": {"chunks": True}}, "only train_teacher can be trained on chunks"),
        (
            {"train_distill": {"rollout": "data", "continuation_prob": 0.5}},
            "continuation_prob is 0.5 with rollout 'data', where it has no effect; use rollout 'self', or "
            "continuation_prob 0.0",
        ),
        (
            {"train_distill": {"prompt_switch_prob": 0.5}},
            "prompt_switch_prob is 0.5 with continuation_prob 0, where it has no effect; use a continuation_prob above",
        ),
        ({"train_distill": {"loss_window": "last"}}, "loss_window is 'last' with loss_frames 0, where"),
        ({"train_distill": {"sid_alpha": 2.0}}, "sid_alpha is 2.0 with objective 'dmd', where"),
        ({"train_distill": {"objective": "sid", "gan_weight": 1.0}}, "gan_weight is 1.0 with objective 'sid', where"),
        ({"train_distill": {"objective": "dmd_gan", "gan_r_sigma": 1.0}}, "gan_r_sigma is 1.0 with gan_r1_weight and"),
        ({"train_causal": {"lora": {"alpha": 4.0}}}, "lora.alpha is 4.0 with rank 0 .no adapters., where"),
        ({"train_causal": {"lora": {"targets": ("q",)}}}, "lora.targets is .'q',. with rank 0"),
        (
            {"train_causal": {"optimizer": {"ema_decay": 0.0, "ema_start": 3}}},
            "optimizer.ema_start is 3 with ema_decay 0, where",
        ),
        (
            {"train_init": {"teacher": "causal", "extra_trajectories": ((1, 6),)}},
            "extra_trajectories has a length of 1 latent frames, which no part of the stage reads",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.tiny_recipe(**changes)
