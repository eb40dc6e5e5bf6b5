"""The programs of a stream compile while its weights are read."""

import threading
import time

import jax
import numpy as np
import pytest

import causvid_jax as cv
from causvid_jax.checkpoints import workdir
from causvid_jax.config import ConfigError
from causvid_jax.sampling import player, session, weights
from causvid_jax.sampling.request import SampleRequest
from causvid_jax.serve import programs as served
from causvid_jax.serve.functions import Function
from tests import tiny

PROGRAMS = ("jit(first_state)", "jit(next_frames)", "jit(change_prompt)")
RED, BLUE = "a red 3 moving left", "a blue 7 moving up"
LONG = 120  # seconds within which another thread must act


@pytest.fixture
def folder(tmp_path):
    return tiny.tiny_workdir(tmp_path, examples=1)


def request(folder, **changes):
    given = {"prompt": (RED, BLUE), "checkpoint": str(folder), "frames": 14, "upscale": 1}
    return SampleRequest(config=tiny.RECIPE, output=str(folder / "out.gif"), **given | changes)


def damage(folder):
    """Change one bit of the student's last value."""
    path = workdir.stage_path(folder, "distill")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def compilers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("compiler")]


def test_every_program_is_compiled_before_the_weights_are_read(folder, monkeypatch):
    """The student is read only after the last program is compiled, which would never end in the other order."""
    opened = session.open_session(request(folder, switch=(f"9:{RED}",)))
    texts = dict(zip(opened.texts, session.encoder.encode(opened.encoder, opened.texts), strict=True))
    expected = list(session.student_blocks(opened, texts, player.Timing()))
    events, compiled, prepare, read = [], threading.Event(), player.Programs.prepare, weights.load_student

    def prepared(self, function, *args, **static):
        result = prepare(self, function, *args, **static)
        events.append(function.__name__)
        if function.__name__ == "change_prompt":  # the last one of the dry run
            compiled.set()
        return result

    def read_late(*args, **options):
        assert compiled.wait(LONG)
        events.append("read")
        return read(*args, **options)

    monkeypatch.setattr(player.Programs, "prepare", prepared)
    monkeypatch.setattr(weights, "load_student", read_late)
    timing = player.Timing()
    with session.compile_ahead(opened, timing) as ahead:
        parts = list(session.student_blocks(opened, texts, timing, ahead))
    assert events[: events.index("read")] == ["first_state", "next_frames", "next_frames", "change_prompt"]
    for part, wanted in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part, wanted)
    assert timing.compile > 0 and not compilers()


def test_damaged_weights_end_a_session_with_their_sentence(folder, monkeypatch):
    """The program at hand is finished, and no other is begun."""
    opened, begun, prepare = session.open_session(request(folder)), [], player.Programs.prepare
    damage(folder)

    def slow(self, function, *args, **static):
        result = prepare(self, function, *args, **static)
        begun.append(function.__name__)
        end = time.monotonic() + LONG
        while not self.closed and time.monotonic() < end:
            time.sleep(0.01)
        return result

    monkeypatch.setattr(player.Programs, "prepare", slow)
    with pytest.raises(ConfigError, match="weights.safetensors is corrupt: its checksum does not match"):
        session.run(opened, lambda line: None)
    assert begun == ["first_state"] and not compilers()


def test_a_program_that_does_not_compile_ends_a_session_with_its_sentence(folder, monkeypatch):
    opened = session.open_session(request(folder))

    def refused(*args, **options):
        raise ConfigError("this kernel cannot be compiled")

    monkeypatch.setattr(player.Programs, "prepare", refused)
    with pytest.raises(ConfigError, match="this kernel cannot be compiled"):
        session.run(opened, lambda line: None)
    assert not compilers()


def test_damaged_weights_end_a_server_before_its_other_programs(folder, monkeypatch):
    """Two threads compile beside the one that reads; the programs that wait for them are not begun."""
    damage(folder)
    begun, refused, load = [], threading.Event(), weights.load

    def compiled(self, params, *arrays):
        begun.append(self)
        assert refused.wait(LONG)
        time.sleep(1.0)  # the refusal reaches the thread that waits for the weights
        raise RuntimeError("a program of a server that does not start")

    def read(*args):
        try:
            return load(*args)
        finally:
            refused.set()

    monkeypatch.setattr(Function, "lower", compiled)
    monkeypatch.setattr(weights, "load", read)
    with pytest.raises(ConfigError, match="weights.safetensors is corrupt: its checksum does not match"):
        served.open_programs(tiny.RECIPE, str(folder), compiles=True)
    assert len(begun) <= 4


def test_load_compiles_while_weights_are_read(folder, monkeypatch):
    """The programs compile before the student is read, and the stream and its switch find them."""
    compiled, read = [], weights.load
    all_compiled = threading.Event()

    def listen(event, seconds, **about):
        if event.endswith("backend_compile_duration") and about.get("fun_name") in PROGRAMS:
            compiled.append(about["fun_name"])
            all_compiled.set() if set(compiled) == set(PROGRAMS) else None

    def read_late(*args):
        assert all_compiled.wait(LONG)
        return read(*args)

    monkeypatch.setattr(weights, "load", read_late)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pipe = cv.load(tiny.RECIPE, checkpoint=folder, streams=2)
        count = len(compiled)
        (frames, state), *_ = pipe.frames(pipe.stream([RED, BLUE], seed=3))
        pipe.switch(state, BLUE)
        assert count == len(PROGRAMS) == len(compiled) and not compilers()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    monkeypatch.setattr(weights, "load", read)
    usual = cv.load(tiny.RECIPE, checkpoint=folder)
    expected, _ = next(usual.frames(usual.stream([RED, BLUE], seed=3)))
    np.testing.assert_array_equal(frames, expected)


def test_load_refuses_streams_that_it_cannot_compile(folder):
    with pytest.raises(ConfigError, match="streams is 0; accepted: 1 or more"):
        cv.load(tiny.RECIPE, checkpoint=folder, streams=0)
    with pytest.raises(ConfigError, match="streams is given with loras"):
        cv.load(tiny.RECIPE, checkpoint=folder, streams=1, loras={"style": "style.safetensors"})
