import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ConfigError, TAEHVConfig
from causvid_jax.data import arrays, digits, generate, moving_digits, pictures, pipeline, trajectories
from causvid_jax.diffusion import flow
from causvid_jax.distill.trajectories import teacher_trajectory
from causvid_jax.media import to_uint8
from causvid_jax.models import transformer, vae
from causvid_jax.sampling import stream
from causvid_jax.text import words as text
from tests.tiny import changed, random_params, tiny_recipe

RECIPE = tiny_recipe(
    video={"frames": 5},
    data={"train_clips": 5, "test_clips": 1},
    causal={"window": 0},
    diffusion={"num_inference_steps": 4, "guidance_scale": 2.0, "guidance_interval": (900.0, 1000.0)},
)
DATA, NET = RECIPE.data, RECIPE.teacher
PROMPTS = generate.prompt_sequence(digits.captions(DATA, "train"), 5, 0)


@pytest.fixture(scope="module")
def teacher():
    return random_params(transformer.abstract(NET), 0, 0.3)


@pytest.fixture(scope="module")
def autoencoder():
    return random_params(vae.abstract(RECIPE.vae), 1, 0.2)


@pytest.fixture(scope="module")
def written(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("trajectories")
    assert generate.write_trajectories(folder, teacher, RECIPE, PROMPTS, chunk=3, batch=1, progress=False)
    return folder


def test_latents_are_the_encoded_clips(tmp_path, autoencoder):
    moving_digits.prepare(tmp_path / "data", DATA, RECIPE.video)
    source = moving_digits.source(tmp_path / "data", DATA, RECIPE.video, "train")
    params = autoencoder
    config = dataclasses.replace(RECIPE.vae, latent_mean=(0.1,) * 4, latent_std=(0.5,) * 4)
    coder = pictures.ClipEncoder(dataclasses.replace(RECIPE, vae=config), {"vae": params})
    assert generate.write_latents(tmp_path / "l", source, coder, clips="x", chunk=3, batch=1, progress=False)
    latents = arrays.source(tmp_path / "l")
    assert len(latents) == 5 and latents[0]["latents"].shape == RECIPE.latent_shape == (2, 4, 4, 4)
    encode = jax.jit(lambda v: vae.encode(params, v, config=config))
    for i in (0, 2, 4):
        video = source[i]["video"].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(latents[i]["latents"], encode(video[None])[0], atol=2e-3)
        assert latents[i]["caption"] == source[i]["caption"]


def test_trajectories_follow_the_guided_teacher(written, teacher):
    source = arrays.source(written)
    assert len(source) == 5
    sigmas = flow.teacher_sigmas(RECIPE.diffusion)  # 500 is step 2 of 4

    @jax.jit
    def velocity(x, timestep, rows):
        return transformer.bidirectional(teacher, x, timestep, rows, config=NET)

    rows, null = (jnp.asarray(text.encode_words([p], RECIPE.text)) for p in (PROMPTS[4], ""))
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), 4), (1, 2, 4, 4, 4))
    states = [x]
    for i in range(4):
        timestep = jnp.full((1, 2), 1000 * sigmas[i], jnp.float32)
        conditional, unconditional = velocity(x, timestep, rows), velocity(x, timestep, null)
        scale = 2.0 if timestep[0, 0] >= 900.0 else 1.0
        x = x + (sigmas[i + 1] - sigmas[i]) * (unconditional + scale * (conditional - unconditional))
        states.append(x)
    expected = np.stack([states[i][0] for i in (0, 2, 4)])
    assert np.abs(expected[2] - expected[0]).max() > 0.1
    np.testing.assert_allclose(source[4]["trajectory"], expected, atol=4e-3)
    assert [source[i]["caption"].decode() for i in range(5)] == PROMPTS


def test_hosts_share_the_trajectories_and_go_on_where_they_stopped(written, teacher, tmp_path):
    options = {"chunk": 3, "batch": 1, "progress": False, "process_count": 2}
    shards = sorted(path.name for path in written.glob("*.array_record*"))
    # What host 0 had done before it was stopped is kept; host 1 makes the rest.
    (tmp_path / shards[0]).write_bytes((written / shards[0]).read_bytes())
    assert generate.write_trajectories(tmp_path, teacher, RECIPE, PROMPTS, process_id=1, **options)
    assert [path.name for path in sorted(tmp_path.glob("*.array_record*"))] == shards
    for name in shards:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_prompts_are_embedded_once_and_read_back(tmp_path):
    prompts = [*PROMPTS[:3], PROMPTS[0]]
    for _ in range(2):
        assert generate.write_prompts(tmp_path, RECIPE, prompts, chunk=3, batch=2, progress=False)
    source = arrays.source(tmp_path)
    assert [source[i]["caption"].decode() for i in range(len(source))] == prompts
    for i, rows in enumerate(text.encode_words(prompts, RECIPE.text)):
        words = len(prompts[i].split())
        np.testing.assert_array_equal(source[i]["text"], rows[:words])
    with pytest.raises(ConfigError, match="prompts was"):
        generate.write_prompts(tmp_path, RECIPE, [*prompts[1:], PROMPTS[4]], chunk=3, progress=False)


def test_another_teacher_is_refused(written, teacher):
    other = jax.tree.map(lambda x: x + 1, teacher)
    with pytest.raises(ConfigError, match="teacher was"):
        generate.write_trajectories(written, other, RECIPE, PROMPTS, chunk=3, batch=1, progress=False)


def test_prompts_cover_every_caption_once_per_round_and_grow_at_the_end():
    captions = digits.captions(DATA, "train")
    prompts = generate.prompt_sequence(captions, 1200, 0)
    assert sorted(prompts[:504]) == sorted(prompts[504:1008]) == sorted(captions) and len(prompts) == 1200
    assert prompts[:504] != prompts[504:1008]
    assert generate.prompt_sequence(captions, 700, 0) == prompts[:700]


def block_states(params, recipe, rows, null, past, noise):
    """The guided Euler states of one block, from the cached reading over a cache of its clean past."""
    net, causal, g = recipe.teacher, recipe.causal, recipe.diffusion.guidance_scale

    def velocity(rows, x, timestep):
        keys = transformer.encode_text(params, rows, config=net)
        cache = transformer.init_cache(net, causal, batch=1, height=4, width=4, frames=4)
        for frame in past:
            _, cache = transformer.cached(
                params, frame[None, None], jnp.zeros((1, 1)), keys, cache, config=net, causal=causal
            )
            cache = transformer.advance(cache, 1)
        return transformer.cached(params, x, timestep, keys, cache, config=net, causal=causal)[0]

    def guided(x, timestep):
        without = velocity(null, x, timestep)
        scale = jnp.where(timestep >= 900.0, g, 1.0)[..., None, None, None]
        return without + scale * (velocity(rows, x, timestep) - without)

    return teacher_trajectory(guided, noise, recipe.trajectory_diffusion)


def test_short_and_whole_causal_trajectories_begin_with_different_noise():
    first = [
        np.asarray(jax.random.normal(jax.random.fold_in(trajectories.causal_key(3, frames), 0), (frames or 7, 4)))[:1]
        for frames in (0, 1, 2)
    ]
    assert len({noise.tobytes() for noise in first}) == 3


def test_trajectories_of_another_negative_prompt_are_another_dataset(monkeypatch, tmp_path):
    identities = []
    monkeypatch.setattr(generate, "over_local_devices", lambda *_: (None, 1))
    monkeypatch.setattr(generate, "generate", lambda *_, identity, **options: identities.append(identity))
    for negative in ("", RECIPE.text.vocabulary[0]):
        recipe = changed(RECIPE, text={"negative_prompt": negative})
        generate.write_trajectories(tmp_path, {}, recipe, PROMPTS)
        generate.write_causal_trajectories(tmp_path, {}, recipe, [], count=1, identity="clips")
    assert identities[0] != identities[2] and identities[1] != identities[3]


def test_causal_trajectories_are_those_of_a_stream_over_the_clean_past(tmp_path, teacher):
    recipe = changed(
        RECIPE,
        video={"frames": 13},
        causal=CausalConfig(frames_per_block=1, window=3),
        train_init={"prompt_switch_prob": 0.4, "num_inference_steps": 3},
    )
    shape, rng = recipe.latent_shape, np.random.default_rng(3)
    clips = [{"latents": rng.normal(size=shape).astype(np.float16), "caption": p} for p in PROMPTS[:3]]
    assert generate.write_causal_trajectories(
        tmp_path, teacher, recipe, clips, count=4, identity="x", chunk=2, batch=2, progress=False
    )
    source = arrays.source(tmp_path)
    assert [pipeline.as_text(example["caption"]) for example in source] == [*PROMPTS[:3], PROMPTS[0]]
    null = text.encode_words([""], recipe.text)
    run = jax.jit(block_states, static_argnums=1)
    pasts = set()
    for i, example in enumerate(source):
        frames = {name: clips[j % 3]["latents"] for name, j in (("own", i), ("other", i + 1))}
        past = [next(n for n in frames if np.array_equal(frames[n][f], context))
                for f, context in enumerate(example["context"])]  # fmt: skip
        assert past == sorted(past) and past[-1] == "own"  # another clip's first, then its own
        pasts.add(past.count("other"))
        rows = text.encode_words([pipeline.as_text(example["caption"])], recipe.text)
        for block in range(0, shape[0], 3):
            begin = example["trajectory"][:1, block][:, None].astype(np.float32)
            states = run(teacher, recipe, rows, null, example["context"][:block].astype(np.float32), begin)
            np.testing.assert_allclose(example["trajectory"][:, block], states[:, 0, 0], atol=6e-3, rtol=6e-3)
    assert 0 in pasts and len(pasts) > 1


def test_a_causal_teacher_reads_its_past_with_noise_like_in_its_training(monkeypatch):
    """The velocity is minus the past, so that a trajectory ends at its noise plus the past that was read."""
    monkeypatch.setattr(transformer, "block_causal", lambda *_, clean, **__: -clean)
    causal = CausalConfig(frames_per_block=1, context_noise=500.0, add_context_noise="training")
    recipe, clips = changed(RECIPE, causal=causal), np.random.default_rng(3).normal(size=(8, *RECIPE.latent_shape))
    rows = text.encode_words([""] * 8, RECIPE.text)
    given = {"recipe": recipe, "key": jax.random.key(2), "negative": rows[0]}
    states = trajectories.causal_states({}, np.arange(8, dtype=np.uint32), rows, clips, clips, **given)
    begin, end, context = (np.asarray(states[:, i]) for i in (0, -2, -1))
    np.testing.assert_allclose(end - begin, context, atol=1e-5)
    independent = np.corrcoef([x.ravel() for x in (2 * (context - 0.5 * clips), clips, begin)])
    np.testing.assert_allclose(independent, np.eye(3), atol=0.1)


def test_streams_are_cut_into_clips_of_what_the_sampler_shows(tmp_path, teacher, autoencoder):
    """Against the sampler's scan over whole streams; the same examples whatever the batches."""
    recipe = dataclasses.replace(RECIPE, causal=CausalConfig(frames_per_block=1, window=2), decoder="taehv",
                                 taehv=TAEHVConfig(z_dim=4, decoder_dims=(4, 4, 4), temporal_downsample=(True, True),
                                                   temporal_upsample=(True, True)))  # fmt: skip
    params = {"student": teacher, "vae": autoencoder}
    for name, sizes in (("a", {"chunk": 3, "batch": 2}), ("b", {"chunk": 2, "batch": 4})):
        assert generate.write_streams(
            tmp_path / name, params, recipe, PROMPTS[:3], clips=3, seed=7, progress=False, **sizes
        )
    first, second = arrays.source(tmp_path / "a"), arrays.source(tmp_path / "b")
    assert len(first) == len(second) == 9
    assert [pipeline.as_text(example["caption"]) for example in first] == [p for p in PROMPTS[:3] for _ in range(3)]
    shown = dataclasses.replace(recipe, decoder="vae")
    rows = jnp.asarray(text.encode_words(PROMPTS[:3], recipe.text))
    latents, video = stream.generate(params, rows, config=shown, frames=6, seed=7)
    latents, video = np.asarray(latents), to_uint8(np.asarray(video))
    decode = jax.jit(vae.decode, static_argnames="config")
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        number, clip = divmod(i, 3)
        expected = latents[number, 2 * clip : 2 * clip + 2]
        np.testing.assert_allclose(one["latents"], expected, atol=4e-3, rtol=2e-3)
        assert one["video"].shape == (5, 16, 16, 3)
        part = video[number, 8 * clip : 8 * clip + 5]
        assert np.abs(one["video"].astype(int) - part).max() <= 1
        np.testing.assert_array_equal(one["latents"], other["latents"])
        if clip == 0:  # the first clip is what a decoder makes of these latents alone
            alone = to_uint8(np.asarray(decode(autoencoder, expected[None], config=recipe.vae)))[0]
            assert np.abs(one["video"].astype(int) - alone).max() <= 1
    batch = next(pipeline.stream_batches(first, batch_size=4, seed=0, frames=1))
    assert batch["video"].shape == (4, 1, 16, 16, 3) and batch["latents"].shape == (4, 1, 4, 4, 4)
    with pytest.raises(ConfigError, match=r"frames is 3; the clips have 5, so accepted: 0, or 1 \+ 4n to 5"):
        next(pipeline.stream_batches(first, batch_size=4, seed=0, frames=3))
