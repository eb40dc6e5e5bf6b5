"""The server over real sockets: stream, jobs, probes, and every refusal with its reason."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import struct
import threading
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from causvid_jax import media
from causvid_jax.cli import serve as cli_serve
from causvid_jax.cli.options import parse
from causvid_jax.cli.stopping import stoppable
from causvid_jax.config import ConfigError, RunError
from causvid_jax.sampling import script
from causvid_jax.serve import guard, server, transport
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.film import Film, replay
from causvid_jax.serve.settings import Settings
from tests.refusals import refused
from tests.serve.conftest import RECIPE, Server, Viewer, png, take_up

PROMPT = "a red 3 moving left"
START = {"prompt": PROMPT, "seed": 4}


@pytest.fixture(scope="module")
def shared(programs, tmp_path_factory):
    """Return a running server for what is refused, which leaves nothing behind."""
    with Server(programs, tmp_path_factory.mktemp("shared")) as running:
        yield running


def finished(http, job):
    """Wait for a job of ``/v1/videos`` and return its last answer."""
    while (now := http.get(f"/v1/videos/{job['id']}").json())["status"] in ("queued", "in_progress"):
        time.sleep(0.02)
    assert now["status"] == "completed" and now["progress"] == 100, now
    return now


def test_a_film_over_the_socket_is_the_film_of_the_sampler(live, programs):
    with live.connect() as viewer:
        assert viewer.receive()["version"] == "causvid.v1"
        viewer.send("start", **START)
        token = viewer.until("session")["token"]
        frames = [viewer.pull(2)]
        viewer.send("prompt", prompt="a green 7 moving up", context="keep", blend=2, id=1)
        while not viewer.chunks[-1]["knows"]:
            frames.append(viewer.pull(1))
        viewer.socket.socket.shutdown(socket.SHUT_RDWR)
    with live.connect() as viewer:
        received = len(frames) + 1
        viewer.send("resume", token=token, received=received)
        assert viewer.until("session")["resumed"]
        frames.append(viewer.pull(2))
        viewer.send("pause", paused=True)
        viewer.send("script")
        written = script.from_json(viewer.until("script")["script"])
        assert [event.prompt for event in written.events] == [PROMPT, "a green 7 moving up"]
        viewer.send("stop")
        assert viewer.closed() == (1000, "the client ended it")
    shown, whole = np.concatenate(frames), np.concatenate(list(replay(programs, written)))
    np.testing.assert_array_equal(shown, whole[: len(shown)])


def test_a_connection_that_was_replaced_does_not_end_the_session(live):
    """The old connection's end, which the server notices late, leaves the new one as it is."""
    with live.connect() as old, live.connect() as new:
        take_up(old, new, **START)
        # The server's own close may have been first.
        with contextlib.suppress(OSError):
            old.socket.socket.shutdown(socket.SHUT_RDWR)
        time.sleep(0.3)
        new.pull(3)
        assert live.engine.sessions()[0].lost is None


def test_record_fork_replay_picture_and_video(live, programs):
    with live.connect() as viewer, live.connect() as other:
        viewer.send("start", png(), **START)
        viewer.pull(2)
        viewer.send("record", on=True)
        name = viewer.until("recording")["name"]
        viewer.send("input", png(color=(0, 0, 255)), strength=0.5)
        viewer.pull(3)
        viewer.send("input")
        viewer.pull(1)
        viewer.send("snapshot", name=1)
        kept = viewer.until("snapshot")
        viewer.send("record", on=False)
        recorded = viewer.until("recorded")
        assert recorded["name"] == name
        with live.http() as http:
            answer = http.get(f"/v1/recordings/{name}")
            assert answer.headers["content-type"] == "video/mp4"
            assert http.get("/v1/recordings/..%2fx.mp4").status_code == 404
        path = f"{live.settings.recordings}/copy.mp4"
        pathlib.Path(path).write_bytes(answer.content)
        again = np.concatenate(list(replay(programs, script.read_script(path))))
        assert len(again) == recorded["frames"]
        other.send("start", snapshot=kept["id"])
        assert other.until("started")["block"] == kept["block"]
        other.pull(1)
        other.send("start", script=json.loads(script.read_script(path).to_json()))
        other.pull(2)


def test_h264_chunks_play_in_order(live):
    with live.connect() as viewer:
        viewer.send("start", format="mp4", **START)
        data = b""
        for _ in range(3):
            chunk = viewer.until("chunk")
            viewer.send("pull", upto=chunk["index"] + 1, received=chunk["index"] + 1)
            data += chunk["data"] if not data else chunk["data"][chunk["init"] :]
    path = f"{live.settings.recordings}.mp4"
    pathlib.Path(path).write_bytes(data)
    assert len(media.read_video(path, 16, 16)) == sum(chunk["count"] for chunk in viewer.chunks)


def test_videos_in_the_shape_of_openai(live, programs):
    with live.http() as http:
        job = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": "0.5", "seed": 9}).json()
        form = {"prompt": PROMPT, "seconds": "1", "size": "16x16"}
        second = http.post("/v1/videos", data=form, files={"input_reference": ("../../x.png", png())}).json()
        assert job["object"] == "video" and job["status"] in ("queued", "in_progress")
        for each in (job, second):
            finished(http, each)
        content = http.get(f"/v1/videos/{job['id']}/content")
        path = f"{live.settings.recordings}/{job['id']}.mp4"
        assert len(media.read_video(path, 16, 16)) == 8 and content.content == pathlib.Path(path).read_bytes()
        film = Film(programs, 9, PROMPT)
        frames = np.concatenate([film.step() for _ in range(4)])[:8]
        np.testing.assert_array_equal(np.concatenate(list(replay(programs, script.read_script(path)))), frames)
        listed = http.get("/v1/videos").json()
        assert [video["id"] for video in listed["data"]] == [second["id"], job["id"]]
        assert http.delete(f"/v1/videos/{job['id']}").json()["deleted"]
        assert http.get(f"/v1/videos/{job['id']}").status_code == 404
        for bad, sentence in (
            ({"prompt": "a purple 3"}, "unknown word 'purple'"),
            ({"prompt": PROMPT, "seconds": 1e9}, "seconds is 1e+09"),
            ({"prompt": PROMPT, "model": "sora-2"}, "model is 'sora-2'"),
            ({"seconds": 1}, "prompt: Field required"),
        ):
            answer = http.post("/v1/videos", json=bad)
            assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


def test_a_deleted_video_leaves_no_file_and_a_removed_one_is_gone(live):
    folder = pathlib.Path(live.settings.recordings)
    with live.http() as http:
        long = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 20}).json()
        next_one = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.01}).json()
        while not http.get(f"/v1/videos/{long['id']}").json()["progress"]:
            time.sleep(0.01)
        assert http.delete(f"/v1/videos/{long['id']}").json()["deleted"]
        finished(http, next_one)
        assert [path.name for path in folder.iterdir()] == [f"{next_one['id']}.mp4"]
        assert len(media.read_video(folder / f"{next_one['id']}.mp4", 16, 16)) == 1  # the least
        next(folder.iterdir()).unlink()
        answer = http.get(f"/v1/videos/{next_one['id']}/content")
        assert answer.status_code == 404 and "no longer kept" in answer.json()["error"]["message"]


def test_a_strength_out_of_bounds_does_not_end_the_session(live):
    with live.connect() as viewer:
        viewer.send("start", **START)
        viewer.pull(1)
        viewer.send("input", png(), strength=0.01)
        assert "strength is 0.01; accepted: " in viewer.until("error")["message"]
        viewer.pull(1)


def test_a_video_is_followed_as_the_sampler_follows_it(live, programs, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), np.uint8)
    media.write_video(tmp_path / "in.mp4", pictures, RECIPE.video.fps)
    with live.http() as http:
        form = {"prompt": PROMPT, "seed": "3", "strength": "0.5"}
        file = {"input_reference": ("x", (tmp_path / "in.mp4").read_bytes())}
        job = http.post("/v1/videos", data=form, files=file).json()
        assert float(finished(http, job)["seconds"]) == pytest.approx(11 / 16, abs=1e-3)
        damaged = {"input_reference": ("x", (tmp_path / "in.mp4").read_bytes()[:60])}
        answer = http.post("/v1/videos", data=form, files=damaged)
        assert answer.status_code == 400 and "cannot read the video" in answer.json()["error"]["message"]
        answer = http.post("/v1/videos", data=form | {"strength": "0.01"}, files=file)
        assert answer.status_code == 400 and "strength is 0.01" in answer.json()["error"]["message"]
    written = script.read_script(f"{live.settings.recordings}/{job['id']}.mp4")
    pipe, source = programs.pipe, media.read_video(tmp_path / "in.mp4", 16, 16, fps=16)
    followed = [frames[0] for frames, _ in pipe.follow(pipe.stream(PROMPT, seed=3), source, 0.5)]
    np.testing.assert_array_equal(np.concatenate(list(replay(programs, written))), np.concatenate(followed))


def test_probes_metrics_page_and_headers(live):
    with live.http() as http:
        assert http.get("/healthz").json() == {"status": "ok"} and http.get("/readyz").json() == {"status": "ready"}
        http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.1})
        time.sleep(0.3)
        text = http.get("/metrics").text
        assert 'causvid_first_chunk_seconds_count{recipe="tiny"} 1.0' in text
        for name in ("chunk_interval_p95_seconds", "real_time_factor", "deadline_misses_total", "queue_length"):
            assert f"causvid_{name}" in text
        page = http.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "/v1/videos/{key}/content" in http.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    "first, code, sentence",
    [
        ("{", 4400, "malformed message"),
        ("[" * 10000, 4400, "malformed message"),
        ('{"type": "walk"}', 4400, "malformed message"),
        ('{"type": "start", "prompt": 3}', 4400, "start.prompt"),
        ('{"type": "start", "prompt": "x", "seed": -1}', 4400, "start.seed"),
        ('{"type": "pull", "upto": 1, "received": 0}', 4400, "first message must be"),
        ('{"type": "resume", "token": "x", "received": 0}', 4410, "cannot be resumed"),
        ('{"type": "start", "prompt": ""}', 4400, "the prompt is empty"),
        ('{"type": "start", "script": {"events": 1}}', 4400, "no script"),
        (b"\xff\xff\xff\xff", 4400, "no header"),
        (struct.pack(">I", 33) + b'{"type": "start", "prompt": "a"} ' + b"GIF89a", 4400, "damaged"),
    ],
)
def test_a_bad_first_message_is_a_close_with_a_reason(shared, first, code, sentence):
    with shared.connect() as viewer:
        viewer.socket.send(first)
        closed = viewer.closed()
        assert closed[0] == code and sentence in closed[1]
    assert all(session.lost is not None for session in shared.engine.sessions())


def test_an_oversized_message_is_cut_off(shared):
    """The connection ends while the client still sends, so it may not get to read the code 1009."""
    before = [session.token for session in shared.engine.sessions()]
    with shared.connect() as viewer:
        with contextlib.suppress(ConnectionClosed, OSError):
            viewer.socket.send("x" * (5 * 2**20))
        with pytest.raises((ConnectionClosed, OSError)) as error:
            while True:
                viewer.receive()
        received = getattr(error.value, "rcvd", None)
        assert received is None or received.code == 1009
    assert all(session.token in before for session in shared.engine.sessions())


def test_wrong_origin_host_rate_and_size_are_refused(programs, tmp_path):
    limits = {"requests_per_minute": 12, "upload_bytes": 1000, "per_address": 1}
    with Server(programs, tmp_path, **limits) as live, live.http() as http:
        with live.connect(origin="https://evil.example") as viewer:
            assert viewer.closed()[0] == 4403
        assert http.get("/", headers={"host": "evil.example"}).status_code == 403
        assert http.post("/v1/videos", content=b"x" * 2000).status_code == 413
        assert http.post("/v1/videos", content=iter([b"x" * 600] * 2)).status_code == 413
        with live.connect() as one, live.connect() as two:
            one.send("start", **START)
            one.pull(1)
            two.send("start", **START)
            code, reason = two.closed()
            assert code == 4400 and "your address has 1 sessions" in reason
        for _ in range(12):
            last = http.get("/")
        assert last.status_code == 429 and "12 requests a minute" in last.json()["error"]["message"]
        assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/stream HTTP/1.1\r\nHost: local",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HT",
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
    ],
)
def test_a_request_that_does_not_arrive_is_closed(shared, monkeypatch, sent):
    """Nothing, half a head, half a second head and half a body; without a limit the answer would never come."""
    monkeypatch.setattr(transport, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as client:
        client.sendall(sent)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b" 408 Request Timeout" in answer and answer.startswith(b"HTTP/1.1 200") == (b"healthz" in sent)


def test_another_address_needs_a_token_and_the_token_opens(programs, tmp_path):
    refused("give --token", Settings, host="0.0.0.0")
    with Server(programs, tmp_path, token="a-long-secret-token") as live, live.http() as http:
        assert http.get("/metrics").status_code == 401 and http.get("/readyz").status_code == 200
        assert http.get("/metrics", headers={"authorization": "Bearer a-long-secret-token"}).status_code == 200
        with live.connect() as viewer:
            assert viewer.closed() == (4401, "the token is missing or wrong")
        with live.connect(subprotocols=["causvid.v1", "token.a-long-secret-token"]) as viewer:
            viewer.send("start", **START)
            viewer.pull(1)


@pytest.mark.parametrize("error", [ConfigError("no such weights"), ValueError("a defect")])
def test_a_server_that_cannot_load_ends_with_a_sentence(tmp_path, error):
    def load():
        raise error

    settings = Settings(port=0, recordings=str(tmp_path))
    with pytest.raises(ConfigError if isinstance(error, ConfigError) else RunError, match=str(error)):
        server.serve(Engine(RECIPE, load, settings), server.listen(settings))


def test_the_token_of_the_environment_opens_another_address(monkeypatch):
    """As the images and the manifests of docs/deploy give it."""
    everywhere, secret = ["--host=0.0.0.0"], "a-long-secret-token"
    monkeypatch.delenv("CAUSVID_TOKEN", raising=False)
    refused("which others can reach; give --token", parse, cli_serve.Options, everywhere)
    monkeypatch.setenv("CAUSVID_TOKEN", secret)
    assert parse(cli_serve.Options, everywhere).token == secret
    assert parse(cli_serve.Options, [*everywhere, "--token=another-secret-token"]).token == "another-secret-token"
    monkeypatch.setenv("CAUSVID_TOKEN", "short")
    refused("--token is too short", parse, cli_serve.Options, everywhere)


def test_stopping_finishes_recordings(programs, tmp_path):
    with Server(programs, tmp_path / "r") as live:
        viewer = live.connect()
        viewer.send("start", **START)
        viewer.send("record", on=True)
        viewer.pull(4)
    assert viewer.closed()[0] == 1012
    viewer.__exit__()
    files = list((tmp_path / "r").glob("*.mp4"))
    assert len(files) == 1
    written = script.read_script(files[0])
    assert len(media.read_video(files[0], 16, 16)) == sum(map(len, replay(programs, written))) >= 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_stops_a_server_finishes_recordings(programs, tmp_path, number):
    """Also SIGHUP, which the server gets when its terminal is closed."""
    settings = Settings(port=0, recordings=str(tmp_path))
    engine, listener = Engine(RECIPE, lambda: programs, settings), server.listen(settings)
    url, codes = f"127.0.0.1:{listener.getsockname()[1]}", []

    def client():
        assert engine.ready.wait(60)
        with Viewer(connect(f"ws://{url}/v1/stream", origin=f"http://{url}", compression=None)) as viewer:
            viewer.send("start", **START)
            viewer.send("record", on=True)
            viewer.until("recording")
            viewer.pull(4)
            os.kill(os.getpid(), number)
            codes.append(viewer.closed()[0])

    inherited = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    thread = threading.Thread(target=client, daemon=True)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped, stoppable():
            thread.start()
            server.serve(engine, listener)
    finally:
        signal.signal(number, inherited)
    thread.join(20)
    assert codes == [1012] and getattr(stopped.value, "number", signal.SIGINT) == number
    (file,) = tmp_path.iterdir()
    assert script.read_script(file).blocks >= 2
