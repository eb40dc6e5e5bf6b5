"""Runs with bad losses, full disks or damaged checkpoints, compared with undisturbed runs."""

import dataclasses
import errno
import os
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import CONFIG, weights

from causvid_jax.config import ConfigError, RunError, StageConfig
from causvid_jax.training import checkpoint, checksums
from causvid_jax.training.metrics import read_metrics


def run(workdir, config=CONFIG, **options):
    tiny_run.train(workdir, config, **options)
    return weights(workdir)


def equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def steps_of(workdir):
    folder = workdir / "tiny" / "checkpoints"
    return sorted((path.name for path in folder.iterdir()), key=lambda name: (len(name), name))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return an uninterrupted run of 6 steps with checkpoints at 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir)
    return workdir


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"truncate": truncate, "flip": flip, "delete": pathlib.Path.unlink}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_seen_and_named(finished, tmp_path, kind):
    whole = finished / "tiny" / "checkpoints" / "6"
    assert checksums.present(whole) and checksums.problem(whole) is None
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and "checksums" not in path.name]
    assert len(files) > 8
    for name in files:
        if kind == "truncate" and not (whole / name).stat().st_size:
            continue
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        if kind == "flip" and not (copy / name).stat().st_size:
            (copy / name).write_bytes(b"x")
        else:
            DAMAGE[kind](copy / name)
        assert str(name) in checksums.problem(copy)


def test_every_process_reads_its_share_and_all_of_them_everything(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "PIECE", 1000)
    copy = tmp_path / "6"
    shutil.copytree(finished / "tiny" / "checkpoints" / "6", copy)
    for part in copy.glob("checksums.*"):
        part.unlink()
    for process in range(3):
        assert not checksums.present(copy)
        checksums.write(copy, process, 3)
    assert checksums.present(copy)
    # Another number of processes may read it.
    assert [checksums.problem(copy, p, 2) for p in range(2)] == [None, None]
    flip(max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    assert sum(checksums.problem(copy, p, 2) is not None for p in range(2)) == 1


def test_a_damaged_checkpoint_is_set_aside_and_the_step_before_is_used(finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest, before = (tmp_path / "tiny" / "checkpoints" / step for step in ("6", "4"))
    flip(max((path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    (tmp_path / "tiny" / "weights.safetensors").unlink()
    equal(run(tmp_path), weights(finished))
    told = capfd.readouterr().err
    assert f"checkpoint 6 in {newest.parent} is damaged: state/" in told
    assert "has changed; the one of step 4 is used" in told and "continuing from step 4" in told
    assert told.count("tiny: compiling the step, which can take minutes ...\n") == 1
    assert steps_of(tmp_path) == ["2", "4", "6", "6.damaged"]
    assert [record["step"] for record in read_metrics(tmp_path / "tiny")] == [1, 2, 3, 4, 5, 6]
    # Both bad, the manifest itself among them: the one before those.
    flip(newest / "checksums.0-of-1.json")
    (before / "checksums.0-of-1.json").unlink()
    checkpoints = checkpoint.Checkpoints(newest.parent, 3)
    assert checkpoints.last == 2 and len(checkpoints.reports()) == 2
    checkpoints.close()
    (newest.with_name("2") / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(RunError, match="every checkpoint in .* is damaged .2: _CHECKPOINT_METADATA is 2 bytes"):
        checkpoint.Checkpoints(newest.parent, 3)
    assert newest.with_name("2").is_dir()


def test_checkpoints_of_older_versions_have_no_checksums_and_are_taken(finished, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished / "tiny" / "checkpoints", folder)
    for part in folder.rglob("checksums.*"):
        part.unlink()
    checkpoints = checkpoint.Checkpoints(folder, 3)
    assert checkpoints.last == 6 and "no checksums; it is used as it is" in checkpoints.reports()[0]
    state = tiny_run.initial_state()
    state, progress = checkpoints.restore(state)
    assert progress["step"] == 6 and int(state.step) == 6 and np.isfinite(state.history.recent).sum() == 6
    checkpoints.close()


def test_a_checkpoint_of_other_arrays_is_refused_in_one_sentence(finished):
    """Orbax's own sentence has the names of its classes and every array of the run, thousands for a large network."""
    folder = finished / "tiny" / "checkpoints"
    state, larger = tiny_run.initial_state(), tiny_run.initial_state(size=5)
    network = dataclasses.replace(state.network, params=state.network.params | {"bias": jnp.zeros(2)})
    without = dataclasses.replace(state.network, params={})
    for other, difference in (
        (larger, "ballast and 3 more (saved: (8,), this run: (5,))"),
        (dataclasses.replace(state, network=network), "bias (saved: no such array, this run: (2,))"),
        (dataclasses.replace(state, network=without), "ballast and 1 more (saved: (8,), this run: no such array)"),
    ):
        checkpoints = checkpoint.Checkpoints(folder, 3)
        with pytest.raises(ConfigError) as refused:
            checkpoints.restore(other)
        checkpoints.close()
        assert str(refused.value) == (
            f"checkpoint 6 in {folder} does not fit this configuration: network.params.{difference}; use another "
            "--workdir or the configuration it was made with"
        )


def test_a_state_that_is_trained_on_does_not_change_what_is_being_saved(tmp_path):
    step = tiny_run.train_step()
    state, checkpoints = tiny_run.initial_state(size=200_000), checkpoint.Checkpoints(tmp_path, 1)
    batch = jnp.ones((4, 4))
    state, _ = step(state, batch)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(1, state, {"step": 1})
    for _ in range(30):
        state, _ = step(state, batch)
    checkpoints.wait()
    restored, _ = checkpoints.restore(state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    checkpoints.close()


# ---- what stays -----------------------------------------------------------------------------------------------------


def test_the_last_n_and_every_mth_checkpoint_stay(tmp_path):
    run(tmp_path, dataclasses.replace(CONFIG, steps=9, save_every=1, keep=2, keep_every=3))
    assert steps_of(tmp_path) == ["3", "6", "8", "9"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"keep": 0}, "keep is 0"),
        ({"keep_every": 3}, "keep_every is 3; it must be 0 or a multiple of save_every, which is 2"),
        ({"on_bad_loss": "pray"}, "on_bad_loss is 'pray'; accepted: 'stop', 'skip'"),
        ({"bad_loss_factor": 0.5}, "bad_loss_factor is 0.5; it must be above 1, or 0"),
        ({"bad_loss_window": 0}, "bad_loss_window is 0"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        StageConfig(**{"save_every": 2, **change})


# ---- bad losses -----------------------------------------------------------------------------------------------------


def spoil(at, factor=np.nan):
    return lambda number, x: factor * x if number == at else x


SHORTER = dataclasses.replace(CONFIG, steps=CONFIG.steps - 1)


def without(number):
    """Read batches but never batch ``number``; a run of them is one step shorter."""

    class Shortened:
        def __init__(self, **options):
            self.inner, self.count = tiny_run.read_batches(**options), 0

        def __next__(self):
            self.count += 1
            if self.count == number:
                next(self.inner)
            return next(self.inner)

        def get_state(self):
            return self.inner.get_state()

    return Shortened


def examples(number):
    """Return the numbers of the examples of a batch as in the log."""
    batches = tiny_run.read_batches(batch_size=CONFIG.batch_size, frames=0, seed=CONFIG.seed)
    for _ in range(number):
        batch = next(batches)
    for index, x in zip(batch["index"], batch["x"], strict=True):
        np.testing.assert_array_equal(tiny_run.Examples()[index]["x"], x)
    return "examples " + ", ".join(str(i) for i in batch["index"])


@pytest.mark.parametrize("bad", [3, 4])  # followed by an unseen step, and by a checkpoint
def test_a_skipped_batch_leaves_the_parameters_of_a_run_without_it(tmp_path, capfd, bad):
    config = dataclasses.replace(CONFIG, on_bad_loss="skip")
    skipped = run(tmp_path / "a", config, change=spoil(bad))
    equal(skipped, run(tmp_path / "b", SHORTER, read=without(bad)))
    told = capfd.readouterr().err
    assert f"tiny: step {bad}: loss is nan and gradient_norm is nan, {examples(bad)}; its update is skipped" in told
    totals = [record["skipped_total"] for record in read_metrics(tmp_path / "a" / "tiny")]
    assert totals == [int(step >= bad) for step in range(1, 7)]
    # What was skipped once is no reason to stop later.
    run(tmp_path / "a", dataclasses.replace(config, steps=8, on_bad_loss="stop"))


@pytest.mark.parametrize("bad", [3, 4])
def test_a_run_that_stops_leaves_the_step_before_and_can_go_on_without_the_batch(tmp_path, bad):
    config = dataclasses.replace(CONFIG, log_every=10)
    with pytest.raises(RunError) as stopped:
        run(tmp_path / "a", config, change=spoil(bad))
    sentence = str(stopped.value)
    assert f"step {bad}: loss is nan" in sentence and examples(bad) in sentence
    assert f"the checkpoint is of step {bad - 1} in" in sentence and "on_bad_loss=skip" in sentence
    folder = tmp_path / "a" / "tiny" / "checkpoints"
    run(tmp_path / "b", dataclasses.replace(config, steps=bad - 1))
    for name in ("network.params", "network.ema", "network.opt"):
        _, got, progress = checkpoint.read(folder, name)
        _, expected, _ = checkpoint.read(tmp_path / "b" / "tiny" / "checkpoints", name)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert progress["step"] == bad - 1
    # The batch comes again and is bad again, so the next one is batch 2 of the new process.
    again = run(tmp_path / "a", dataclasses.replace(config, on_bad_loss="skip"), change=spoil(1))
    equal(again, run(tmp_path / "c", SHORTER, read=without(bad)))


def test_an_exploding_loss_is_measured_by_the_median_of_those_before(tmp_path, capfd):
    config = dataclasses.replace(CONFIG, on_bad_loss="skip", bad_loss_factor=50.0, bad_loss_window=3)
    # Before three losses are known anything goes; then 100 times the input is too much.
    early = run(tmp_path / "early", config, change=spoil(2, 100.0))
    assert "is skipped" not in capfd.readouterr().err
    assert np.isfinite(early["params/w"]).all()
    late = run(tmp_path / "late", config, change=spoil(5, 100.0))
    assert "is more than 50 times the median of the last" in capfd.readouterr().err
    equal(late, run(tmp_path / "without", SHORTER, read=without(5)))


# ---- full disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_the_run_goes_on(finished, tmp_path, monkeypatch, capfd):
    whole = checksums.write

    def full(folder, *share):
        if pathlib.Path(folder).name == "4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(folder, *share)

    monkeypatch.setattr(checksums, "write", full)
    equal(run(tmp_path), weights(finished))
    told = capfd.readouterr().err
    assert f"checkpoint 4 could not be written to {tmp_path / 'tiny' / 'checkpoints'}: No space left on device" in told
    assert "the last good one is of step 2" in told
    assert {"2", "6"} <= set(steps_of(tmp_path))


DISK = 4 * 2**20


@pytest.fixture
def small_disk(tmp_path):
    """Return a disk of ``DISK`` bytes, if this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
    if not mount or subprocess.run(command, check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# Callbacks of Orbax's failed writes find their event loop closed (JAX 0.12, Python 3.12).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_really_full(small_disk, tmp_path, capfd):
    config = dataclasses.replace(CONFIG, steps=10, log_every=100)
    filler = small_disk / "filler"

    def fill():
        with pytest.raises(OSError), open(filler, "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def change(number, x):
        if number >= 6:  # checkpoint 2 is on disk, 4 perhaps; what a failed one had taken comes free again
            fill()
        return x

    def export(state):
        # Nor do these find room, whatever comes free meanwhile.
        return {"w": np.zeros(2 * DISK, np.uint8)}

    with pytest.raises((RunError, ConfigError), match="No space left on device"):
        run(small_disk, config, change=change, export=export)
    told = capfd.readouterr().err
    assert "could not be written" in told and "No space left on device" in told and "Traceback" not in told
    filler.unlink()
    again = run(small_disk, config)
    assert re.search("continuing from step [24]\n", capfd.readouterr().err)
    equal(again, run(tmp_path / "other", config))


def test_a_file_of_another_size_is_named_with_both_sizes(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    checksums.write(tmp_path)
    (tmp_path / "a").write_bytes(b"01234")
    assert checksums.problem(tmp_path) == "a is 5 bytes instead of 10"


def test_fewer_steps_than_a_checkpoint_has_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigError, match="steps is 5, but .* has a checkpoint of step 6; accepted: at least 6"):
        run(tmp_path, SHORTER)


@pytest.mark.parametrize("curriculum", [(), ((2, 0, 2),), ((5, 0, 2),)], ids=["none", "before", "around"])
def test_a_run_with_more_steps_reads_on_where_the_shorter_one_ended(tmp_path, curriculum):
    """It began the order of the examples again, so it read the first ones twice."""
    config = dataclasses.replace(CONFIG, curriculum=curriculum, save_every=3)
    run(tmp_path / "a", dataclasses.replace(config, steps=3))
    equal(run(tmp_path / "a", config), run(tmp_path / "b", config))
