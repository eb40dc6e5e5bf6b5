"""Sessions share the device block by block; nothing grows for a viewer that does not listen; time-outs by a clock."""

import hashlib
import os

import numpy as np
import pytest

from causvid_jax.sampling import script
from causvid_jax.serve import fragments
from causvid_jax.serve.film import Film, Replay
from causvid_jax.serve.jobs import Jobs
from causvid_jax.serve.session import Change, Start
from tests.refusals import refused
from tests.serve.conftest import events, frames_of, run

PROMPT = "a red 3 moving left"


def test_generation_stops_at_the_permission_and_at_what_is_not_confirmed(engine):
    session = engine.open(Start(PROMPT))
    run(engine)
    assert session.made == 1  # a start is the permission for the first
    engine.pull(session, 99, 0)
    run(engine)
    assert session.made == engine.settings.ahead == len(session.chunks)
    engine.pull(session, 99, 2)
    run(engine)
    assert session.made == engine.settings.ahead + 2 and len(session.chunks) == engine.settings.ahead
    engine.pause(session, True)
    engine.pull(session, 99, session.made)
    assert run(engine) == 0


def test_sessions_take_turns_and_a_silent_one_slows_nobody(engine):
    order = []
    first, second = engine.open(Start(PROMPT)), engine.open(Start(PROMPT, seed=1))
    for name, session in (("a", first), ("b", second)):
        session.on_frames = lambda frames, name=name: order.append(name)
        engine.pull(session, 2, 0)
    run(engine)
    assert sorted("".join(order)[i : i + 2] for i in (0, 2, 4)) in (["ab"] * 3, ["ba"] * 3)
    for _ in range(5):
        engine.pull(first, first.made, first.made)
        run(engine)
    assert first.made == 8 and second.made == 3


def test_a_job_that_starts_at_once_has_its_first_block_and_one_that_cannot_leaves_no_file(engine, monkeypatch):
    """The worker may make the first block before ``open`` returns."""
    jobs, opened = Jobs(engine), engine.open

    def at_once(*given, **named):
        session = opened(*given, **named)
        run(engine)
        return session

    monkeypatch.setattr(engine, "open", at_once)
    job = jobs.create(PROMPT, seconds=20 / 16, seed=3)
    run(engine)
    assert job.status == "completed"
    film = Film(engine.programs, 3, PROMPT)
    frames = np.concatenate([film.step() for _ in range(9)])[:20]
    written = script.read_script(job.path)
    assert written.sha256 == hashlib.sha256(frames.tobytes()).hexdigest() and written.length == 20
    for _ in range(3):
        opened(Start(PROMPT))
    refused = jobs.create(PROMPT)
    assert refused.status == "failed" and "places and the queue are taken" in refused.error
    assert list(job.path.parent.iterdir()) == [job.path]


def test_the_newest_videos_are_kept_and_a_file_that_goes_meanwhile_is_no_error(tmp_path):
    kept = {letter: tmp_path / f"{kind}{24 * letter}.mp4" for letter, kind in (("a", ""), ("b", "video_"), ("c", ""))}
    gone = tmp_path / f"{24 * '0'}.mp4"  # as a file that is removed between listing and looking
    gone.symlink_to(tmp_path / "nothing")
    for age, name in ((3, "b"), (1, "a"), (2, "c")):
        kept[name].touch()
        os.utime(kept[name], (1000 - age, 1000 - age))
    fragments.remove_old(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == sorted([gone, kept["a"], kept["c"]])


def test_files_of_others_in_the_directory_of_recordings_stay(engine, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    names = ["wedding.mp4", "video_1.mp4", ".apt.lock", f"{24 * 'a'}.mp4.bak", f"my {24 * 'a'}.mp4"]
    for name in names:
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    fragments.remove_old(folder, 1)
    engine.load()
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_the_queue_tells_its_position_and_refuses_beyond_its_length(engine):
    running = [engine.open(Start(PROMPT), "somebody") for _ in range(2)]
    waiting = engine.open(Start(PROMPT), "else")
    assert events(waiting, "queued")[-1]["position"] == 1
    refused("queue are taken", engine.open, Start(PROMPT), "third")
    run(engine)
    assert waiting.made == 0
    engine.close(running[0], "enough")
    run(engine)
    assert waiting.made == 1 and events(running[0], "ended")[0]["reason"] == "enough"


def test_a_lost_connection_is_taken_up_without_a_frame_lost(engine):
    session = engine.open(Start(PROMPT))
    engine.pull(session, 2, 0)
    run(engine)
    frames = frames_of(session)
    engine.pull(session, 2, 1)
    assert engine.lose(session, session.on_output)
    engine.clock.now = 59.0
    engine.tick()
    assert engine.attach("wrong", 1, print) is None and engine.attach(session.token, 0, print) is None
    again = engine.attach(session.token, 1, lambda: None)
    assert again is session and [chunk.index for chunk in session.chunks] == [1, 2]
    whole = Replay(engine.programs, session.film.script())
    made = [whole.step() for _ in range(3)]
    np.testing.assert_array_equal(frames, np.concatenate(made))
    assert not engine.lose(session, print) and session.lost is None  # the end of a connection before
    engine.lose(session, session.on_output)
    engine.clock.now = 59.0 + 61.0
    engine.tick()
    assert session.status == "ended" and engine.attach(session.token, 1, print) is None


def test_an_idle_session_ends_with_a_reason(engine):
    session = engine.open(Start(PROMPT))
    engine.clock.now = engine.settings.idle_seconds + 1
    engine.tick()
    assert events(session, "ended")[0]["reason"] == "nothing was asked for 120 s" and not engine.sessions()


def test_of_a_thousand_changes_the_latest_counts_and_the_script_stays_short(engine):
    session = engine.open(Start(PROMPT))
    run(engine)
    for i in range(1000):
        engine.change(session, Change(f"a green {i % 10} moving up", "keep", id=i + 1))
    engine.pull(session, 1, 1)
    run(engine)
    assert session.chunks[-1].knows == 1000 and len(session.film.script().events) == 2
    engine.change(session, Change("a purple 3", "keep", id=1001))
    run(engine)
    assert "unknown word 'purple'" in events(session, "error")[0]["message"] and session.status == "running"


def test_snapshot_fork_and_replay_through_sessions(engine):
    session = engine.open(Start(PROMPT, seed=5))
    engine.pull(session, 1, 0)
    run(engine)
    engine.snapshot(session, 1)
    run(engine)
    kept = events(session, "snapshot")[0]
    assert kept["block"] == 2
    fork = engine.open(Start(snapshot=kept["id"]))
    for each in (session, fork):
        engine.pull(each, each.made + 1, each.made)
    run(engine)
    np.testing.assert_array_equal(fork.chunks[0].frames, session.chunks[0].frames)
    engine.script(session)
    run(engine)
    written = script.from_json(events(session, "script")[0]["script"])
    engine.restart(fork, Start(script=written))
    for _ in range(6):
        engine.pull(fork, 99, fork.made)
        run(engine)
    done = events(fork, "replayed")[0]
    assert done["same"] is True and done["blocks"] == written.blocks
    engine.restart(fork, Start(snapshot="none"))
    run(engine)
    assert "no longer kept" in events(fork, "error")[0]["message"]


def test_a_full_recording_is_closed_and_the_film_goes_on(engine, monkeypatch):
    session = engine.open(Start(PROMPT))
    run(engine)
    engine.record(session, True)
    engine.pull(session, 2, 1)
    run(engine)
    session.recording.most_bytes = 1
    engine.pull(session, 4, 3)
    run(engine)
    assert "its limit" in events(session, "error")[0]["message"] and session.made == 5
    name = events(session, "recorded")[0]["name"]
    assert script.read_script(f"{engine.settings.recordings}/{name}").first == 1


@pytest.mark.parametrize("blocks", [300, pytest.param(14400, marks=pytest.mark.slow)])
def test_a_long_film_keeps_its_size(engine, blocks):
    """State, chunks, events, script and memory are as large as after 100 blocks; 14400 are an hour of film."""
    session = engine.open(Start(PROMPT))
    for block in range(blocks):
        engine.pull(session, session.made, session.made)
        run(engine)
        if block == 100:
            size, memory = session.film.state_bytes, resident()
    assert session.film.block == blocks and session.film.state_bytes == size
    assert len(session.chunks) == 1 and len(session.film.script().events) == 1 and len(session.events) <= 3
    assert resident() - memory < 32 * 2**20


def resident():
    """Return the bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
