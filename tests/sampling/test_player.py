"""Frames and blocks of a played stream, and that it shows what the sampler's blocks hold."""

import jax
import numpy as np
import pytest

from causvid_jax import media
from causvid_jax.config import CausalConfig, ConfigError
from causvid_jax.config.recipes import load_recipe
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.media import pixels
from causvid_jax.models import vae
from causvid_jax.sampling import blocks, pipeline, player, stream
from tests.refusals import refused
from tests.sampling.conftest import FIRST, PLAIN, prompt
from tests.tiny import changed, stream_recipe


@pytest.mark.parametrize("config", [PLAIN, FIRST], ids=["plain", "first"])
def test_blocks_and_frames(config):
    """Against a count by hand: one frame for latent 0, four for every other, K latents per block."""
    sizes = config.causal.block_sizes(config.causal.independent_first_frame + 10)
    latents = np.repeat(np.arange(len(sizes)), sizes)  # block of every latent
    frames = np.concatenate([latents[:1], np.repeat(latents[1:], 4)])  # block of every frame
    for frame, block in enumerate(frames):
        assert blocks.block_of(frame, config) == block
        held = blocks.covering_latents(frame + 1, config)
        assert held == np.searchsorted(latents, block, side="right")
    for block in range(len(sizes)):
        assert blocks.first_frame(block, config) == np.argmax(frames == block)
    refused("frames is 0", blocks.covering_latents, 0, config)


def test_ten_clips_of_the_issue():
    config = changed(PLAIN, video={"frames": 81}, causal=CausalConfig())
    assert blocks.covering_latents(810, config) == 204
    assert blocks.block_of(405, config) == 34 and blocks.first_frame(34, config) == 405


def test_plays_what_a_scan_generates_and_cuts_it(params):
    text, timing = np.asarray(prompt(0)), player.Timing()
    parts = list(player.play(params, text, config=PLAIN, frames=18, seed=3, timing=timing))
    assert [x.shape[1] for x in parts] == [5, 8, 5]
    _, clip = stream.generate(params, text, config=PLAIN, seed=3)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), media.to_uint8(clip)[:, :18])
    assert timing.frames == 18
    assert 0 < timing.first < timing.total and timing.fps == pytest.approx(18 / timing.total)


def test_plays_an_image_then_a_switch(params, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    text, other = np.asarray(prompt(0)), np.asarray(prompt(1))
    plain = list(player.play(params, text, config=FIRST, frames=17, image=image))
    switched = list(player.play(params, text, config=FIRST, frames=17, image=image, switches={2: other}))
    for a, b in zip(plain[:2], switched[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert (plain[2] != switched[2]).any()
    np.testing.assert_array_equal(plain[0][0, 0], image)
    with pytest.raises(ConfigError, match="the frames of block 2 are not finite"):
        nan = {2: np.full_like(other, np.nan)}
        list(player.play(params, text, config=FIRST, frames=17, image=image, switches=nan))
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "_is_accelerated", lambda video: True)
        np.testing.assert_array_equal(next(player.play(params, text, config=FIRST, frames=1, image=image)), plain[0])
    # Whole blocks of one frame have no other frame; in PLAIN the rest of the block is the decoded picture.
    blocks_of_two = next(player.play(params, text, config=PLAIN, frames=5, image=image))
    still = np.repeat(media.to_float(image)[None, None], 5, axis=1)
    shown = media.to_uint8(
        vae.decode(params["vae"], vae.encode(params["vae"], still, config=PLAIN.vae), config=PLAIN.vae)
    )
    np.testing.assert_array_equal(blocks_of_two[0, 0], image)
    assert np.abs(blocks_of_two[:, 1:].astype(int) - shown[:, 1:]).max() <= 1


def test_digits_start_from_the_picture_and_keep_its_colour_and_identity():
    """Read by the classifier of the evaluation; the decoder's own error is 4 of 255 on such pictures."""
    pipe, data = pipeline.load("digits"), load_recipe("digits").data
    images, labels, _ = digits.handwriting("test")
    captions = ["a red 3 moving left", "a blue 7 moving up", "a green 5 moving right", "a white 0 moving down"]
    specs = [digits.parse_caption(caption) for caption in captions]
    pictures = np.stack(
        [digits.render([images[labels == one[0].digit][0]], one, [(8, 8)], data, 1, 32, 32)[0] for one in specs]
    )
    frames, state = pipe.show(pipe.stream(captions, seed=0), pictures)
    np.testing.assert_array_equal(frames[:, 0], pictures)
    assert np.abs(frames.astype(int) - pictures[:, None]).mean() < 5
    later = np.concatenate([part for part, state in pipe.frames(state, 3)], axis=1)
    classifier = classifiers.load(data)
    for video in (frames[:, 1:2], frames[:, 1:], later):
        assert classifiers.read_colors(video, data.colors) == tuple(one[0].color for one in specs)
        assert classifiers.read_digits(classifier, video)[0].argmax(-1).tolist() == [one[0].digit for one in specs]


def test_follows_a_video_whose_last_block_is_not_whole(params):
    clip = np.random.default_rng(0).integers(0, 256, (15, 16, 16, 3), np.uint8)
    text = np.asarray(prompt(0))
    parts = list(player.play(params, text, config=PLAIN, frames=15, video=clip, strength=0.25))
    assert [x.shape[1] for x in parts] == [5, 8, 2]
    held = np.concatenate([clip, np.repeat(clip[-1:], 6, axis=0)])  # 21 frames: whole blocks
    latents = vae.encode(params["vae"], media.to_float(held)[None], config=PLAIN.vae)
    state = stream.init_stream(params, prompt(0), config=PLAIN)
    expected = []
    for i in range(3):
        block, state = stream.next_block_from(params, state, latents[:, 2 * i : 2 * i + 2], 3, config=PLAIN)
        expected.append(block)
    shown = vae.decode(params["vae"], np.concatenate(expected, axis=1), config=PLAIN.vae)
    difference = np.abs(np.concatenate(parts, axis=1).astype(int) - media.to_uint8(shown)[:, :15])
    assert difference.max() <= 1


def test_a_video_is_encoded_anew_after_a_cut(params):
    """Block 2 begins like a clip: its one-frame latent and the others hold the last frames of its part of the video."""
    config = stream_recipe(on_prompt_switch="reset")
    clip = np.random.default_rng(0).integers(0, 256, (21, 16, 16, 3), np.uint8)
    text, other = np.asarray(prompt(0)), np.asarray(prompt(1))
    shown = list(player.play(params, text, config=config, frames=21, video=clip, strength=0.5, switches={2: other}))
    before, after = (
        vae.encode(params["vae"], media.to_float(part[None]), config=config.vae) for part in (clip[:13], clip[16:])
    )
    state = stream.init_stream(params, prompt(0), config=config)
    for block, latents in enumerate((before[:, :2], before[:, 2:], after)):
        state = stream.change_prompt(params, state, prompt(1), config=config) if block == 2 else state
        x, state = stream.next_block_from(params, state, latents, 2, config=config)
        frames, state = stream.decode_block(params, state, x, config=config)
        expected = media.to_uint8(frames)[:, 0 if block else 3 :]
        assert shown[block].shape == expected.shape and np.abs(shown[block].astype(int) - expected).max() <= 1


def test_a_decoder_on_another_device_shows_the_same_frames(params):
    """Text with a switch, a picture and a video; the frames come from the other device."""
    text, other = np.asarray(prompt(0)), np.asarray(prompt(1))
    rng = np.random.default_rng(0)
    image, video = rng.integers(0, 256, (16, 16, 3), np.uint8), rng.integers(0, 256, (17, 16, 16, 3), np.uint8)
    for given in ({"switches": {2: other}}, {"image": image}, {"video": video}):
        expected = list(player.play(params, text, config=FIRST, frames=17, **given))
        parts = list(player.play(params, text, config=FIRST, frames=17, decode_device=jax.devices()[1], **given))
        for a, b in zip(parts, expected, strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1  # one program is compiled here, two there
    cut = stream_recipe(on_prompt_switch="reset")
    with pytest.raises(ConfigError, match="decode_device is given; accepted: no loaded programs, and causal.on_prompt"):
        next(player.play(params, text, config=cut, frames=5, decode_device=jax.devices()[1]))
