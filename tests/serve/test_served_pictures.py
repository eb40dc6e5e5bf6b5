"""A server of a student with an image branch: films start from a picture, and a change of prompt keeps it."""

import dataclasses

import numpy as np
import pytest

from causvid_jax.sampling import script
from causvid_jax.serve import functions
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.film import Film, Replay, replay
from causvid_jax.serve.jobs import Jobs
from causvid_jax.serve.programs import open_programs
from causvid_jax.serve.session import Change, Start
from causvid_jax.serve.settings import Settings
from causvid_jax.serve.socket import describe
from tests import tiny
from tests.refusals import refused
from tests.serve.conftest import Clock, events, run

RECIPE = tiny.tiny_recipe(**tiny.IMAGE, causal={"window": 2})
PICTURE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
PROMPT, OTHER = "a red 3 moving left", "a blue 7 moving up"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return open_programs(RECIPE, str(tiny.image_workdir(tmp_path_factory.mktemp("image"), RECIPE)), compiles=True)


@pytest.fixture(scope="module")
def film(programs):
    """Return a film with a change of prompt after two blocks, and its frames."""
    made = Film(programs, 7, PROMPT, picture=PICTURE)
    frames = [made.step(), made.step()]
    made.change(OTHER, "keep")
    return made, [*frames, made.step(), made.step()]


def test_the_film_is_that_of_the_library(programs, film):
    pipe = programs.pipe
    keeps = dataclasses.replace(RECIPE.causal, on_prompt_switch="keep")
    pipe = dataclasses.replace(pipe, config=dataclasses.replace(pipe.config, causal=keeps))
    state, frames = pipe.stream(PROMPT, seed=7, image=PICTURE), []
    for prompt in (None, OTHER):
        state = state if prompt is None else pipe.switch(state, prompt)
        for part, state in pipe.frames(state, blocks=2):  # noqa: B007, B020
            frames.append(part[0])
    for ours, expected in zip(film[1], frames, strict=True):
        np.testing.assert_array_equal(ours, expected)
    before = pipe.picture(PICTURE, 1)
    np.testing.assert_array_equal(film[0]._state.picture.latents, before.latents)
    np.testing.assert_array_equal(film[0]._state.picture.embeds, before.embeds)


def test_another_picture_gives_another_film_and_a_replay_the_same(programs, film):
    written = script.from_json(film[0].script().to_json())
    playing = Replay(programs, written)
    for expected in film[1]:
        np.testing.assert_array_equal(playing.step(), expected)
    assert playing.same
    changed = Film(programs, 7, PROMPT, picture=255 - PICTURE)
    assert any(np.any(changed.step() != expected) for expected in film[1][:2])
    # A change of prompt before the first block begins again from the picture; a reset is such a beginning later.
    early = Film(programs, 7, OTHER, picture=PICTURE)
    early.change(PROMPT)
    np.testing.assert_array_equal(early.step(), film[1][0])
    early.change(OTHER, "reset")
    early.step()
    np.testing.assert_array_equal(early._state.picture.latents, film[0]._state.picture.latents)


def test_sessions_and_jobs_start_from_an_uploaded_picture(programs, film, tmp_path):
    engine = Engine(RECIPE, lambda: programs, Settings(recordings=str(tmp_path)), clock=Clock())
    engine.load()
    assert {name: describe(engine)[name] for name in ("pictures", "videos", "needs_picture")} == {
        "pictures": True,
        "videos": False,
        "needs_picture": True,
    }
    session = engine.open(Start(PROMPT))
    run(engine)
    errors = [event["message"] for event in events(session, "error")]
    assert errors == ["this student has an image branch; send the picture that it starts from"] and not session.made
    shown = []
    session.on_frames = shown.append
    engine.restart(session, Start(PROMPT, 7, picture=PICTURE))
    engine.pull(session, 1, 0)
    run(engine)
    engine.change(session, Change(OTHER, "keep"))
    engine.pull(session, 3, 2)
    run(engine)
    np.testing.assert_array_equal(np.concatenate(shown), np.concatenate(film[1]))
    engine.close(session, "enough")

    jobs, video = Jobs(engine), np.repeat(PICTURE[None], 9, axis=0)
    refused("has an image branch; send the picture", jobs.create, PROMPT)
    refused("has an image branch and follows no video", jobs.create, PROMPT, video=video)
    job = jobs.create(PROMPT, seed=7, seconds=5 / RECIPE.video.fps, picture=PICTURE)
    run(engine)
    assert job.status == "completed", job.error
    again = np.concatenate(list(replay(programs, script.read_script(job.path))))
    np.testing.assert_array_equal(again, np.concatenate(film[1])[:5])
    engine.stop()


def test_what_an_image_branch_does_not_go_with_is_one_sentence(programs, film):
    refused("accepted: causal.window.*and a student without an image branch", functions.shaped, RECIPE)
    refused("reads a picture at its start only", Film(programs, 7, PROMPT, picture=PICTURE).step, PICTURE[None])
    without = dataclasses.replace(film[0].script(), events=(script.Event(0, prompt=PROMPT),))
    refused("has no picture at its start", Replay, programs, without)
