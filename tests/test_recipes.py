"""The recipes of the published networks: sizes, counts and shapes, without any memory for them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, CLIPConfig
from causvid_jax.config.recipes import load_recipe
from causvid_jax.data import digits
from causvid_jax.diffusion import flow
from causvid_jax.models import clip_vision, transformer, vae
from causvid_jax.sampling import image_to_video, teacher
from causvid_jax.text import encoder
from tests.refusals import refused

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name,parameters", [("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)])
def test_published_recipes(name, parameters):
    recipe = load_recipe(str(CONFIGS / f"{name}.py"))
    assert recipe.name == name
    assert recipe.student.dtype == recipe.vae.dtype == recipe.taehv.dtype == "bfloat16"
    for net in (recipe.teacher, recipe.student):
        assert count(transformer.abstract(net)) == parameters and net.head_dim == 128
    assert count(vae.abstract(recipe.vae)) == 126_892_531
    assert (recipe.vae.latent_mean, recipe.vae.latent_std) == (WAN_LATENT_MEAN, WAN_LATENT_STD)
    assert recipe.causal.block_sizes(recipe.video.latent_frames) == (3,) * 7
    np.testing.assert_allclose(flow.student_timesteps(recipe.diffusion), [1000, 960, 888.889, 727.273], atol=1e-3)
    latents = jax.ShapeDtypeStruct((1, 21, 60, 104, 16), jnp.float32)
    timestep = jax.ShapeDtypeStruct((1, 21), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    velocity = jax.eval_shape(
        lambda p, x, t, c: transformer.bidirectional(p, x, t, c, config=recipe.teacher),
        transformer.abstract(recipe.teacher),
        latents,
        timestep,
        text,
    )
    assert velocity.shape == latents.shape
    video = jax.ShapeDtypeStruct((1, 81, 480, 832, 3), jnp.float32)
    encoded = jax.eval_shape(lambda p, v: vae.encode(p, v, config=recipe.vae), vae.abstract(recipe.vae), video)
    assert encoded.shape == latents.shape


def test_image_to_video():
    """The I2V-14B variant: published count, sampler and shapes, by ``eval_shape``."""
    recipe = load_recipe(f"{CONFIGS / 'wan_14b.py'}:i2v")
    assert recipe.name == "wan_14b_i2v" and recipe.teacher == recipe.student
    assert count(transformer.abstract(recipe.teacher)) == 16_394_878_784
    sampler = recipe.diffusion
    assert (sampler.shift, sampler.num_inference_steps, sampler.solver, sampler.guidance_scale) == (
        3.0,
        40,
        "unipc",
        5.0,
    )
    clip_config, shape = CLIPConfig(), jax.ShapeDtypeStruct
    picture, text = shape((1, 480, 832, 3), jnp.float32), shape((1, 512, 4096), jnp.float32)
    image = jax.eval_shape(
        lambda p, x: image_to_video.image_embeds(p, x, config=clip_config), clip_vision.abstract(clip_config), picture
    )
    given = jax.eval_shape(
        lambda p, x: image_to_video.image_latents(p, x, config=recipe), vae.abstract(recipe.vae), picture
    )
    assert image.shape == (1, 257, 1280) and given.shape == (1, 21, 60, 104, 20)
    latents = jax.eval_shape(
        lambda *arrays: teacher.sample_clip(*arrays[:-1], seeds=arrays[-1], config=recipe),
        transformer.abstract(recipe.teacher),
        text,
        shape((512, 4096), jnp.float32),
        image,
        given,
        shape((1,), jnp.uint32),
    )
    assert latents.shape == (1, 21, 60, 104, 16)
    refused("wan_14b has no variant 'ti2v'; accepted: 't2v', 'i2v'", load_recipe, f"{CONFIGS / 'wan_14b.py'}:ti2v")


def test_digits_recipes():
    """Every word has a row, and the longest caption fits, with one digit or two."""
    one, two, quick = (load_recipe(str(CONFIGS / "digits.py") + variant) for variant in ("", ":two", ":quick"))
    assert (one.name, two.name, quick.name) == ("digits", "two_digits", "digits_quick")
    assert [recipe.data.digits_per_clip for recipe in (one, two, quick)] == [1, 2, 1]
    assert quick.student == one.student and quick.vae == one.vae  # the same networks
    for recipe in (one, two, quick):
        captions = digits.captions(recipe.data, "all")
        longest = max(captions, key=lambda caption: len(caption.split()))
        rows = encoder.encode(encoder.open_encoder(recipe), [longest])
        assert np.abs(rows).any(axis=-1).sum() == len(longest.split()) <= recipe.text.length
    refused("the variant is 'three'; accepted: none, 'two', 'quick'", load_recipe, f"{CONFIGS / 'digits.py'}:three")


@pytest.mark.parametrize("variant", ["", ":umt5"])
def test_the_recipe_of_own_videos(variant, tmp_path):
    recipe = load_recipe(f"{CONFIGS / 'own.py'}{variant}")
    assert recipe.data.name == "videos" and recipe.latent_shape == (9, 8, 8, 16)
    if not variant:
        embeds = encoder.encode(encoder.open_encoder(recipe), ["A red car moves left."])
        assert np.abs(embeds).any(axis=-1).sum() == 5
        text = (CONFIGS / "own.py").read_text()
        for frames in (9, 21, 81):  # only the marked lines are changed
            (tmp_path / "own.py").write_text(text.replace('"frames": 33', f'"frames": {frames}'))
            changed = load_recipe(str(tmp_path / "own.py"))
            assert changed.video.frames == frames
            assert all(0 < length <= frames for _, length, _ in changed.train_vae.stretches)
