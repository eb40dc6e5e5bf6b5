"""Denoising steps on devices of their own, against a plain loop over blocks with one cache per step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ConfigError
from causvid_jax.diffusion import flow
from causvid_jax.models import transformer
from causvid_jax.sampling import pipelined, stream
from tests.refusals import refused
from tests.sampling.conftest import FIRST, PLAIN, prompt
from tests.tiny import changed

pytestmark = pytest.mark.usefixtures("compiled_anew")

STEPS = 4
WINDOW = dataclasses.replace(PLAIN, causal=CausalConfig(2, window=7, sink=2, positions="relative", context_noise=20.0))
NOISY = changed(WINDOW, causal={"context_pass": False, "positions": "absolute"})
LATE = changed(PLAIN, diffusion={"denoising_timesteps": (999.0, 800.0, 400.0, 100.0)})


def mesh_of(config):
    return pipelined.step_mesh(config, jax.devices()[: len(config.diffusion.denoising_timesteps)])


@functools.partial(jax.jit, static_argnames=("config",))
def one_pass(params, x, timestep, text, cache, config):
    timesteps = jnp.full(x.shape[:2], timestep)
    return transformer.cached(params, x, timesteps, text, cache, config=config.student, causal=config.causal)


def loop(params, config, blocks, seeds, frames=None):
    """Return the latents of ``blocks`` blocks, one after the other on one device, and the caches of all steps."""
    size, (height, width) = config.causal.frames_per_block, config.latent_size
    student, text = params["student"], transformer.encode_text(params["student"], prompt(0, 2), config=config.student)
    timesteps = flow.student_timesteps(config.diffusion)
    sigmas = [t / 1000 for t in timesteps] + [0.0]
    empty = functools.partial(transformer.init_cache, batch=2, height=height, width=width, frames=frames)
    caches = [empty(config.student, config.causal) for _ in timesteps]
    clip = []
    for block in range(blocks):
        draws = [
            [
                jax.random.normal(
                    jax.random.fold_in(jax.random.fold_in(jax.random.key(s), block), step), (size, height, width, 4)
                )
                for s in seeds
            ]
            for step in range(STEPS + 1)
        ]
        noise = np.asarray(draws)
        x = sigmas[0] * noise[0]
        for step, timestep in enumerate(timesteps):
            velocity, cache = one_pass(student, x, timestep, text, caches[step], config)
            x0 = x - sigmas[step] * np.asarray(velocity)
            if config.causal.context_pass:
                _, cache = one_pass(student, x0, config.causal.context_noise, text, cache, config)
            caches[step] = transformer.advance(cache, size)
            x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * noise[step + 1]
        clip.append(x)
    return np.concatenate(clip, axis=1), caches


@pytest.mark.parametrize(
    "config,counts",
    [(WINDOW, (6, 3)), (NOISY, (9,)), (LATE, (3,))],
    ids=["estimates, in two parts", "noisy keys", "fewer blocks than steps, first timestep below 1000"],
)
def test_latents_and_caches_equal_a_loop_over_blocks(params, config, counts):
    total = sum(counts)
    frames, mesh = None if config.causal.window else 2 * total, mesh_of(config)
    everywhere = pipelined.replicated(params, mesh)
    state = pipelined.init_pipeline(everywhere, prompt(0, 2), config=config, mesh=mesh, seed=[5, 9], frames=frames)
    assert {part.data.shape[0] for part in state.cache.k.addressable_shards} == {1}  # a device holds one cache
    parts = []
    for count in counts:  # the second part goes on with the blocks that the first one has begun
        made, states = zip(*pipelined.blocks(everywhere, state, count, config=config, mesh=mesh), strict=True)
        assert all(latents.devices() == {jax.devices()[STEPS - 1]} for latents in made)
        parts, state = [*parts, *made], states[-1]
    assert int(state.round) == total + STEPS - 1
    expected, caches = loop(params, config, total, [5, 9], frames)
    np.testing.assert_allclose(np.concatenate([*map(np.asarray, parts)], axis=1), expected, atol=1e-5)
    # The last device has done these blocks and no other, so its cache is that of the loop.
    for name in ("k", "v", "frame"):
        held, wanted = getattr(state.cache, name)[STEPS - 1], getattr(caches[STEPS - 1], name)
        np.testing.assert_allclose(held, wanted, atol=1e-5)


@pytest.mark.parametrize("config", [WINDOW, NOISY], ids=["estimates", "noisy keys"])
def test_one_step_is_the_ordinary_sampler(params, config):
    config = changed(config, diffusion={"denoising_timesteps": (1000.0,)})
    single = {"student": transformer.unstack(params["student"], config.student)}  # also layers of their own
    latents = pipelined.generate(single, prompt(0), config=config, mesh=mesh_of(config), frames=12, seed=3)
    expected, _ = stream.generate(params, prompt(0), config=config, frames=12, seed=3, decode=False)
    np.testing.assert_allclose(latents, expected, atol=1e-5)


@pytest.mark.parametrize("devices", [3, 8])
def test_another_number_of_devices_than_steps_is_refused(params, devices):
    message = f"^{devices} devices are given for 4 denoising steps; accepted: 4, one per step$"
    refused(message, pipelined.step_mesh, PLAIN, jax.devices()[:devices])
    two = changed(PLAIN, diffusion={"denoising_timesteps": (1000.0, 500.0)})
    with pytest.raises(ConfigError, match="4 devices are given for 2 denoising steps"):
        pipelined.generate(params, prompt(0), config=two, mesh=mesh_of(PLAIN))


@pytest.mark.parametrize(
    "config,message",
    [
        (FIRST, "causal.independent_first_frame is set"),
        (changed(WINDOW, causal={"add_context_noise": "always"}), "causal.add_context_noise='always' is set"),
        (
            changed(PLAIN, diffusion={"first_block_timesteps": ((1000.0, 500.0),)}),
            "diffusion.first_block_timesteps is set",
        ),
        (dataclasses.replace(WINDOW, rolling_blocks=2), "denoises 2 blocks jointly"),
    ],
)
def test_settings_that_do_not_go_with_a_pipeline_are_refused(config, message):
    refused(message, pipelined.step_mesh, config, jax.devices()[:STEPS])


def test_more_blocks_than_the_caches_hold_are_refused(params):
    mesh = mesh_of(PLAIN)
    everywhere = pipelined.replicated(params, mesh)
    state = pipelined.init_pipeline(everywhere, prompt(0), config=PLAIN, mesh=mesh, frames=4)
    with pytest.raises(ConfigError, match="the stream has room for 4 latent frames, and 6 are asked for"):
        next(pipelined.blocks(everywhere, state, 3, config=PLAIN, mesh=mesh))
