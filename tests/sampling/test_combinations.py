"""Settings of streams together, against a stream in numpy: caches, prompts, LoRAs, pictures, joint denoising."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import LoraConfig
from causvid_jax.models import adapters, transformer
from causvid_jax.models.image_branch import Picture
from causvid_jax.sampling import rolling, stream
from tests import tiny
from tests.plain_stream import PlainStream
from tests.sampling.conftest import PLAIN, prompt
from tests.tiny import changed

NET = PLAIN.student
BRANCH = {"student": tiny.BRANCH, "train_causal": {"prompt_switch_prob": 0.0}}


@pytest.fixture(scope="module")
def plain(params):
    return jax.tree.map(np.asarray, params["student"])


def weights_of(plain, config, lora=None):
    """Return the student as a stream reads it, with adapters."""
    both = plain if lora is None else adapters.join(lora, dict(plain))
    rounded = transformer.round_params(jax.tree.map(jnp.asarray, both), config.student)
    return {"student": transformer.unstack(rounded, config.student)}


def check(block, expected, config):
    """Compare latents; where numbers are rounded to 8 bits, a few may fall on the other side of a half."""
    error = np.sqrt(np.square(np.asarray(block) - expected).mean()) / expected.std()
    exact = config.student.linear == config.student.kv_cache == "dtype"
    assert error < (2e-5 if exact else 3e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "causal": {"window": 5, "sink": 3, "positions": "relative"},
            "student": {"kv_cache": "int8", "linear": "int8"},
        },
        {"causal": {"window": 3, "sink": 6, "context_noise": 60.0}, "student": {"kv_cache": "int8"}},
        {"causal": {"window": 2, "sink": 1, "positions": "relative", "context_pass": False}},
        {"causal": {"window": 7, "sink": 0, "on_prompt_switch": "reset"}, "student": {"linear": "int8"}},
    ],
    ids=["all in int8", "sink above window", "window of a block", "cuts"],
)
def test_loras_and_prompts_that_change_between_blocks(plain, changes):
    """Keys and values stay as their block wrote them; a switch, the last to no words, recomputes with new strengths."""
    config = changed(PLAIN, **changes)
    net = dataclasses.replace(NET, lora=LoraConfig(3))
    lora = adapters.split(tiny.random_params(transformer.abstract(net), 7, 0.3))[0]
    params, reference = weights_of(plain, config, lora), PlainStream(config, plain, prompt(0, 2), seed=4)
    state = stream.init_stream(params, prompt(0, 2), config=config, seed=4)
    strengths = {0: 1.0, 1: 0.3, 4: -0.7}
    prompts = {0: [prompt(5, 2)], 3: [prompt(1, 2), prompt(2, 2)], 4: [0 * prompt(0, 2)]}
    for block in range(6):
        if block in strengths:
            scale = jnp.full(3, strengths[block])
            state = stream.set_adapters(params, state, scale, prompt(0, 2), config=config)
            reference.loras = [(lora, strengths[block])]
        for text in prompts.get(block, []):
            state = stream.change_prompt(params, state, text, config=config)
            reference.switch(text, config.causal.on_prompt_switch)
        latents, state = stream.next_block(params, state, config=config)
        check(latents, reference.next(), config)


def test_pictures_stay_through_prompts_loras_and_rounding():
    config = changed(PLAIN, **BRANCH, causal={"window": 4, "sink": 1, "independent_first_frame": False})
    config = changed(config, student={"kv_cache": "int8"})
    plain = tiny.random_params(transformer.abstract(config.student), 1, 0.15)
    shape = (2, *config.latent_shape[:3], 8)
    picture = Picture(*(jax.random.normal(jax.random.key(i), size) for i, size in enumerate((shape, (2, 5, 80)))))
    params, reference = weights_of(plain, config), PlainStream(config, plain, prompt(0, 2), seed=4, picture=picture)
    state = stream.init_stream(params, prompt(0, 2), config=config, seed=4, picture=picture)
    for block in range(5):
        if block in (2, 4):
            how = {2: "recompute", 4: "reset"}[block]
            switch = changed(config, causal={"on_prompt_switch": how})
            state = stream.change_prompt(params, state, prompt(block, 2), config=switch)
            reference.switch(prompt(block, 2), how)
        latents, state = stream.next_block(params, state, config=config)
        check(latents, reference.next(), config)


@pytest.mark.parametrize(
    "causal,student,together",
    [
        ({"window": 8, "sink": 3, "positions": "absolute"}, {}, 4),
        ({"window": 4, "sink": 5, "positions": "relative", "context_noise": 30.0}, {"kv_cache": "int8"}, 2),
        ({"window": 0, "sink": 0}, {"linear": "int8"}, 2),
    ],
    ids=["window full of noise", "sink above window", "no window"],
)
def test_blocks_that_are_denoised_jointly(plain, causal, student, together):
    config = changed(PLAIN, causal=causal, student=student, rolling_blocks=together)
    given = {"config": config, "frames": 12, "seed": 3, "decode": False}
    latents, _ = rolling.generate(weights_of(plain, config), prompt(0, 2), **given)
    check(latents, PlainStream(config, plain, prompt(0, 2), seed=3).rolling(6), config)
