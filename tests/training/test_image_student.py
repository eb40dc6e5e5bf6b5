"""A causal student with an image branch: its stream, its training stages, its data, the gradient of its picture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import causvid_jax as cv
from causvid_jax import media
from causvid_jax.checkpoints import workdir
from causvid_jax.config import ConfigError
from causvid_jax.data import arrays, generate, pictures, pipeline
from causvid_jax.distill import exit_steps, replay, rollout
from causvid_jax.models import clip_vision, transformer
from causvid_jax.models.image_branch import Picture, image_condition
from causvid_jax.sampling import session, stream
from causvid_jax.sampling.request import SampleRequest
from causvid_jax.training import dmd, flow_matching, ode, samples
from tests import tiny

CLIP, CHANGES = tiny.CLIP, tiny.IMAGE
RECIPE = tiny.tiny_recipe(
    **CHANGES, train_init={"steps": 2}, train_distill={"steps": 2, "critic_steps": 1}, diffusion={"guidance_scale": 2.0}
)
NET = RECIPE.student
PARAMS = jax.tree.map(jnp.asarray, tiny.random_transformer(NET, 3))
PROMPT = "a red 3 moving left"


def picture(batch=2, frames=3):
    """Return a random picture with the mask of a known first frame."""
    keys = jax.random.split(jax.random.key(5))
    latents = image_condition(jax.random.normal(keys[0], (batch, frames, *RECIPE.latent_shape[1:])))
    return Picture(latents, jax.random.normal(keys[1], (batch, CLIP.tokens, CLIP.dim)))


@pytest.mark.parametrize(("window", "frames", "size"), [(0, 4, 2), (2, 5, 1)])
def test_the_stream_equals_one_block_causal_pass(window, frames, size):
    """With one step, block by block, x0 = noise - v(noise, 1000 | clean past). Frame 5 is beyond the clip's three."""
    causal = dataclasses.replace(RECIPE.causal, window=window, frames_per_block=size, context_noise=100.0)
    diffusion = dataclasses.replace(RECIPE.diffusion, denoising_timesteps=(1000.0,))
    video = dataclasses.replace(RECIPE.video, frames=1 + 4 * (frames - 1))
    recipe = dataclasses.replace(RECIPE, causal=causal, diffusion=diffusion, video=video)
    shown, text = picture(), jax.random.normal(jax.random.key(0), (2, 8, recipe.text.dim))
    noise = jax.random.normal(jax.random.key(1), (2, frames, *recipe.latent_shape[1:]))
    state = stream.init_stream({"student": PARAMS}, text, config=recipe, picture=shown)
    parts = []
    for start in range(0, frames, size):
        block = noise[:, start : start + size]
        latents, state = stream.next_block({"student": PARAMS}, state, config=recipe, noise=block[None])
        parts.append(latents)
    latents = jnp.concatenate(parts, axis=1)
    by_hand = jnp.concatenate([shown.latents, jnp.repeat(shown.latents[:, 2:], frames - 3, axis=1)], axis=1)
    velocity = jax.jit(functools.partial(transformer.block_causal, config=NET, causal=causal, clean_timestep=100.0))(
        PARAMS,
        jnp.concatenate([noise, by_hand], axis=-1),
        jnp.full((2, frames), 1000.0),
        text,
        shown.embeds,
        clean=jnp.concatenate([latents, by_hand], axis=-1),
    )
    np.testing.assert_allclose(latents, noise - velocity, atol=2e-5)
    other = stream.init_stream({"student": PARAMS}, text, config=recipe, picture=Picture(shown.latents, -shown.embeds))
    changed, _ = stream.next_block({"student": PARAMS}, other, config=recipe, noise=noise[None, :, :size])
    assert np.abs(changed - parts[0]).max() > 1e-3


def test_replay_equals_the_rollout_and_the_picture_has_a_gradient():
    settings = exit_steps.Rollout(NET, dataclasses.replace(RECIPE.causal, window=0), (1000.0, 750.0))
    text, key, shape = jax.random.normal(jax.random.key(0), (2, 8, RECIPE.text.dim)), jax.random.key(2), (2, 3, 4, 4, 4)
    weight = jax.random.normal(jax.random.key(3), shape)

    @functools.partial(jax.jit, static_argnames="run")
    def loss(params, shown, run):
        x0 = run(settings, params, text, key, shape=shape, exit_step=1, picture=shown)
        return jnp.sum(weight * x0), x0

    values = {}
    for run in (rollout.self_rollout, replay.replay_rollout):
        (_, x0), slope = jax.value_and_grad(loss, has_aux=True)(PARAMS, picture(), run=run)
        values[run] = x0
        for leaf in (slope["image_embedding"]["fc1"]["kernel"], slope["blocks"]["cross_attn"]["k_img"]["kernel"]):
            assert np.abs(leaf).max() > 1e-4
        # Of the input, rows 16 to 47 read mask and picture: (2 x 2 patch) x 12 channels, channels last.
        rows = slope["patch_embedding"]["kernel"].reshape(4, 12, -1)[:, 4:]
        assert np.abs(rows).max() > 1e-4
    np.testing.assert_allclose(*values.values(), atol=1e-5)


@pytest.mark.parametrize("loss", [flow_matching.teacher_loss, flow_matching.causal_loss, ode.init_loss])
def test_losses_have_the_slope_of_the_image_embeds(loss):
    """The derivative by CLIP's embeds along a random direction, against central differences."""
    keys = jax.random.split(jax.random.key(4), 4)
    shown = picture()
    batch = {
        "latents": jax.random.normal(keys[0], (2, *RECIPE.latent_shape)),
        "trajectory": jax.random.normal(keys[1], (2, 3, *RECIPE.latent_shape)),
        "text": jax.random.normal(keys[2], (2, 8, RECIPE.text.dim)),
        "image_latents": shown.latents,
    }
    direction = jax.random.normal(keys[3], shown.embeds.shape)
    params = jax.tree.map(jnp.asarray, tiny.random_transformer(NET, 3, 0.3))  # slopes above the rounding of the loss

    @jax.jit
    def along(step):
        images = {"image_embeds": shown.embeds + step * direction}
        return loss(params, batch | images, jax.random.key(7), recipe=RECIPE)[0]

    slope, step = jax.grad(along)(0.0), 1e-2
    assert abs(slope) > 1e-5
    np.testing.assert_allclose(slope, (along(step) - along(-step)) / (2 * step), rtol=2e-2, atol=2e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with random weights, CLIP included, and random data with pictures."""
    return tiny.image_workdir(tmp_path_factory.mktemp("image"), RECIPE)


@pytest.mark.parametrize("stage", ["causal", "init", "distill"])
def test_stages_train_the_image_branch(stage, folder):
    run = tiny.RecordedRun(stage, RECIPE, folder).train()
    assert all(np.isfinite(value) for value in run.records[0].values())
    name = "student" if stage == "distill" else "network"
    states = run.states[0], run.states[-1]  # the first update of a warm-up has a rate of 0
    before, after = (getattr(state, name).params["image_embedding"]["fc2"]["kernel"] for state in states)
    assert np.abs(after - before).max() > 1e-6
    assert run.batches_read[0]["image_embeds"].shape[-2:] == (CLIP.tokens, CLIP.dim)


def test_both_scores_read_the_picture_of_their_clip(monkeypatch):
    seen = []

    def network(params, x, timestep, text, embeds, *, config):
        seen.append((np.asarray(x), np.asarray(embeds)))
        return 0.1 * x[..., :4]

    monkeypatch.setattr(transformer, "bidirectional", network)
    monkeypatch.setattr(dmd, "generate", lambda params, batch, key, *, recipe: (batch["latents"], None, None))
    shown, config = picture(), dataclasses.replace(RECIPE.train_distill, batch_size=2)
    latents = jax.random.normal(jax.random.key(1), (2, *RECIPE.latent_shape))
    batch = {"latents": latents, "text": jnp.zeros((2, 8, RECIPE.text.dim))}
    batch |= {"image_latents": shown.latents, "image_embeds": shown.embeds}
    recipe = dataclasses.replace(RECIPE, train_distill=config)
    monkeypatch.setattr(dmd, "apply_update", lambda network, loss, batch, key, *_, **__: loss({}, batch, key))
    dmd.student_update(
        None,
        None,
        batch,
        jax.random.key(0),
        step=0,
        teacher={},
        critic={},
        negative_prompt_embeds=jnp.zeros((8, RECIPE.text.dim)),
        optimizer=None,
        recipe=recipe,
        finite=True,
    )
    assert [len(x) for x, _ in seen] == [2, 4]  # the fake score unguided, the real score guided
    for x, embeds in seen:
        rows = len(x) // 2
        np.testing.assert_array_equal(x[..., 4:], np.repeat(shown.latents, rows, axis=0))
        np.testing.assert_array_equal(embeds, np.repeat(shown.embeds, rows, axis=0))


def test_data_hold_the_first_frames(folder, tmp_path):
    """The first latent frame of condition and clip are one, since the first frame is the picture; the mask is one."""
    codec, _ = workdir.load_stage(RECIPE, "vae", folder)
    coder = pictures.open_encoder(RECIPE, codec, folder)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, 9, 16, 16, 3), np.uint8)
    source = [{"video": clip, "caption": PROMPT} for clip in video]
    assert generate.write_latents(tmp_path / "latents", source, coder, clips="two", batch=1, progress=False)
    clips = arrays.source(tmp_path / "latents")
    for example, pixels in zip(clips, video, strict=True):
        condition = example["image_latents"]
        np.testing.assert_allclose(condition[0, ..., 4:], example["latents"][0], atol=2e-3)
        np.testing.assert_array_equal(condition[..., :4].mean((1, 2, 3)), [1, 0, 0])
        whole = clip_vision.preprocess(jnp.asarray(media.to_float(pixels[:1])), config=CLIP)
        embeds = clip_vision.encode(coder.params["image_encoder"], whole, config=CLIP)[0]
        np.testing.assert_allclose(example["image_embeds"], embeds, atol=5e-2, rtol=5e-3)
    batch = next(pipeline.example_batches(clips, batch_size=2, seed=0, frames=2))
    assert batch["image_latents"].shape[1] == 2 and batch["image_embeds"].shape == (2, CLIP.tokens, CLIP.dim)

    options = {"chunk": 2, "batch": 1, "progress": False}
    prompts = [example["caption"].decode() for example in clips]
    assert generate.write_trajectories(tmp_path / "bi", PARAMS, RECIPE, prompts, clips=clips, **options)
    causal = {"count": 2, "identity": "two", **options}
    assert generate.write_causal_trajectories(tmp_path / "causal", PARAMS, RECIPE, clips, **causal)
    for name in ("bi", "causal"):
        for example, clip in zip(arrays.source(tmp_path / name), clips, strict=True):
            np.testing.assert_array_equal(example["image_latents"], clip["image_latents"])
            assert np.isfinite(example["trajectory"]).all()


def test_a_stream_from_a_picture(folder, tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    pipe = cv.load(RECIPE, checkpoint=folder)
    state, frames = pipe.stream(PROMPT, image=image), []
    for part, state in pipe.frames(state, blocks=3):  # noqa: B007, B020
        frames.append(part)
    state = pipe.switch(state, "a blue 7 moving up")
    np.testing.assert_array_equal(state.picture.latents[:, 0, ..., :4], 1)
    with pytest.raises(ConfigError, match="the student has image_dim = 80.*accepted: image_embeds and image_latents"):
        pipe.stream(PROMPT)
    clip = cv.load_teacher(RECIPE, checkpoint=folder).stream(PROMPT, image=image)
    assert clip.picture.embeds.shape == (1, CLIP.tokens, CLIP.dim)

    # The program gives the same frames, and training samples start from pictures of the data.
    Image.fromarray(image).save(tmp_path / "first.png")
    request = {"config": RECIPE, "prompt": (PROMPT,), "checkpoint": str(folder), "upscale": 1, "frames": 9}
    with pytest.raises(ConfigError, match="the student of recipe 'tiny' has an image branch; it starts from a picture"):
        SampleRequest(**request)
    request |= {"image": str(tmp_path / "first.png"), "output": str(tmp_path / "out.gif")}
    opened = session.open_session(SampleRequest(**request))
    texts = {PROMPT: np.asarray(pipe.encode_prompt(PROMPT))[0]}
    played = np.concatenate(list(session.student_blocks(opened, texts, session.player.Timing())), axis=1)
    assert np.abs(played.astype(int) - np.concatenate(frames, axis=1)).max() <= 1
    captions, shown = samples.examples(RECIPE, folder, 2)
    assert len(captions) == 2 and shown.latents.shape == (2, *RECIPE.latent_shape[:3], 8)


def test_what_a_picture_does_not_go_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train_causal.prompt_switch_prob is 0.5, but a network has an image branch"):
        tiny.tiny_recipe(**CHANGES | {"train_causal": {"prompt_switch_prob": 0.5}})
    with pytest.raises(ConfigError, match="student.in_channels is 9; accepted: 4, or 12"):
        tiny.tiny_recipe(student={"in_channels": 9})
    place = tiny.tiny_workdir(tmp_path)
    with pytest.raises(ConfigError, match="latents of latents have no image_latents and no image_embeds, which"):
        samples.examples(RECIPE, place, 2)
