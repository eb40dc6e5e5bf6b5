"""A teacher of two experts (Wan2.2-A14B): published folders in both layouts become frames; who computes a timestep."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_published import tiny_recipe

import causvid_jax as cv
from causvid_jax.analysis import estimate, memory
from causvid_jax.analysis.topology import parse
from causvid_jax.checkpoints import load, state_dict, workdir
from causvid_jax.config import ConfigError, ExpertsConfig
from causvid_jax.config.recipes import load_recipe
from causvid_jax.diffusion import flow, guidance
from causvid_jax.distill import scores
from causvid_jax.models import experts, transformer, vae
from causvid_jax.sampling import weights
from causvid_jax.training import dmd_scores
from tests.tiny import random_params

LAYOUTS = {"original": ("high_noise_model", "low_noise_model"), "diffusers": ("transformer", "transformer_2")}
RECIPE = dataclasses.replace(
    tiny_recipe("wan22_t2v_a14b"),
    diffusion=dataclasses.replace(tiny_recipe("wan22_t2v_a14b").diffusion, num_inference_steps=4),
    video=dataclasses.replace(tiny_recipe("wan22_t2v_a14b").video, frames=9),
)
NET = RECIPE.teacher
PARAMS = {
    name: jax.tree.map(jnp.asarray, random_params(transformer.abstract(NET), seed))
    for seed, name in enumerate(experts.NAMES)
}
one_network = jax.jit(functools.partial(transformer.bidirectional, config=NET))
two_networks = jax.jit(functools.partial(experts.bidirectional, config=NET, experts=RECIPE.experts))


def publish(folder, layout, save):
    """Write both experts as two shards and an index each, and the VAE, as ``layout`` has them."""
    for name, inner in zip(experts.NAMES, LAYOUTS[layout], strict=True):
        state, place = state_dict(PARAMS[name], NET, layout), folder / inner
        keys, stem = list(state), "diffusion_pytorch_model"
        parts = {f"{stem}-0000{i + 1}-of-00002.safetensors": keys[i::2] for i in range(2)}
        for file, names in parts.items():
            save(place / file, {key: state[key] for key in names})
        index = {"weight_map": {key: file for file, names in parts.items() for key in names}}
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        heads = {"num_heads": 2} if layout == "original" else {"num_attention_heads": 2}
        (place / "config.json").write_text(json.dumps(heads))
    codec = state_dict(random_params(vae.abstract(RECIPE.vae), 9), RECIPE.vae, layout)
    if layout == "original":
        save(folder / "Wan2.1_VAE.safetensors", codec)
    else:
        save(folder / "vae" / "diffusion_pytorch_model.safetensors", codec)
        (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875}))
    return folder


def test_settings_of_the_published_models():
    """``sample_guide_scale`` of Wan2.2 is (low noise, high noise): (3, 4) for T2V and (3.5, 3.5) for I2V."""
    text, image = (load_recipe(f"published:wan22_{kind}_a14b") for kind in ("t2v", "i2v"))
    assert (text.experts.boundary, text.diffusion.guidance_scale, text.experts.low_noise_guidance_scale) == (875, 4, 3)
    assert (text.diffusion.shift, text.diffusion.num_inference_steps, text.diffusion.solver) == (12, 40, "unipc")
    assert (image.experts.boundary, image.diffusion.guidance_scale, image.diffusion.shift) == (900, 3.5, 5)
    assert (image.teacher.in_channels, image.teacher.image_channels, image.teacher.image_dim) == (36, 20, 0)
    assert image.experts.low_noise_guidance_scale == 0  # 3.5 for both experts
    # The boundary is a timestep after the shift: u = 0.4 is timestep 888.9 at shift 12.
    assert 1000 * flow.sigma_from_u(0.4, 12.0) > 875 > 1000 * flow.sigma_from_u(0.36, 12.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_folder_becomes_frames(layout, tmp_path, save):
    folder = publish(tmp_path, layout, save)
    pipe = cv.load_teacher(RECIPE, checkpoint=folder)
    jax.tree.map(np.testing.assert_array_equal, pipe.params["teacher"], PARAMS)
    clip = pipe.stream("a b", seed=0)
    frames = np.concatenate([part for part, _ in pipe.frames(clip)], axis=1)
    assert frames.shape == (1, 9, 32, 32, 3) and frames.std() > 0
    if layout == "original":
        return

    # Four Euler steps by hand, each with the network and the scale of its own timestep.
    steps, recipe = (
        [1000.0, 900.0, 874.0, 500.0],
        dataclasses.replace(RECIPE, diffusion=dataclasses.replace(RECIPE.diffusion, solver="euler")),
    )
    pipe = dataclasses.replace(pipe, config=recipe)
    x, text, null = clip.noise, clip.prompt_embeds, jnp.zeros_like(clip.prompt_embeds)
    for timestep, following in zip(steps, [*steps[1:], 0.0], strict=True):
        name, scale = ("high_noise", 4.0) if timestep >= 875 else ("low_noise", 3.0)
        run = functools.partial(one_network, PARAMS[name], x, jnp.full((1, 3), timestep))
        conditional, unconditional = run(text), run(null)
        velocity = unconditional + scale * (conditional - unconditional)
        x = x + (following - timestep) / 1000 * velocity
    np.testing.assert_allclose(pipe.latents(clip, timesteps=steps).latents, x, atol=2e-4)


def test_each_timestep_has_its_expert_and_its_scale():
    """In one batch with timesteps on both sides of the boundary, and for the real score of the distillation."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 3, 4, 4, 4))
    timestep = jnp.broadcast_to(jnp.array([999.0, 875.0, 874.9, 20.0])[:, None], (4, 3))
    text = jax.random.normal(keys[1], (4, 3, 10))
    own = {name: one_network(PARAMS[name], x, timestep, text) for name in experts.NAMES}
    expected = jnp.concatenate([own["high_noise"][:2], own["low_noise"][2:]])
    np.testing.assert_allclose(two_networks(PARAMS, x, timestep, text), expected, atol=1e-5)
    real = jax.jit(functools.partial(dmd_scores.real_score, PARAMS, clean=x, recipe=RECIPE))
    np.testing.assert_allclose(real(x, timestep, text), expected, atol=1e-5)
    assert np.abs(own["high_noise"] - own["low_noise"]).max() > 0.1
    scale = guidance.scale_at(timestep, 4.0, 3.0, 875.0)
    np.testing.assert_array_equal(scale[:, 0], [4, 4, 3, 3])

    # A gradient passes to the input through the expert that computed it.
    slope = jax.grad(lambda x: two_networks(PARAMS, x, timestep, text)[:2].sum())(x)
    other = jax.grad(lambda x: one_network(PARAMS["high_noise"], x, timestep, text)[:2].sum())
    np.testing.assert_allclose(slope, other(x), atol=1e-4)

    config = dataclasses.replace(RECIPE.train_distill, guidance_scale=4.0)
    both = ExpertsConfig(boundary=875.0, low_noise_distill_guidance_scale=3.0)
    conditional, unconditional = real(x, timestep, text), real(x, timestep, 0 * text)
    sigma = timestep[..., None, None, None] / 1000
    # The orthogonal part of the difference to x0, and a quarter of the parallel part.
    x0, difference = np.array(x - sigma * conditional), np.array(conditional - unconditional)
    weight = (difference * x0).sum((2, 3, 4), keepdims=True) / (x0 * x0).sum((2, 3, 4), keepdims=True)
    partial = difference - 0.75 * weight * x0
    for interval, scales, eta, part in (
        ((0.0, 1000.0), scale, 1.0, difference),
        ((500.0, 900.0), jnp.array([[1.0], [4.0], [3.0], [1.0]]), 1.0, difference),
        ((0.0, 1000.0), scale, 0.25, partial),
    ):
        _, real_x0, _ = scores.predictions(
            x,
            text,
            0 * text,
            teacher=real,
            fake=lambda x, t, e: x,
            diffusion=RECIPE.diffusion,
            distill=dataclasses.replace(config, guidance_interval=interval, guidance_eta=eta),
            timestep=timestep,
            noise=x,
            experts=both,
        )
        guided = conditional + (scales[..., None, None, None] - 1) * part
        np.testing.assert_allclose(real_x0, x - sigma * guided, atol=1e-4)


def test_experts_that_are_missing_or_cut_short_are_refused_by_name(tmp_path, save):
    folder = publish(tmp_path / "wan", "original", save)
    one = dataclasses.replace(RECIPE, experts=ExpertsConfig())
    with pytest.raises(ConfigError, match="the recipe has one teacher .experts.boundary 0.*published:wan22_t2v_a14b"):
        workdir.open_stage(one, "teacher", folder)
    with pytest.raises(ConfigError, match="is one file; a teacher of two experts"):
        weights.find(RECIPE, "teacher", str(folder / "Wan2.1_VAE.safetensors"))
    shard = folder / "low_noise_model" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ConfigError, match="low_noise_model.*lists .*00002-of-00002.safetensors, which does not exist"):
        weights.find(RECIPE, "teacher", str(folder))
    shard.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ConfigError, match="low_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors"):
        weights.find(RECIPE, "teacher", str(folder))
    (folder / "low_noise_model").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="wan holds high_noise_model but no low_noise_model; a teacher"):
        weights.find(RECIPE, "teacher", str(folder))
    with pytest.raises(ConfigError, match="elsewhere holds no teacher of two experts"):
        workdir.find_experts(tmp_path / "elsewhere")
    folder = publish(tmp_path / "other", "diffusers", save)
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    with pytest.raises(ConfigError, match="boundary_ratio 0.9, which is experts.boundary 900; the recipe has 875"):
        weights.find(RECIPE, "teacher", str(folder))


def test_what_reads_a_teacher_as_one_network_is_refused():
    config = dataclasses.replace(RECIPE.train_distill, critic_init="teacher")
    with pytest.raises(ConfigError, match="critic_init is 'teacher' with a teacher of two experts.*: 'student'"):
        dataclasses.replace(RECIPE, train_distill=config)
    with pytest.raises(ConfigError, match="low_noise_guidance_scale is 3 without experts.boundary"):
        ExpertsConfig(low_noise_guidance_scale=3.0)


def test_memory_counts_both_experts():
    one = dataclasses.replace(RECIPE, experts=ExpertsConfig())
    plans = [memory.sampling_phases(r, "teacher", batch=1, latents=3)[-2].items for r in (one, RECIPE)]
    assert plans[1]["both experts"]["float32"] == 2 * plans[0]["transformer"]["float32"]
    parts = [estimate.estimate(r, "distill", parse("h100:1")).parts["teacher"] for r in (one, RECIPE)]
    assert parts[1] == 2 * parts[0]


def test_a_checkpoint_of_one_expert_loads_alone(tmp_path, save):
    folder = publish(tmp_path, "original", save)
    alone, _ = load(folder / "high_noise_model", config=NET)
    jax.tree.map(np.testing.assert_array_equal, alone, PARAMS["high_noise"])
