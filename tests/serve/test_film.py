"""A film written down is the same film again; blends lie on the sphere; recordings are playable at any time."""

import dataclasses
import json
import shutil

import av
import numpy as np
import pytest

from causvid_jax import media
from causvid_jax.config import ConfigError
from causvid_jax.sampling import script
from causvid_jax.serve import fragments
from causvid_jax.serve.film import Film, Replay, replay, slerp
from tests import tiny
from tests.refusals import refused

PROMPT = "a red 3 moving left"


def test_slerp_turns_evenly_and_keeps_the_length():
    a, b = np.array([[3.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 3.0], [0.0, 2.0], [2.0, 0.0]])
    third = slerp(a, b, 1 / 3)
    np.testing.assert_allclose(third[0], 3 * np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)]), atol=1e-6)
    np.testing.assert_allclose(third[1:], [[0, 2 / 3], [4 / 3, 0]], atol=1e-6)


@pytest.mark.parametrize("context", script.CONTEXTS)
def test_a_replay_has_the_same_frames(programs, context):
    film = Film(programs, 7, PROMPT)
    video = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    frames = [film.step(video, None)]
    frames += [film.step() for _ in range(2)]
    film.change("a green 7 moving up", context, blend=3)
    frames += [film.step() for _ in range(2)]
    held = film.snapshot()
    frames += [film.step(video[i:], 0.5) for i in range(3)]
    written = script.from_json(film.script().to_json())
    assert written == film.script()
    playing = Replay(programs, written)
    for expected in frames:
        np.testing.assert_array_equal(playing.step(), expected)
    assert playing.finished and playing.same
    fork = held.fork()
    for i, expected in enumerate(frames[5:]):
        np.testing.assert_array_equal(fork.step(video[i:], 0.5), expected)
    assert fork.script() == written
    changed = dataclasses.replace(written, sha256="0" * 64)
    refused("the frames differ", list, replay(programs, changed))


def test_a_reset_is_the_one_of_the_sampler(programs):
    """The recipe's own mode through the facade gives the same frames."""
    for context in script.CONTEXTS:
        pipe = tiny.changed(programs.pipe, config={"causal": {"on_prompt_switch": context}})
        before, state = tiny.collect(pipe.frames(pipe.stream(PROMPT, seed=3), 2))
        after, _ = tiny.collect(pipe.frames(pipe.switch(state, "a blue 1 moving up"), 2))
        film = Film(programs, 3, PROMPT)
        ours = [film.step(), film.step()]
        film.change("a blue 1 moving up", context)
        ours += [film.step(), film.step()]
        np.testing.assert_array_equal(np.concatenate(ours), np.concatenate([before, after], axis=1)[0])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"recipe": "other"}, "made by recipe 'other'"),
        ({"weights": "other"}, "made by other weights"),
        ({"complete": False}, "too long to be stored"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "field 'seed' of a script is True"),
        ({"first": 9}, "cannot start at block 9"),
        ({"extra": 1}, "no field 'extra'"),
        ({"version": 2}, "version 2"),
        ({"events": [{"block": 0}]}, "neither a prompt nor frames"),
        ({"events": [{"block": 1, "prompt": "a"}]}, "starts with an event at block 0"),
        ({"events": [{"block": 0, "prompt": "a", "context": "mix"}]}, "context is 'mix'"),
        ({"events": [{"block": 0, "prompt": "a", "blend": 65}]}, "blend is 65"),
        ({"events": 3}, "no script"),
    ],
)
def test_a_script_that_cannot_be_played_is_one_sentence(programs, change, sentence):
    film = Film(programs, 7, PROMPT)
    film.step()
    values = {**json.loads(film.script().to_json()), **change}
    with pytest.raises(ConfigError, match=sentence):
        Replay(programs, script.from_json(values))


def test_packed_frames_come_back_and_damage_is_refused():
    frames = np.random.default_rng(1).integers(0, 256, (3, 4, 5, 3), np.uint8)
    np.testing.assert_array_equal(script.unpack(script.pack(frames), 4), frames)
    for text in ("", "AAAA", script.pack(frames)[:40], "?"):
        refused("damaged", script.unpack, text, 4)
    refused("not 5 pixels high", script.unpack, script.pack(frames), 5)


def test_a_recording_is_playable_at_any_time_and_carries_its_script(programs, tmp_path):
    path = tmp_path / "film.mp4"
    recording = fragments.Recording(path, 16, 4, 2**20)
    film, frames = Film(programs, 1, PROMPT), []
    for _ in range(2):
        film.step()
    first = film.block
    for _ in range(4):
        frames.append(film.step())
        recording.append(frames[-1])
        shutil.copy(path, tmp_path / "killed.mp4")  # what kill -9 would leave
        with av.open(tmp_path / "killed.mp4") as container:
            pictures = list(container.decode(video=0))
        count = sum(map(len, frames)) - 1  # the last frame is written with the next one
        assert [picture.time for picture in pictures] == [i / 16 for i in range(count)]
    recording.close(film.script(), first)
    shown = np.concatenate(frames)
    decoded = media.read_video(path, 16, 16)
    assert decoded.shape == shown.shape and np.abs(decoded.astype(int) - shown).mean() < 12
    np.testing.assert_array_equal(np.concatenate(list(replay(programs, script.read_script(path)))), shown)
