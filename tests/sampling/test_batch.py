"""The samplers that the report measures, on small networks with random weights."""

import dataclasses

import jax
import numpy as np
import pytest

from causvid_jax import media as files
from causvid_jax.config import ConfigError
from causvid_jax.data import digits
from causvid_jax.models import taehv, transformer, vae
from causvid_jax.sampling import batch
from tests.tiny import random_params, tiny_recipe

RECIPE = tiny_recipe(
    video={"frames": 13},
    causal={"frames_per_block": 2, "window": 0},
    diffusion={"num_inference_steps": 3, "guidance_scale": 2.0},
)
PROMPTS = ["a red 3 moving left", "a blue 7 moving up"]


def random_weights():
    """Return noise in every parameter, also where a fresh network holds zeros: the prompt and the past must matter."""
    shapes = {"vae": vae.abstract(RECIPE.vae)} | dict.fromkeys(
        ("teacher", "student"), transformer.abstract(RECIPE.student)
    )
    return random_params(shapes, scale=0.3)


@pytest.fixture(scope="module")
def made():
    return batch.make_samplers(random_weights(), RECIPE)


def test_teacher_clip_depends_on_prompt_and_seed_but_not_on_its_batch(made):
    latents = made.teacher(PROMPTS, 5, decode=False)
    assert latents.shape == (2, 4, 4, 4, 4)
    swapped = made.teacher(PROMPTS[::-1], 6, decode=False)
    np.testing.assert_allclose(swapped[0], latents[1], atol=1e-5)  # clip b of seed s is clip 0 of seed s + b
    other = made.teacher([PROMPTS[1]] * 2, 5, decode=False)
    assert np.abs(other[0] - latents[0]).max() > 1e-3
    video = made.teacher(PROMPTS, 5)
    assert video.shape == (2, 13, 16, 16, 3) and video.dtype == np.uint8


def test_student_before_a_switch_is_the_student_without_one(made):
    plain = made.student(PROMPTS, 0, frames=29)
    switched = made.student(PROMPTS, 0, frames=29, switch=(13, PROMPTS[::-1]))
    assert plain.shape == switched.shape == (2, 29, 16, 16, 3)
    apart = np.abs(plain.astype(int) - switched)
    # One program scans the blocks, the other takes them one by one: rounding to uint8 may differ by one.
    assert apart[:, :13].max() <= 1
    assert apart[:, 13:].max() > 1
    with pytest.raises(ConfigError, match="changes at frame 12; blocks begin at 0, 5, 13, 21"):
        made.student(PROMPTS, 0, frames=29, switch=(12, PROMPTS))  # it would be ignored
    assert made.student(PROMPTS, 0, frames=29, decode=False).shape == (2, 8, 4, 4, 4)


def test_a_stream_is_shown_by_the_decoder_that_the_recipe_names(made):
    tiny, recipe = RECIPE.taehv, dataclasses.replace(RECIPE, decoder="taehv")
    params = random_weights() | {"taehv": taehv.init(jax.random.key(0), tiny)}
    other = batch.make_samplers(params, recipe)
    np.testing.assert_array_equal(other.teacher(PROMPTS, 5), made.teacher(PROMPTS, 5))
    latents = other.student(PROMPTS, 0, frames=13, decode=False)
    np.testing.assert_array_equal(latents, made.student(PROMPTS, 0, frames=13, decode=False))
    shown = files.to_uint8(np.asarray(taehv.decode(params["taehv"], latents, config=tiny)))
    assert np.abs(other.student(PROMPTS, 0, frames=13).astype(int) - shown).max() <= 1
    assert made.reconstruct_tiny is None
    again = other.reconstruct_tiny(shown)
    encoded = vae.encode(params["vae"], files.to_float(shown), config=recipe.vae)
    expected = files.to_uint8(np.asarray(taehv.decode(params["taehv"], encoded, config=tiny)))
    assert np.abs(again.astype(int) - expected).max() <= 1


def test_without_a_teachers_weights_there_is_none_to_measure(made):
    params = random_weights()
    del params["teacher"]
    alone = batch.make_samplers(params, RECIPE)
    assert alone.teacher is None
    np.testing.assert_array_equal(alone.student(PROMPTS, 0, frames=13), made.student(PROMPTS, 0, frames=13))


def test_reconstruction_keeps_shape_and_range(made):
    video, _ = digits.sample_clip(np.random.default_rng(0), "test", RECIPE.data, RECIPE.video)
    again = made.reconstruct(np.stack([video, video[::-1]]))
    assert again.shape == (2, 13, 16, 16, 3) and again.dtype == np.uint8
