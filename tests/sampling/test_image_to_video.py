"""Image to video with the bidirectional model: parity with diffusers' pipeline, and what it refuses."""

import jax
import jax.numpy as jnp
import make_image_to_video as golden
import numpy as np
import pytest

from causvid_jax.config import ConfigError
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import transformer, vae
from causvid_jax.models.image_branch import Picture
from causvid_jax.sampling import image_to_video, teacher
from configs.wan_14b import NEGATIVE_PROMPT_IMAGE
from tests.tiny import changed, random_params, tiny_recipe


def test_equals_the_pipeline_of_diffusers():
    """Condition channels, and the latents after four guided UniPC steps."""
    arrays = dict(np.load(golden.GOLDEN))
    condition, latents = golden.errors_of(arrays, golden.SEED)
    assert arrays["condition"].shape == (1, 3, 4, 2, 8) and arrays["latents"][-1].std() > 0.5
    assert condition <= 1e-4 and latents <= 5e-4


def test_a_clip_is_a_function_of_its_own_picture_and_seed():
    config = golden.recipe()
    params = transformer.init(jax.random.key(0), config.teacher)
    params["head"]["proj"] = jax.tree.map(lambda x: x + 0.1, params["head"]["proj"])
    keys = jax.random.split(jax.random.key(1), 4)
    rows = jax.random.normal(keys[0], (2, 512, 5))
    image = jax.random.normal(keys[1], (2, 5, 14))
    given = jax.random.normal(keys[2], (2, 3, 4, 2, 8))
    sample = lambda order: teacher.sample_clip(  # noqa: E731
        params,
        rows[order],
        rows[0],
        image[order],
        given[order],
        seeds=jnp.arange(2, dtype=jnp.uint32)[order],
        config=config,
    )
    both, swapped = sample(jnp.array([0, 1])), sample(jnp.array([1, 0]))
    assert both.shape == (2, 3, 4, 2, 4)
    np.testing.assert_allclose(swapped, both[::-1], atol=2e-5)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_a_stream_is_grey_after_a_clip_of_one_frame():
    """Later frames have the channels of a clip's last one, which in a clip of one frame was the picture itself."""
    one, longer = tiny_recipe(video={"frames": 1}), tiny_recipe(video={"frames": 9})
    params = random_params(vae.abstract(one.vae), 2, 0.3)
    pictures = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-1)
    short, long = (image_to_video.image_latents(params, pictures, config=config) for config in (one, longer))
    channels = Picture(short).channels(0, 3)
    np.testing.assert_allclose(channels[:, :2], long[:, :2], atol=1e-5)
    np.testing.assert_array_equal(channels[0, :, 0, 0, 0], [1, 0, 0])


@pytest.mark.parametrize("column", ["default", "wan"])
def test_only_the_published_numerics_tell_whole_timesteps(column, monkeypatch):
    config, told = golden.recipe(), {}
    channels = config.teacher.out_channels
    config = changed(config, teacher={"precision": column, "image_dim": 0, "in_channels": channels})

    def solve(diffusion, velocity, noise, *, integer_timesteps):
        told["whole"] = integer_timesteps
        return noise

    monkeypatch.setattr(teacher.solvers, "solve", solve)
    seeds = jnp.zeros((1,), jnp.uint32)
    prompt_embeds = jnp.zeros((1, config.text.length, config.text.dim))
    teacher.sample_clip.__wrapped__(None, prompt_embeds, None, seeds=seeds, config=config)
    assert told == {"whole": column == "wan"}


def test_refusals():
    config = golden.recipe()
    with pytest.raises(ConfigError, match=r"pictures of shape \(1, 16, 32, 3\) .*accepted: \[batch, 32, 16, 3\]"):
        image_to_video.image_latents(vae.abstract(config.vae), jnp.zeros((1, 16, 32, 3)), config=config)
    plain = load_recipe("configs/digits.py")
    with pytest.raises(ConfigError, match="the teacher has image_dim = 0"):
        teacher.guided_velocity(None, None, None, jnp.zeros(1), jnp.zeros(1), config=plain)


def test_the_published_null_prompt():
    assert NEGATIVE_PROMPT_IMAGE.startswith("镜头晃动，色调艳丽，过曝，静态，")
