"""A run that is killed by signal 9 many times, also during saves, ends with the parameters of an uninterrupted one.

Every step saves, so that most kills fall into a save. ``CAUSVID_JAX_KILLS=30`` for more than the few of every day.
"""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import weights

from causvid_jax.config import ConfigError
from causvid_jax.training import run_lock

KILLS = int(os.environ.get("CAUSVID_JAX_KILLS", "2"))
STEPS = 6 + 6 * KILLS
SIZE = 200_000  # 3 MB a checkpoint
PROGRAM = pathlib.Path(__file__).with_name("tiny_run.py")


def start(workdir, steps=STEPS):
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROGRAM.parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, str(PROGRAM), str(workdir), str(steps), str(SIZE)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def committed(workdir):
    """Return the newest step whose checksums were complete when the process died."""
    folder = workdir / "tiny" / "checkpoints"
    whole = [int(path.parent.name) for path in folder.glob("*/checksums.0-of-1.json") if path.parent.name.isdecimal()]
    return max(whole, default=0)


def test_killed_again_and_again_it_ends_like_a_run_that_never_was(tmp_path):
    whole = start(tmp_path / "whole")
    whole.communicate(timeout=600)
    assert whole.returncode == 0

    rng = random.Random(0)
    kills, in_a_save, reached = 0, 0, 0
    while True:
        process = start(tmp_path / "killed")
        if kills < KILLS:
            # At a random moment of one of its first steps; the pace is measured, cores may be busier than before.
            assert process.stdout.readline() == "step\n", process.stderr.read()
            began, steps = time.monotonic(), rng.randint(1, 3)
            for _ in range(steps):
                process.stdout.readline()
            time.sleep(rng.uniform(0, (time.monotonic() - began) / steps))
            process.send_signal(signal.SIGKILL)
        told = process.communicate(timeout=600)[1]
        if reached:
            assert f"continuing from step {reached}\n" in told
        assert "Traceback" not in told, told
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL and kills < KILLS
        kills, reached = kills + 1, committed(tmp_path / "killed")
        names = os.listdir(tmp_path / "killed" / "tiny" / "checkpoints")
        in_a_save += any("tmp" in name for name in names) or str(reached + 1) in names
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name in first:
        np.testing.assert_array_equal(second[name], first[name], err_msg=name)
    assert kills == KILLS
    print(json.dumps({"kills": kills, "in a save": in_a_save}))


def test_a_second_run_in_the_same_folder_waits_and_is_refused_until_the_first_is_gone(tmp_path):
    """A second run would remove the checkpoint that the first one is writing."""
    first = start(tmp_path, steps=10**6)
    assert first.stdout.readline() == "step\n", first.stderr.read()
    name = f"process {first.pid} on {socket.gethostname()}"
    in_use = f"tiny is in use: {name} is training there; let it end, or use another --workdir"
    with pytest.raises(ConfigError, match=in_use), run_lock.claimed(tmp_path / "tiny", wait=0.5):
        pytest.fail("the folder of a run that goes on was given away")
    second = start(tmp_path, steps=10**6)
    for line in second.stderr:
        if f"{name} is training in {tmp_path / 'tiny'}; waiting up to 30 s for its end" in line:
            break
    assert first.poll() is None and first.stdout.readline() == "step\n"
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=600)
    assert second.stdout.readline() == "step\n", second.stderr.read()  # it has the folder and goes on
    second.send_signal(signal.SIGKILL)
    assert "continuing from step" in second.communicate(timeout=600)[1]
