"""Films over WebRTC: an aiortc client receives them over loopback, and every refusal has its reason."""

import asyncio
import gc
import os
import pathlib
import time

import numpy as np
import pytest

from causvid_jax.cli import serve as program
from causvid_jax.config import ConfigError
from causvid_jax.config.recipes import load_recipe
from tests.serve.conftest import Server

aiortc = pytest.importorskip("aiortc", reason="aiortc is not installed (pip install 'causvid_jax[webrtc]')")
webrtc = pytest.importorskip("causvid_jax.serve.webrtc")

PROMPT = "a red 3 moving left"


def sockets():
    """Return how many sockets this process has open."""
    return sum(
        os.path.islink(entry) and os.readlink(entry).startswith("socket:")
        for entry in pathlib.Path("/proc/self/fd").iterdir()
    )


async def receive(live, token):
    """Return a connected peer and its video track; both ends use loopback alone."""
    peer = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
    transceiver = peer.addTransceiver("video", direction="recvonly")
    webrtc._listen_at(transceiver, ["127.0.0.1"])
    await peer.setLocalDescription(await peer.createOffer())
    answer = await asyncio.to_thread(post, live, {"session": token, "sdp": peer.localDescription.sdp})
    assert answer.status_code == 200, answer.text
    assert "127.0.0.1" in answer.json()["sdp"] and answer.json()["sdp"].count("a=candidate") == 1
    await peer.setRemoteDescription(aiortc.RTCSessionDescription(answer.json()["sdp"], "answer"))
    return peer, transceiver.receiver.track


def post(live, body, **options):
    with live.http() as http:
        return http.post("/v1/webrtc", json=body, **options)


def color(frame):
    """Return mean red, green and blue of what is bright."""
    pixels = frame.to_ndarray(format="rgb24").astype(float)
    return pixels[pixels.max(-1) > 100].mean(0)


async def until(condition, what, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} has not happened within {seconds} s"
        await asyncio.sleep(0.02)


async def watch(live, viewer, token):
    """Receive, change the prompt, leave, come back, and end."""
    session = live.engine.sessions()[0]
    peer, track = await receive(live, token)
    frames, arrivals = [], []
    for _ in range(40):
        frames.append(await asyncio.wait_for(track.recv(), 20))
        arrivals.append(time.monotonic())
        assert session.made - session.confirmed <= live.settings.ahead
    red = color(frames[-1])
    assert red[0] > 120 and red[0] > 2 * red[1:].max()
    assert np.ptp([frame.to_ndarray(format="rgb24")[..., 0] for frame in frames], axis=0).max() > 100  # something moves
    stamps = np.diff([frame.pts * frame.time_base for frame in frames]).astype(float)
    assert np.median(stamps) == pytest.approx(1 / live.engine.fps, abs=1e-3)
    assert arrivals[-1] - arrivals[8] > 0.8 * 31 / live.engine.fps  # in real time, not as fast as it can
    viewer.send("prompt", prompt="a green 7 moving up", id=1)
    begin = time.monotonic()
    while (now := color(await asyncio.wait_for(track.recv(), 20)))[1] < 120 or now[1] < 2 * now[0]:
        assert time.monotonic() < begin + 20, now
    chunks = []
    while not chunks or chunks[-1]["knows"] != 1:
        message = await asyncio.to_thread(viewer.receive)
        chunks += [message] if message["type"] == "chunk" else []
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))  # each block was shown, in order
    assert chunks[-1]["prompt"] == "a green 7 moving up" and chunks[-1]["format"] == "webrtc"
    await peer.close()
    await until(lambda: not alive(webrtc.FilmTrack), "the end of the track")
    made = session.made
    await asyncio.sleep(0.5)
    assert session.made <= made + 1 and session.status == "running"  # nobody watches: at most what was asked for
    peer, track = await receive(live, token)
    other, again = await receive(live, token)  # replaces the one before
    assert color(await asyncio.wait_for(again.recv(), 20))[1] > 120
    await asyncio.to_thread(viewer.send, "stop")
    await until(lambda: not live.engine.sessions(), "the end of the session")
    await peer.close()
    await other.close()


def alive(kind):
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]  # isinstance asks foreign objects


def nothing_is_left(before):
    """Wait until no more sockets than ``before``, and no peer or track, exist."""
    end = time.monotonic() + 10
    while (sockets() > before or alive((aiortc.RTCPeerConnection, webrtc.FilmTrack))) and time.monotonic() < end:
        time.sleep(0.1)
    assert sockets() <= before and not alive((aiortc.RTCPeerConnection, webrtc.FilmTrack))


def test_a_peer_sees_the_prompt_change_the_film_and_leaves_nothing(digits, tmp_path):
    with Server(digits, tmp_path, webrtc=True) as live:
        before = sockets()
        with live.connect() as viewer:
            assert viewer.receive()["webrtc"]
            viewer.send("start", prompt=PROMPT, format="webrtc")
            asyncio.run(watch(live, viewer, viewer.until("session")["token"]))
            assert viewer.closed() == (1000, "the client ended it")
        nothing_is_left(before)


async def offer(kind, direction):
    peer = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
    if kind == "data":
        peer.createDataChannel("x")
    else:
        peer.addTransceiver(kind, direction=direction)
    sdp = (await peer.createOffer()).sdp
    await peer.close()
    return sdp


def test_bad_offers_are_refused_with_a_sentence(programs, tmp_path):
    with Server(programs, tmp_path, webrtc=True, token="a-long-secret-token") as live:
        headers, before = {"authorization": "Bearer a-long-secret-token"}, sockets()
        good = asyncio.run(offer("video", "recvonly"))
        assert post(live, {"session": "x", "sdp": good}).status_code == 401
        assert post(live, {}, headers=headers | {"origin": "https://evil.example"}).status_code == 403
        with live.connect(subprotocols=["causvid.v1", "token.a-long-secret-token"]) as viewer:
            viewer.send("start", prompt=PROMPT)
            token = viewer.until("session")["token"]
            for format, session, sdp, sentence in (
                ("webp", token, good, "no session of this token waits for WebRTC"),
                ("webrtc", "é" * 10, good, "no session of this token waits for WebRTC"),
                ("webrtc", token, "", "one video and nothing else"),
                ("webrtc", token, good + good[good.index("m=") :], "one video and nothing else"),
                ("webrtc", token, asyncio.run(offer("audio", "recvonly")), "one video and nothing else"),
                ("webrtc", token, asyncio.run(offer("data", "")), "one video and nothing else"),
                ("webrtc", token, asyncio.run(offer("video", "sendonly")), "receives no video"),
                ("webrtc", token, "m=video 9 nonsense", "no SDP"),
                ("webrtc", token, "x" * 70000, "sdp: String should have at most 65536"),
            ):
                viewer.send("start", prompt=PROMPT, format=format)
                viewer.until("started")
                time.sleep(0.05)
                answer = post(live, {"session": session, "sdp": sdp}, headers=headers)
                assert answer.status_code == 400 and sentence in answer.json()["error"]["message"], answer.text
            with live.http() as http:
                assert http.post("/v1/webrtc", content=b"{", headers=headers).status_code == 400
        nothing_is_left(before)  # the server may still hold the frames of the last error for a moment


def test_a_peer_that_never_connects_is_given_up(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(webrtc, "CONNECT_SECONDS", 0.3)
    with Server(programs, tmp_path, webrtc=True) as live, live.connect() as viewer:
        viewer.send("start", prompt=PROMPT, format="webrtc")
        token = viewer.until("session")["token"]
        before = sockets()
        assert post(live, {"session": token, "sdp": asyncio.run(offer("video", "recvonly"))}).status_code == 200
        assert viewer.until("error")["message"] == "WebRTC did not connect within 0 s"
        nothing_is_left(before)


def test_a_server_without_it_says_so(live, monkeypatch):
    with live.connect() as viewer:
        assert not viewer.receive()["webrtc"]
        viewer.send("start", prompt=PROMPT, format="webrtc")
        assert viewer.closed() == (4400, "this server has no WebRTC; it is started with --webrtc")
    assert post(live, {"session": "x", "sdp": "x"}).status_code in (404, 405)
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--webrtc needs aiortc; install it: pip install"):
        program.main(program.Options(config=load_recipe("digits"), webrtc=True))


@pytest.mark.parametrize(
    "host, expected",
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["127.0.0.1"]),
        ("::1", ["::1"]),
        ("0.0.0.0", None),
        ("10.1.2.3", ["10.1.2.3"]),
    ],
)
def test_peers_are_received_where_the_server_listens(host, expected):
    assert webrtc.addresses(webrtc.Settings(host=host, token="a-long-secret-token")) == expected
