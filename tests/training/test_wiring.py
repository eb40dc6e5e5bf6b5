"""Inputs that the trainers pass to losses (networks, lengths, text, keys), against formulas on random weights."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from causvid_jax.checkpoints import store
from causvid_jax.config import ConfigError, to_json
from causvid_jax.distill import rollout
from causvid_jax.models import transformer
from causvid_jax.training import autoencoder, consistency, dmd, export, flow_matching, update, weights
from tests import tiny


@pytest.fixture
def only_traced(monkeypatch):
    """Trace the steps of the distillation instead of compiling and running them; their metrics are zeros."""

    def traced(step, state, *inputs, **options):
        _, metrics = step.eval_shape(state, *inputs, **options)
        return state, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)

    tiny.watch_dmd_steps(monkeypatch, traced)


def test_rollouts_have_the_length_of_the_stretch(workdir, monkeypatch, only_traced):
    shapes = []
    original = rollout.self_rollout

    def recorded(*arguments, shape, **options):
        shapes.append(shape)
        return original(*arguments, shape=shape, **options)

    monkeypatch.setattr(dmd, "self_rollout", recorded)
    changes = {"steps": 2, "frames": 4, "curriculum": ((1, 1, 3),), "critic_steps": 1}
    recipe = tiny.tiny_recipe(train_distill=changes)
    run = tiny.RecordedRun("distill", recipe, workdir).train()
    assert len(run.records) == 2
    # One trace of the critic's and one of the student's rollout for each length.
    assert [(size, frames) for size, frames, *_ in dict.fromkeys(shapes)] == [(3, 1), (2, 4)]


def test_a_data_rollout_is_cut_to_its_length(workdir, only_traced):
    recipe = tiny.tiny_recipe(train_distill={"steps": 1, "frames": 2, "rollout": "data", "critic_steps": 1})
    run = tiny.RecordedRun("distill", recipe, workdir).train()
    assert run.batches_read[0]["latents"].shape == (2, 2, 2, *recipe.latent_shape[1:])


def test_no_buffer_of_a_state_is_two_of_its_arrays():
    """A donated state whose EMA shares the buffers of its parameters would be freed under a checkpoint."""
    network = update.init_trainable({"a": jnp.ones(4), "b": jnp.zeros((2, 2))}, optax.adam(1e-3))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((network.params, network.ema))]
    assert len(set(pointers)) == 4


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="5 latent frames do not fit blocks"):
        tiny.tiny_recipe(causal={"frames_per_block": 3, "window": 3}, train_distill={"frames": 5})
    two = {"frames": 2, "continuation_prob": 0.5}
    with pytest.raises(ConfigError, match=r"continues 3 latent frames \(causal.window 4, sink 0, .* which has 2"):
        tiny.tiny_recipe(causal={"window": 4}, train_distill=two)
    with pytest.raises(ConfigError, match=r"continues 3 latent frames \(causal.window 3, sink 1, .* which has 2"):
        tiny.tiny_recipe(causal={"window": 3, "sink": 1}, train_distill=two)
    tiny.tiny_recipe(causal={"window": 2, "sink": 1}, train_distill=two)


def test_prompt_switches_in_parts_of_one_clip_are_refused():
    with pytest.raises(ConfigError, match="train_init.prompt_switch_prob is 0.5.*one clip per part, and needs two"):
        tiny.tiny_recipe(train_init={"prompt_switch_prob": 0.5, "accumulate": 2})


# ---- flow matching, against numpy, on a network that is a formula ---------------------------------------------------

RECIPE = tiny.tiny_recipe(train_teacher={"caption_dropout": 0.5}, train_causal={"prompt_switch_prob": 0.5})
NEGATIVE = np.full((8, RECIPE.text.dim), 7.0, np.float32)


def batch_of(size=6):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((size, *RECIPE.latent_shape)).astype(np.float32)
    return {"latents": latents, "text": rng.standard_normal((size, 8, RECIPE.text.dim)).astype(np.float32)}


@pytest.fixture
def inputs(monkeypatch):
    """Record the networks' inputs; the velocity is ``x / 2`` plus a tenth of the mean of each clip's text."""
    seen = {}

    def network(params, x, timestep, text, **options):
        seen.update(options, x=np.asarray(x), timestep=np.asarray(timestep), text=np.asarray(text))
        return x / 2 + 0.1 * text.mean((1, 2))[:, None, None, None, None]

    monkeypatch.setattr(transformer, "bidirectional", network)
    monkeypatch.setattr(transformer, "block_causal", network)
    return seen


def expected_loss(batch, noise, sigma, text):
    """Return the mean of ``(v(x_t) - (noise - x0))^2`` and x_t."""
    sigma = sigma[:, :, None, None, None]
    x_t = (1 - sigma) * batch["latents"] + sigma * noise
    velocity = x_t / 2 + 0.1 * text.mean((1, 2))[:, None, None, None, None]
    return np.mean((velocity - (noise - batch["latents"])) ** 2), x_t


def shifted(u, shift=3.0):
    return shift * u / (1 + (shift - 1) * u)


def test_teacher_loss_matches_numpy(inputs):
    batch, key = batch_of(), jax.random.key(3)
    loss, _ = flow_matching.teacher_loss(None, batch, key, recipe=RECIPE, negative_prompt_embeds=NEGATIVE)
    u_key, noise_key, drop_key = jax.random.split(key, 3)
    sigma = shifted((np.arange(6) + np.asarray(jax.random.uniform(u_key, (6,)))) / 6)[:, None] * np.ones((1, 3))
    dropped = np.asarray(jax.random.uniform(drop_key, (6, 1, 1))) < 0.5
    assert 0 < dropped.sum() < 6
    text = np.where(dropped, NEGATIVE, batch["text"])
    expected, x_t = expected_loss(batch, np.asarray(jax.random.normal(noise_key, batch["latents"].shape)), sigma, text)
    np.testing.assert_allclose(inputs["timestep"], 1000 * sigma, rtol=1e-5)
    np.testing.assert_allclose(inputs["x"], x_t, atol=1e-5)
    np.testing.assert_array_equal(inputs["text"], text)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    flow_matching.teacher_loss(None, batch, key, recipe=RECIPE)
    np.testing.assert_array_equal(inputs["text"], np.where(dropped, 0, batch["text"]))
    handed = {"sigma": jnp.full((6, 3), 0.25), "noise": jnp.ones_like(batch["latents"])}
    flow_matching.teacher_loss(None, batch, key, recipe=RECIPE, **handed)
    np.testing.assert_allclose(inputs["x"], 0.75 * batch["latents"] + 0.25, atol=1e-6)


def test_causal_loss_matches_numpy(inputs):
    batch, key = batch_of(), jax.random.key(5)
    loss, _ = flow_matching.causal_loss(None, batch, key, recipe=RECIPE, negative_prompt_embeds=NEGATIVE)
    u_key, noise_key, drop_key, _ = jax.random.split(key, 4)
    sigma = shifted(np.asarray(jax.random.uniform(u_key, (6, 3))))  # blocks of one frame, each at a level of its own
    dropped = np.asarray(jax.random.uniform(drop_key, (6, 1, 1))) < RECIPE.train_causal.caption_dropout
    text = np.where(dropped, NEGATIVE, batch["text"])
    expected, x_t = expected_loss(batch, np.asarray(jax.random.normal(noise_key, batch["latents"].shape)), sigma, text)
    np.testing.assert_allclose(inputs["timestep"], 1000 * sigma, rtol=1e-5)
    np.testing.assert_allclose(inputs["x"], x_t, atol=1e-5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # The clean context is the clip itself, or in a switched clip a beginning of the next one.
    own = (inputs["clean"] == batch["latents"]).all((2, 3, 4))
    other = (inputs["clean"] == np.roll(batch["latents"], -1, 0)).all((2, 3, 4))
    assert (own ^ other).all() and own[:, -1].all() and 0 < other[:, 0].sum() < 6
    assert (np.diff(own.astype(int), axis=1) >= 0).all()
    assert inputs["clean_timestep"] == RECIPE.causal.context_noise
    handed = {"sigma": jnp.full((6, 3), 0.75), "noise": jnp.ones_like(batch["latents"])}
    flow_matching.causal_loss(None, batch, key, recipe=RECIPE, **handed)
    np.testing.assert_allclose(inputs["x"], 0.25 * batch["latents"] + 0.75, atol=1e-6)


@pytest.mark.parametrize("stage", ["causal", "consistency", "distill"])
def test_the_noise_of_the_context_is_not_that_of_the_target(inputs, stage, monkeypatch):
    """``fold_in(key, 1)`` is ``split(key)[1]``, so the same number of both would give the same noise."""
    causal = {"context_noise": 500.0, "add_context_noise": "always"}
    distill = {"teacher": "causal", "critic_mode": "causal"}
    recipe = tiny.tiny_recipe(causal=causal, train_causal={"prompt_switch_prob": 0.0}, train_distill=distill)
    batch, key = batch_of(), jax.random.key(7)
    if stage == "distill":  # the scores read the student's output, here the clips, as its past
        monkeypatch.setattr(dmd, "generate", lambda params, batch, key, *, recipe: (batch["latents"], None, None))
        monkeypatch.setattr(dmd, "apply_update", lambda _, loss_fn, batch, key, *__, **___: loss_fn({}, batch, key))
        given = {"step": 0, "teacher": {}, "critic": {}, "negative_prompt_embeds": NEGATIVE, "optimizer": None}
        dmd.student_update(None, None, batch, key, recipe=recipe, finite=True, **given)
    elif stage == "causal":
        flow_matching.causal_loss(None, batch, key, recipe=recipe)
    else:
        state = types.SimpleNamespace(network=types.SimpleNamespace(averaged=None), step=0)
        consistency.consistency_loss(None, batch, key, state=state, frozen=(None, NEGATIVE), recipe=recipe)
    if stage == "distill":  # with guidance both branches of a clip
        inputs |= {name: inputs[name][::2] for name in ("x", "timestep", "clean")}
    sigma = inputs["timestep"][:, :, None, None, None] / 1000
    target = (inputs["x"] - (1 - sigma) * batch["latents"]) / sigma
    context = (inputs["clean"] - 0.5 * batch["latents"]) / 0.5
    np.testing.assert_allclose([target.std(), context.std()], 1, atol=0.1)
    independent = np.corrcoef([x.ravel() for x in (target, context, batch["latents"])])
    np.testing.assert_allclose(independent, np.eye(3), atol=0.1)


# ---- distillation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,stages",
    [
        ({}, ["teacher", "init"]),
        ({"init": "teacher"}, ["teacher", "teacher"]),
        ({"teacher": "causal"}, ["causal", "init", "teacher"]),
        ({"teacher": "causal", "critic_init": "student"}, ["causal", "init"]),
    ],
)
def test_the_networks_of_the_distillation_come_from_their_stages(workdir, monkeypatch, changes, stages):
    loaded, original = [], weights.load_network

    def load(run, stage, config, path=None):
        loaded.append((stage, original(run, stage, config, path)))
        return loaded[-1][1]

    monkeypatch.setattr(weights, "load_network", load)
    recipe = tiny.tiny_recipe(train_distill={"steps": 1} | changes)
    run = tiny.RecordedRun("distill", recipe, workdir)
    monkeypatch.setattr(run, "batches", lambda read, to_device: iter(()))
    run.train()
    assert [stage for stage, _ in loaded] == stages
    state, trees = run.states[0], dict(loaded)
    critic = trees["init" if changes.get("critic_init") == "student" else "teacher"]
    for tree, expected in (
        (state.student.params, loaded[1][1]),
        (state.student.ema, loaded[1][1]),
        (state.critic.params, critic),
    ):
        jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_the_causal_teacher_is_read_as_it_was_trained(inputs):
    recipe = tiny.tiny_recipe(train_distill={"teacher": "causal"})
    batch = batch_of(2)
    twice = np.repeat(batch["latents"], 2, axis=0)  # guidance: both branches of each clip side by side
    dmd.real_score(
        None, twice, np.ones((4, 3)), np.repeat(batch["text"], 2, axis=0), clean=batch["latents"], recipe=recipe
    )
    np.testing.assert_array_equal(inputs["clean"], twice)
    assert inputs["clean_timestep"] == recipe.causal.context_noise and inputs["causal"] == recipe.causal


def test_optimizers_and_text_of_the_distillation(workdir, monkeypatch, only_traced):
    """Each network has its own optimizer and steps; the real score reads captions and the negative prompt."""
    made, inputs, captions = [], [], []
    original, embeds = dmd.make_optimizer, weights.prompt_embeds
    monkeypatch.setattr(
        weights, "prompt_embeds", lambda batch, reader: captions.extend(batch["caption"]) or embeds(batch, reader)
    )
    monkeypatch.setattr(
        dmd, "make_optimizer", lambda config, steps: made.append((config, steps)) or original(config, steps)
    )

    def recorded(step, state, teacher, batch, negative_prompt_embeds, **options):
        inputs.append(jax.tree.map(np.array, (teacher, batch["text"], negative_prompt_embeds)))
        return step(state, teacher, batch, negative_prompt_embeds, **options)

    tiny.watch_dmd_steps(monkeypatch, recorded)
    recipe = tiny.tiny_recipe(
        text={"negative_prompt": "red"},
        train_distill={"steps": 1, "critic_steps": 3}
        | {"optimizer": {"learning_rate": 0.01}, "critic_optimizer": {"learning_rate": 0.02}},
    )
    tiny.RecordedRun("distill", recipe, workdir).train()
    config = recipe.train_distill
    assert set(made) == {(config.optimizer, 1), (config.critic_optimizer, 3)}
    teacher, text, negative_prompt_embeds = inputs[0]
    saved = store.load_params(workdir / "teacher" / "weights.safetensors")[0]
    jax.tree.map(np.testing.assert_array_equal, teacher, saved)
    words = {word: i for i, word in enumerate(recipe.text.vocabulary)}
    one_hot = np.zeros((*text.shape[:3], len(words)), np.float32)
    for position, caption in zip(np.ndindex(text.shape[:2]), captions, strict=False):
        for i, word in enumerate((caption.decode() if isinstance(caption, bytes) else str(caption)).split()):
            one_hot[(*position, i, words[word])] = 1
    np.testing.assert_array_equal(text[..., : len(words)] != 0, one_hot != 0)
    assert negative_prompt_embeds[0, words["red"]] != 0 and (negative_prompt_embeds != 0)[:, : len(words)].sum() == 1


@pytest.mark.parametrize("include_clean,mask_clean", [(True, True), (True, False), (False, True)])
def test_the_losses_of_a_data_rollout_count_its_noisy_frames(inputs, include_clean, mask_clean):
    """Without ``mask_clean`` they count all frames, as the published code does."""
    changes = {"rollout": "data", "include_clean": include_clean, "mask_clean": mask_clean}
    recipe = tiny.tiny_recipe(train_distill=changes)
    _, mask, end = dmd.generate(None, batch_of(), jax.random.key(1), recipe=recipe)
    noisy = inputs["timestep"] > 0
    assert noisy.all() != include_clean and end is None
    if include_clean and mask_clean:
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, noisy)
    else:
        assert mask is None


def test_the_losses_of_a_continued_rollout_leave_its_first_frame_out(monkeypatch):
    monkeypatch.setattr(dmd, "self_rollout", lambda rollout, params, text, key, *, shape, **_: jnp.zeros(shape))
    batch = {"text": batch_of(2)["text"], "context": jnp.zeros((2, 1, *RECIPE.latent_shape[1:]))}
    for continued in (True, False):
        batch["has_context"] = jnp.full(2, continued)
        _, mask, _ = dmd.generate(None, batch, jax.random.key(0), recipe=RECIPE)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, [[not continued, True, True]] * 2)
    assert dmd.generate(None, {"text": batch["text"]}, jax.random.key(0), recipe=RECIPE)[1] is None


@pytest.mark.parametrize("switch", [0.0, 1.0])
def test_a_continued_rollout_has_the_context_of_a_stream(monkeypatch, switch):
    """Latents are the numbers of their frames in the stream: three rollouts of 12 frames."""
    distill = {"frames": 12, "loss_frames": 8, "continuation_prob": 1.0, "prompt_switch_prob": switch}
    recipe = tiny.changed(tiny.stream_recipe(window=6, sink=3), train_distill=distill)
    numbers, contexts = iter((range(12), range(12, 24), range(24, 36))), []

    def count(rollout, params, text, key, *, shape, context, has_context):
        contexts.append(context[1, :, 0, 0, 0].tolist() if has_context else [])
        return jnp.broadcast_to(jnp.array(next(numbers), jnp.float32)[:, None, None, None], shape)

    monkeypatch.setattr(dmd, "self_rollout", count)
    text = batch_of(2)["text"]
    previous = dmd.no_past(recipe, 2)
    for _ in range(3):
        batch, key = dmd.with_context({"text": text}, previous, jax.random.key(0), recipe.train_distill, recipe.causal)
        x0, _, end = dmd.generate(None, batch, key, recipe=recipe)
        assert x0.shape[1] == 8
        previous = {"latents": end, "text": text, "rollouts": jnp.array(1)}
    # Blocks have two frames: two blocks hold the sink of three, and a window of six shows two earlier blocks.
    kept, last = [[0, 1, 2, 3, *range(end - 4, end)] for end in (12, 24)], [[*range(end - 8, end)] for end in (12, 24)]
    assert contexts == [[], *(last if switch else kept)]


def test_a_moved_sink_is_refused_where_training_does_not_move_it(tmp_path):
    causal = {"window": 1, "sink": 1, "positions": "relative"}
    data, causal_score = ({"train_distill": changes} for changes in ({"rollout": "data"}, {"teacher": "causal"}))
    for name, changes in (("causal", {}), ("init", {}), ("distill", data), ("distill", causal_score)):
        recipe = tiny.tiny_recipe(causal=causal, **changes)
        with pytest.raises(ConfigError, match=f"stage {name} reads clips of 3 latent frames .* after 2 frames: use"):
            tiny.RecordedRun(name, recipe, tmp_path / name).train()
    weights.check_sink_positions(tiny.tiny_recipe(causal=causal | {"window": 2}), "init")
    weights.check_sink_positions(tiny.tiny_recipe(causal=causal | {"positions": "absolute"}), "init")
    weights.check_sink_positions(tiny.tiny_recipe(causal=causal, train_distill={"loss_frames": 2}), "distill")


def test_a_vae_whose_decoder_alone_is_trained_keeps_the_statistics_of_its_latents(workdir, tmp_path, monkeypatch):
    """Measured again on other clips they would shift the latents of all networks trained on them."""
    params, _ = store.load_params(workdir / "vae" / "weights.safetensors")
    known = {"latent_mean": "[1.0, 2.0, 3.0, 4.0]", "latent_std": "[0.5, 0.5, 0.5, 0.5]"}
    store.save_params(tmp_path / "vae.safetensors", params, known)
    anew = {"latent_mean": "[0.0, 0.0, 0.0, 0.0]", "latent_std": "[1.0, 1.0, 1.0, 1.0]"}
    monkeypatch.setattr(autoencoder.sources, "clips", lambda *_: None)
    monkeypatch.setattr(autoencoder, "latent_statistics", lambda *_: ((0.0,) * 4, (1.0,) * 4))
    for first, expected in ((0, known), (1, anew), (9, anew)):
        changes = {"steps": 4, "decoder_from": first}
        run = tiny.RecordedRun("vae", tiny.tiny_recipe(train_vae=changes), tmp_path / "run")
        written = []
        monkeypatch.setattr(run, "batches", lambda read, to_device: iter(()))
        monkeypatch.setattr(run, "finish", lambda params, metadata, to=written: to.append(metadata))
        autoencoder.train_vae(run, tmp_path / "vae.safetensors")
        assert {name: written[0][name] for name in known} == expected
    recipe = tiny.tiny_recipe(train_vae={"steps": 4, "decoder_from": 0})
    with pytest.raises(ConfigError, match="decoder_from is 0, and new weights would leave the encoder random"):
        autoencoder.train_vae(tiny.RecordedRun("vae", recipe, tmp_path))
    monkeypatch.setattr(export.checkpoint, "read", lambda *_: (1, params, {"config": to_json(recipe)}))
    with pytest.raises(ConfigError, match="only the finished run has the statistics of its latents"):
        export.export_checkpoint(tmp_path, "vae", tmp_path / "early.safetensors")


# ---- update ---------------------------------------------------------------------------------------------------------


def test_key_ema_and_step_of_an_update_follow_their_formulas():
    config = tiny.tiny_recipe(
        train_teacher={"seed": 3, "optimizer": {"ema_decay": 0.75, "ema_start": 2, "learning_rate": 0.5}}
    ).train_teacher
    draws = []

    def loss(params, batch, key):
        jax.debug.callback(lambda x: draws.append(float(x)), jax.random.normal(key))
        value = (batch * params["w"]).mean()
        return value, {"loss": value}

    optimizer = optax.sgd(0.5)
    step = update.make_train_step(loss, optimizer, config)
    state = update.init_state({"w": jnp.ones(2)}, optimizer)
    params, ema, gradient = np.ones(2), np.ones(2), np.array([1.0, 2.0]) / 2
    for i in range(4):
        state, metrics = step(state, jnp.array([1.0, 2.0]))
        jax.effects_barrier()
        assert draws[-1] == float(jax.random.normal(jax.random.fold_in(jax.random.key(3), i)))
        params = params - 0.5 * gradient
        ema = 0.75 * ema + 0.25 * params if i >= 2 else params
        np.testing.assert_allclose(state.network.params["w"], params, rtol=1e-6)
        np.testing.assert_allclose(state.network.ema["w"], ema, rtol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-6)
        assert int(state.step) == i + 1


def test_an_infinite_gradient_with_a_finite_loss_is_refused():
    def loss(params, batch, key):
        value = jnp.sqrt(params["w"]).sum()  # 0, with an infinite slope
        return value, {"loss": value}

    config = dataclasses.replace(RECIPE.train_teacher, on_bad_loss="skip")
    optimizer = optax.sgd(0.5)
    state = update.init_state({"w": jnp.zeros(2)}, optimizer)
    state, metrics = update.make_train_step(loss, optimizer, config)(state, jnp.zeros(2))
    assert metrics["loss"] == 0 and np.isinf(metrics["gradient_norm"]) and int(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state.network.params["w"], 0)
    assert int(state.step) == 0
