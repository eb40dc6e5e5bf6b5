"""A hundred hostile clients beside a good one."""

import contextlib
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.serve.conftest import Server
from tests.serve.test_engine import resident

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = "a red 3 moving left"


def queued():
    """Return how many seconds each thread of this process has waited for a core."""
    found = {}
    for path in pathlib.Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            found[path] = int(path.read_text().split()[1]) / 1e9
    return found


def waits(viewer, seconds):
    """Watch in real time; return how many seconds each chunk took from its ``pull`` to its arrival.

    Time that a thread was ready and had no core is the fault of other programs, such as tests beside this one, so the
    longest such time is left out.
    """
    result, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        chunk = viewer.chunks[-1]
        before, asked = queued(), time.monotonic()
        viewer.send("pull", upto=chunk["index"] + 1, received=chunk["index"] + 1)
        chunk = viewer.until("chunk")
        took = time.monotonic() - asked
        result.append(took - max(value - before.get(path, 0.0) for path, value in queued().items()))
        time.sleep(max(0.0, chunk["count"] / 16 - took))
    return np.array(result)


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_a_hundred_hostile_clients_beside_a_good_one(programs, tmp_path, seconds):
    with Server(programs, tmp_path, sessions=4, queue=16, per_address=10**6) as live, live.connect() as viewer:
        viewer.send("start", prompt=PROMPT)
        viewer.until("chunk")
        alone = waits(viewer, 3)
        command = [sys.executable, "-m", "tests.serve.hostile", str(live.port), str(seconds)]
        attackers = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        beside = waits(viewer, seconds / 2)
        memory = resident()
        beside = np.concatenate([beside, waits(viewer, seconds / 2)])
        closes = json.loads(attackers.communicate(timeout=60)[0])
        grown = resident() - memory
        live.engine.settings.__dict__["resume_seconds"] = 0.0
        time.sleep(2.5)
        assert len(live.engine.sessions()) == 1 and len(viewer.chunks[-1]["prompt"]) > 0
        print(f"alone {alone.max():.3f} s, beside {beside.max():.3f} s, grown {grown >> 20} MiB, {closes}")
    assert (beside > 0.75).sum() <= (alone > 0.75).sum(), beside.max()
    assert grown < 48 * 2**20
    codes: dict[str, set[str]] = {}
    for key in closes:
        codes.setdefault(key.split()[0], set()).add(key.split()[1])
    assert codes["malformed"] == {"4400"} and codes["origin"] == {"4403"}
    # A client that goes on sending while it is turned away may be cut off before it reads the code.
    assert codes["oversized"] <= {"1009", "4400", "cut"} and codes["flood"] <= {"4429", "4400", "open", "cut"}
