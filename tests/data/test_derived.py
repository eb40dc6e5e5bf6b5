import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import (
    CausalConfig,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    Recipe,
    TextConfig,
    TransformerConfig,
    VAEConfig,
    VideoConfig,
)
from causvid_jax.data import arrays, derived, digits, moving_digits
from causvid_jax.diffusion import flow
from causvid_jax.models import text, transformer, vae
from causvid_jax.weights import stages, store

DATA = DataConfig(train_clips=5, test_clips=1, digit_size=8)
WORDS = digits.vocabulary(DATA)
NET = TransformerConfig(
    dim=16, ffn_dim=16, num_heads=2, num_layers=1, in_channels=4, out_channels=4, patch_size=(1, 2, 2), text_length=8,
    text_dim=len(WORDS) + 8, freq_dim=8,
)  # fmt: skip
RECIPE = Recipe(
    name="small",
    video=VideoConfig(height=16, width=16, frames=5),
    text=TextConfig(kind="words", vocabulary=WORDS, length=8, dim=len(WORDS) + 8),
    data=DATA,
    vae=VAEConfig(base_dim=4, dim_mult=(1, 1, 1), temporal_downsample=(True, True), num_res_blocks=1, z_dim=4),
    teacher=NET,
    student=NET,
    causal=CausalConfig(frames_per_block=1),
    diffusion=DiffusionConfig(shift=3.0, teacher_steps=4, guidance=2.0, student_steps=(1000.0, 500.0)),
)
PROMPTS = derived.prompt_sequence(digits.captions(DATA, "train"), 5, 0)


@pytest.fixture(scope="module")
def teacher():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), transformer.abstract(NET))


@pytest.fixture(scope="module")
def autoencoder():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), vae.abstract(RECIPE.vae))


@pytest.fixture(scope="module")
def written(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("trajectories")
    assert derived.write_trajectories(folder, teacher, RECIPE, PROMPTS, chunk=3, batch=1, progress=False)
    return folder


def test_latents_are_the_encoded_clips(tmp_path, autoencoder):
    moving_digits.prepare(tmp_path / "data", DATA, RECIPE.video)
    source = moving_digits.source(tmp_path / "data", DATA, RECIPE.video, "train")
    params = autoencoder
    config = dataclasses.replace(RECIPE.vae, latent_mean=(0.1,) * 4, latent_std=(0.5,) * 4)
    assert derived.write_latents(tmp_path / "l", source, params, config, clips="x", chunk=3, batch=1, progress=False)
    latents = arrays.source(tmp_path / "l")
    assert len(latents) == 5 and latents[0]["latents"].shape == derived.latent_shape(RECIPE) == (2, 4, 4, 4)
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
        x = x + (sigmas[i + 1] - sigmas[i]) * (unconditional + 2.0 * (conditional - unconditional))
        states.append(x)
    expected = np.stack([states[i][0] for i in (0, 2, 4)])
    assert np.abs(expected[2] - expected[0]).max() > 0.1
    np.testing.assert_allclose(source[4]["trajectory"], expected, atol=4e-3)
    assert [source[i]["caption"].decode() for i in range(5)] == PROMPTS


def test_another_teacher_is_refused(written, teacher):
    other = jax.tree.map(lambda x: x + 1, teacher)
    with pytest.raises(ConfigError, match="teacher was"):
        derived.write_trajectories(written, other, RECIPE, PROMPTS, chunk=3, batch=1, progress=False)


def test_prompts_cover_every_caption_once_per_round_and_grow_at_the_end():
    captions = digits.captions(DATA, "train")
    prompts = derived.prompt_sequence(captions, 1200, 0)
    assert sorted(prompts[:504]) == sorted(prompts[504:1008]) == sorted(captions) and len(prompts) == 1200
    assert prompts[:504] != prompts[504:1008]
    assert derived.prompt_sequence(captions, 700, 0) == prompts[:700]


def test_stage_weights_are_found_and_carry_latent_statistics(tmp_path, autoencoder):
    with pytest.raises(ConfigError, match="--stage=vae"):
        stages.find("small", "vae", tmp_path)
    path = stages.stage_path(tmp_path, "vae")
    params = autoencoder
    config = dataclasses.replace(RECIPE.vae, latent_mean=(0.25,) * 4, latent_std=(2.0,) * 4)
    store.save_params(path, params, stages.vae_metadata(config))
    assert stages.find("small", "vae", tmp_path) == path
    loaded, measured = stages.load_vae(path, RECIPE.vae)
    assert measured == config
    assert derived.weights_digest(loaded) == derived.weights_digest(params)
    with pytest.raises(ConfigError, match="VAE weights"):
        stages.load_vae(path, dataclasses.replace(RECIPE.vae, base_dim=8))
