"""Clients that come, wait, leave and come back, start again, or ask for what is not there."""

import contextlib
import json
import pathlib
import socket
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from causvid_jax.sampling import script
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.film import Film
from causvid_jax.serve.jobs import Jobs
from causvid_jax.serve.session import Change, Start
from causvid_jax.serve.settings import Settings
from tests.refusals import refused
from tests.serve.conftest import RECIPE, Clock, events, png, run, take_up

PROMPT = "a red 3 moving left"
START = {"prompt": PROMPT, "seed": 4}


def test_after_a_refused_start_every_request_for_the_film_is_answered(engine):
    session = engine.open(Start("a purple 3"))
    run(engine)
    assert "unknown word 'purple'" in events(session, "error")[0]["message"]
    for ask in (
        lambda: engine.change(session, Change(PROMPT, "keep", id=1)),
        lambda: engine.record(session, True),
        lambda: engine.snapshot(session, 1),
        lambda: engine.script(session),
    ):
        session.events.clear()
        ask()
        run(engine)
        assert [event["message"] for event in events(session, "error")] == ["no film has begun; send start"]
    engine.restart(session, Start(PROMPT))
    run(engine)
    assert session.made == 1


def test_a_new_film_that_the_connection_did_not_live_to_see_is_taken_up(engine):
    """The client has chunk 0 of the first film; chunk 1 was on its way when it asked for another film."""
    session = engine.open(Start(PROMPT))
    engine.pull(session, 1, 0)
    run(engine)
    engine.restart(session, Start(PROMPT, seed=8))
    run(engine)
    engine.lose(session, session.on_output)
    assert engine.attach(session.token, 1, lambda: None) is session
    (chunk,) = engine.chunks(session, session.confirmed)
    np.testing.assert_array_equal(chunk.frames, Film(engine.programs, 8, PROMPT).step())


def test_who_waits_in_the_queue_is_not_idle(engine):
    running = [engine.open(Start(PROMPT)) for _ in range(2)]
    waiting = engine.open(Start(PROMPT))
    engine.clock.now = engine.settings.idle_seconds - 1
    for session in running:
        session.seen = engine.clock.now
    engine.clock.now += 2
    engine.tick()
    assert waiting.status == "queued"
    engine.close(running[0], "enough")
    engine.tick()
    run(engine)
    assert waiting.status == "running" and waiting.made == 1
    engine.clock.now += engine.settings.idle_seconds + 1
    engine.tick()
    assert waiting.status == "ended"


def test_a_film_that_is_asked_for_in_the_last_block_of_a_replay_is_not_paused(engine):
    film = Film(engine.programs, 5, PROMPT)
    film.step()
    session = engine.open(Start(script=film.script()))
    session.on_frames = lambda frames: session.take == 1 and engine.restart(session, Start(PROMPT))
    run(engine)
    assert session.take == 2 and not session.paused and session.made == 2


def test_a_refused_prompt_does_not_end_a_replay(engine):
    film = Film(engine.programs, 5, PROMPT)
    for _ in range(3):
        film.step()
    session = engine.open(Start(script=film.script()))
    run(engine)
    engine.change(session, Change("a purple 3", "keep"))
    for _ in range(3):
        engine.pull(session, 99, session.made)
        run(engine)
    assert events(session, "replayed")[0]["same"] is True and session.made == 3


def test_recordings_that_cannot_be_written_are_sentences(programs, tmp_path):
    """At the start of the server, and later of the recording or the video only."""
    (tmp_path / "file").touch()
    made = Engine(RECIPE, lambda: programs, Settings(recordings=str(tmp_path / "file")), clock=Clock())
    refused("--recordings is .*, a file; give a directory", made.load)
    made = Engine(RECIPE, lambda: programs, Settings(recordings=str(tmp_path / "file" / "r")), clock=Clock())
    made.load()
    session = made.open(Start(PROMPT))
    made.record(session, True)
    made.pull(session, 1, 0)
    run(made)
    assert "Not a directory" in events(session, "error")[0]["message"] and session.made == 2
    jobs = Jobs(made)
    first, second = (jobs.create(PROMPT, seconds=0.5) for _ in range(2))
    run(made)
    assert first.status == second.status == "failed" and "Not a directory" in second.error


def test_a_server_that_still_starts_says_so_of_pictures(programs, tmp_path):
    made = Engine(RECIPE, lambda: programs, Settings(recordings=str(tmp_path)), clock=Clock())
    refused("the server is still starting", made.check_input, True, False)


def test_a_connection_whose_session_another_takes_up_is_told(live):
    with live.connect() as old, live.connect() as new:
        take_up(old, new, **START)
        assert old.closed() == (4410, "another connection has taken up this session")
        new.pull(3)
        assert [chunk["index"] for chunk in new.chunks] == [1, 2, 3]


def test_a_number_of_chunks_that_was_never_reached_hides_none(live):
    with live.connect() as viewer:
        viewer.send("start", **START)
        token = viewer.until("session")["token"]
        viewer.pull(2)
        viewer.socket.socket.shutdown(socket.SHUT_RDWR)
    with live.connect() as viewer:
        viewer.send("resume", token=token, received=99)
        viewer.until("session")
        viewer.send("pull", upto=4, received=0)
        viewer.until("chunk")


def test_a_page_that_is_left_frees_its_place_and_finishes_its_recording(live):
    """A browser closes with the code 1001. Other ends are lost connections, which can be taken up."""
    with live.connect() as viewer:
        viewer.send("start", **START)
        viewer.send("record", on=True)
        name = viewer.until("recording")["name"]
        viewer.pull(2)
        viewer.socket.close(1001)
    path = pathlib.Path(live.settings.recordings, name)
    end = time.monotonic() + 10
    while live.engine.sessions() or path.with_name(f".{name}.lock").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert script.read_script(path).blocks >= 2


def test_a_script_and_a_snapshot_start_a_film_alone(live):
    """What a start does not use was dropped: the film of the snapshot, with another prompt, had the old one."""
    with live.connect() as viewer:
        viewer.send("start", **START)
        viewer.pull(1)
        viewer.send("snapshot")
        kept = viewer.until("snapshot")["id"]
        viewer.send("script")
        told = {"script": json.loads(viewer.until("script")["script"])}
        for payload, values, given in (
            (png(), {"snapshot": kept}, "snapshot and a picture"),
            (None, {"snapshot": kept, "prompt": PROMPT}, "snapshot and prompt"),
            (None, told | {"seed": 5}, "script and seed"),
            (None, told | {"snapshot": kept}, "script and snapshot"),
        ):
            viewer.send("start", payload, **values)
            assert f"start has {given}; a script or a snapshot is given alone" in viewer.until("error")["message"]
        viewer.pull(1)
        viewer.send("start", snapshot=kept, prompt="", seed=0)  # the defaults
        assert viewer.until("started")["prompt"] == PROMPT


def test_a_strength_without_a_video_is_refused(live):
    """It is the distance from the video; without one it did nothing."""
    with live.connect() as viewer, live.http() as http:
        viewer.send("start", **START)
        viewer.pull(1)
        viewer.send("input", strength=0.5)
        assert "strength is 0.5 without a picture" in viewer.until("error")["message"]
        viewer.send("input")
        viewer.pull(1)
        fields = {"prompt": PROMPT, "strength": 0.5, "seconds": 0.1}
        picture = {"input_reference": ("x.png", png())}
        for body in ({"json": fields}, {"data": fields, "files": picture}):
            answer = http.post("/v1/videos", **body)
            assert answer.status_code == 400
            assert "strength is 0.5 without a video" in answer.json()["error"]["message"]
        assert not http.get("/v1/videos").json()["data"]


def test_a_payload_that_a_message_does_not_read_is_refused(live):
    with live.connect() as viewer:
        viewer.send("start", **START)
        viewer.pull(1)
        viewer.send("prompt", png(), prompt=PROMPT)
        assert viewer.closed() == (4400, "malformed message: prompt has no payload")


def test_an_event_that_could_not_be_sent_is_sent_to_the_next_connection(live, monkeypatch):
    from starlette.websockets import WebSocket

    with live.connect() as viewer:
        viewer.send("start", **START)
        token = viewer.until("session")["token"]
        viewer.pull(1)
        sends = WebSocket.send_json

        async def breaks(socket, data, mode="text"):
            if data["type"] == "script":
                raise OSError("the connection is gone")
            await sends(socket, data, mode)

        monkeypatch.setattr(WebSocket, "send_json", breaks)
        viewer.send("script")
        with contextlib.suppress(ConnectionClosed):
            while True:
                viewer.receive()
        monkeypatch.undo()
    with live.connect() as viewer:
        viewer.send("resume", token=token, received=1)
        assert script.from_json(viewer.until("script")["script"]).seed == START["seed"]


def test_pages_of_the_list_of_videos_end(live):
    with live.http() as http:
        made = [http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1}).json()["id"] for _ in range(5)]
        seen, page = [], {"has_more": True, "last_id": None}
        while page["has_more"] and len(seen) < 20:
            after = {"after": page["last_id"]} if seen else {}
            page = http.get("/v1/videos", params={"limit": 2, **after}).json()
            seen += [video["id"] for video in page["data"]]
        assert seen == made[::-1]
        assert [video["id"] for video in http.get("/v1/videos?order=asc").json()["data"]] == made
        assert http.get("/v1/videos?after=video_0").status_code == 404
        wrong = http.get("/v1/videos?limit=abc")
        assert wrong.status_code == 400 and wrong.json()["error"]["message"].startswith("limit: Input should be")


@pytest.mark.parametrize(
    "name,body",
    [
        ("duration", {"json": {"prompt": PROMPT, "duration": 8}}),
        ("input_reference", {"json": {"prompt": PROMPT, "input_reference": {"image_url": "data:"}}}),
        ("image", {"data": {"prompt": PROMPT}, "files": {"image": ("x.png", png())}}),
        ("input_reference", {"data": {"prompt": PROMPT, "input_reference": "x.png"}}),
    ],
)
def test_what_a_request_for_a_video_cannot_say_is_refused(live, name, body):
    """A field that is not read would make another video than was asked for."""
    with live.http() as http:
        answer = http.post("/v1/videos", **body)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(f"{name}: ")
        assert not http.get("/v1/videos").json()["data"]
