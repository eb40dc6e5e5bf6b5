"""The facade: the same numbers as the pure functions under it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import causvid_jax as cv
from causvid_jax import media
from causvid_jax.config import ConfigError
from causvid_jax.diffusion import flow, solvers
from causvid_jax.models import decoder
from causvid_jax.sampling import batch, stream, teacher
from tests import tiny
from tests.refusals import refused

RED, BLUE = "a red 3 moving left", "a blue 7 moving up"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_workdir(tmp_path_factory.mktemp("run"), examples=1)


@pytest.fixture(scope="module")
def pipe(folder):
    return cv.load(tiny.RECIPE, checkpoint=folder)


@pytest.fixture(scope="module")
def clips(folder):
    return cv.load_teacher(tiny.RECIPE, checkpoint=folder)


def test_every_exported_name_exists_and_has_a_page():
    for name in cv.__all__:
        assert getattr(cv, name) is not None and (name == "__version__" or getattr(cv, name).__doc__)
    assert 20 <= len(cv.__all__) <= 32 and set(cv.__all__) <= set(dir(cv))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cv.nothing  # noqa: B018


def test_a_stream_with_a_switch_is_that_of_the_functions(pipe):
    config, params = pipe.config, pipe.params
    before, state = tiny.collect(pipe.frames(pipe.stream([RED, BLUE], seed=3), blocks=2))
    after, state = tiny.collect(pipe.frames(pipe.switch(state, BLUE)))
    expected = stream.init_stream(params, pipe.encode_prompt([RED, BLUE]), config=config, seed=3)
    wanted = []
    for block in range(3):
        if block == 2:
            expected = stream.change_prompt(params, expected, pipe.encode_prompt([BLUE, BLUE]), config=config)
        _, frames, expected = stream.next_frames(params, expected, config=config)
        wanted.append(media.to_uint8(np.asarray(frames))[:, 0 if block else stream.LEAD :])
    np.testing.assert_array_equal(np.concatenate([before, after], axis=1), np.concatenate(wanted, axis=1))
    assert int(state.block) == 3


def test_latents_need_no_vae_and_noise_can_be_given(pipe):
    config = pipe.config
    alone = type(pipe)(config, {"student": pipe.params["student"]}, pipe.encoder)
    steps = len(config.diffusion.denoising_timesteps)
    shape = (config.causal.frames_per_block, *config.latent_size, config.vae.z_dim)
    noise = [
        jnp.stack([stream.block_noise(stream.seeds_of(5, 1), jnp.int32(b), j, shape) for j in range(steps)])
        for b in range(2)
    ]
    for count, words in ((3, "noise is given for 2 blocks, and 3 are asked for"), (-1, "-1 blocks are asked for")):
        refused(words, lambda count=count: list(alone.latents(alone.stream(RED), blocks=count, noise=noise)))
    drawn = [latents for latents, _ in alone.latents(alone.stream(RED, seed=5), blocks=2)]
    given = [latents for latents, _ in alone.latents(alone.stream(RED, seed=9), blocks=2, noise=noise)]
    # Compiled with and without its random numbers a block may differ in the last bits.
    np.testing.assert_allclose(np.concatenate(drawn), np.concatenate(given), atol=1e-5)
    decoded = pipe.decode(jnp.concatenate(drawn, axis=1))
    assert decoded.shape[1] == 1 + 4 * (2 * shape[0] - 1)


def test_timesteps_can_be_given(pipe):
    config = pipe.config
    embeds = pipe.encode_prompt(RED)
    own = tuple(flow.student_timesteps(config.diffusion))
    state = lambda: stream.init_stream(pipe.params, embeds, config=config)  # noqa: E731
    a, _ = stream.next_block(pipe.params, state(), config=config)
    b, _ = stream.next_block(pipe.params, state(), config=config, timesteps=own)
    c, _ = stream.next_block(pipe.params, state(), config=config, timesteps=(1000.0,))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


def test_image_and_video_to_video(pipe):
    size = pipe.config.video.height, pipe.config.video.width, 3
    image = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    first, state = pipe.show(pipe.stream(RED), image)
    latents = stream.encode_image(pipe.params, media.to_float(image)[None], config=pipe.config)
    np.testing.assert_array_equal(first[:, 0], image[None])
    np.testing.assert_array_equal(first[:, 1:], pipe.decode(latents)[:, 1:])
    refused("can only be the first block", pipe.show, state, image)
    video = np.random.default_rng(1).integers(0, 256, (7, *size), np.uint8)
    for other in (image[:8], image[..., :1], image[:, :, 0]):
        words = r"the pixels have the shape .*; it must have at least . axes and end in \[16, 16, 3\]"
        refused(words, pipe.show, pipe.stream(RED), other)
        refused(words, lambda other=other: list(pipe.follow(pipe.stream(RED), np.stack([other] * 5))))
        refused(words, lambda other=other: list(pipe.extend(pipe.stream(RED), np.stack([other] * 5))))
    refused("at least 4 axes", lambda: list(pipe.extend(pipe.stream(RED), image)))
    refused("has no frames", lambda: list(pipe.follow(pipe.stream(RED), video[:0])))
    close, free = (
        np.concatenate([frames for frames, _ in pipe.follow(pipe.stream(RED), video, strength)], axis=1)
        for strength in (0.5, 1.0)
    )
    assert close.shape == free.shape == (1, 7, *size) and (close != free).any()


def test_strengths_share_one_compilation(pipe):
    video = np.zeros((5, pipe.config.video.height, pipe.config.video.width, 3), np.uint8)
    list(pipe.follow(pipe.stream(RED), video, 1.0))
    before = stream.next_block_from._cache_size()
    list(pipe.follow(pipe.stream(RED), video, 0.5))
    assert stream.next_block_from._cache_size() == before


def test_the_teacher_has_the_same_shape(clips):
    config = clips.config
    shown, clip = tiny.collect(clips.frames(clips.stream([RED, BLUE], seed=1)))
    velocity = teacher.guided_velocity(
        clips.params["teacher"], clips.encode_prompt([RED, BLUE]), clips.encode_prompt("")[0], config=config
    )
    noise = stream.block_noise(jnp.asarray([1, 2], jnp.uint32), jnp.int32(0), jnp.int32(0), config.latent_shape)
    expected = jax.jit(lambda noise: solvers.solve(config.diffusion, velocity, noise))(noise)
    np.testing.assert_allclose(clip.latents, expected, atol=1e-5)
    wanted = np.concatenate(
        [media.to_uint8(x) for x in decoder.decode_clip(clips.params, clip.latents, config=config)], 1
    )
    np.testing.assert_array_equal(shown, wanted)
    grid = 1000 * np.asarray(flow.teacher_sigmas(config.diffusion))[:-1]
    again = clips.latents(clips.stream([RED, BLUE], noise=noise), timesteps=grid).latents
    np.testing.assert_allclose(again, clip.latents, atol=1e-5)
    given = clips.params["teacher"], clips.encode_prompt([RED, BLUE]), clips.encode_prompt("")[0]
    listed = cv.sample_clip(*given, noise=noise, config=config, timesteps=list(grid))  # JAX has no hash of a list
    np.testing.assert_array_equal(listed, again)


def test_what_cannot_be_loaded_is_one_sentence(folder, tmp_path):
    refused("did you mean 'digits'", cv.load, "digit")
    refused("does not exist", cv.load, tiny.RECIPE, checkpoint=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="student weights .* do not exist"):
        cv.load(tiny.RECIPE, checkpoint=folder, student=tmp_path / "none.safetensors")


def test_no_prompts_and_embeddings_without_padding_are_refused(pipe, clips):
    """Padding is attended to, so fewer tokens gave another video."""
    embeds = pipe.encode_prompt(RED)
    assert embeds.shape == (1, 8, 32)
    for start in (pipe.stream, clips.stream, lambda prompt: pipe.switch(pipe.stream(RED), prompt)):
        for given in (embeds[:, :5], embeds[0], embeds[..., :5], []):
            refused(r"embeddings have shape .*; accepted: \[B, 8, 32\]", start, given)


def test_samplers_give_the_frames_that_are_asked_for(pipe):
    samplers = batch.make_samplers(pipe.params, pipe.config)
    for frames in (0, 2, 10, 12):
        refused(f"a stream of {frames} frames .*; accepted: 1 \\+ 4 n", samplers.student, [RED], 0, frames=frames)


def test_a_stream_goes_on_from_several_frames_of_a_clip(pipe):
    """Three blocks of its own film, put in as a clip, are the past of a stream as the cache would have them."""
    config, params = pipe.config, pipe.params
    video = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    shown, state = tiny.collect(pipe.extend(pipe.stream(RED, seed=3), video))
    np.testing.assert_array_equal(shown[0], video)
    (frames, after), *_ = pipe.frames(state)
    assert frames.shape[1] == 4 and int(after.block) == 4
    # By hand: the latents of the whole clip, appended one by one.
    expected = stream.init_stream(params, pipe.encode_prompt(RED), config=config, seed=3)
    latents = pipe.encode(video[None])
    for block in range(3):
        expected = stream.append(params, expected, latents[:, block : block + 1], config=config)
        _, expected = stream.decode_block(params, expected, latents[:, block : block + 1], config=config)
    _, wanted, _ = stream.next_frames(params, expected, config=config)
    np.testing.assert_allclose(frames.astype(int), media.to_uint8(np.asarray(wanted)).astype(int), atol=1)
    refused("has 8 frames; whole blocks have 5 or 9", next, pipe.extend(pipe.stream(RED), video[:8]))
    refused("only be continued from the first block", next, pipe.extend(after, video))


def test_a_stream_without_a_window_ends_with_its_cache(folder):
    """Beyond it blocks would be written over the last slot without a word."""
    pipe = cv.load(tiny.tiny_recipe(causal={"window": 0}), checkpoint=folder)  # clips of three latent frames
    video = np.zeros((13, 16, 16, 3), np.uint8)
    for blocks in (
        pipe.frames(pipe.stream(RED), blocks=4),
        pipe.latents(pipe.stream(RED), blocks=4),
        pipe.extend(pipe.stream(RED), video),
        pipe.follow(pipe.stream(RED), video),
    ):
        refused("room for 3 latent frames, and 4 are asked for; give frames=4", next, blocks)
    assert len(list(pipe.latents(pipe.stream(RED, frames=4), blocks=4))) == 4


def test_a_teacher_whose_recipe_decodes_by_the_tiny_decoder_encodes_by_the_vae(folder):
    clips = cv.load_teacher(tiny.tiny_recipe(decoder="taehv"), checkpoint=folder)
    video = np.zeros((1, 9, 16, 16, 3), np.uint8)
    assert clips.encode(video).shape == (1, *clips.config.latent_shape)
