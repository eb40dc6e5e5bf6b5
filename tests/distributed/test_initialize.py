"""Processes find each other's addresses, or every process gets one sentence that says what is wrong.

Threads stand for processes here; real ones train in ``test_hosts.py``.
"""

import concurrent.futures
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from causvid_jax.config import ConfigError
from causvid_jax.distributed import handshake, initialize
from causvid_jax.distributed.handshake import Address
from tests.programs import free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]


def handshake_all(addresses, wait):
    """Return the error message of every process, or None."""

    def one(address):
        try:
            handshake.handshake(address, wait=wait)
        except ConfigError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(one, addresses))


def addresses(numbers, counts):
    port = free_port()
    return [Address(f"127.0.0.1:{port}", n, i) for i, n in zip(numbers, counts, strict=True)]


def test_all_there():
    assert handshake_all(addresses([2, 1, 0], [3, 3, 3]), 30) == [None] * 3


def test_the_missing_are_named_on_every_host_that_is_there_in_time():
    began = time.monotonic()
    said = handshake_all(addresses([0, 2], [4, 4]), 1.5)
    assert time.monotonic() - began < 10
    assert said[0] == said[1]
    assert said[0].startswith("process(es) 1, 3 of 4 did not connect within 1.5 s; start all of them")


def test_a_missing_process_0_is_named():
    said = handshake_all(addresses([1, 2], [3, 3]), 1.0)
    for i, sentence in enumerate(said, 1):
        assert sentence.startswith(
            f"process 0 of 3 did not answer within 1 s: process {i} cannot reach it at 127.0.0.1"
        )


def test_other_numbers_are_refused_on_all():
    said = handshake_all(addresses([0, 1], [2, 3]), 30)
    assert said[0] == said[1] and "was started with 3 processes, process 0 with 2" in said[0]
    said = handshake_all(addresses([0, 1, 1], [3, 3, 3]), 30)
    assert len(set(said)) == 1 and "both have the process number 1; number them 0 to 2" in said[0]


def test_whatever_else_knocks_at_the_port_is_not_counted():
    there = addresses([0, 1], [2, 2])

    def knock():
        for _ in range(200):
            try:
                with socket.create_connection(there[0].handshake_address, timeout=1) as connection:
                    return connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            except OSError:
                time.sleep(0.02)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        server = pool.submit(handshake.handshake, there[0], wait=30)
        pool.submit(knock).result()
        handshake.handshake(there[1], wait=30)
        server.result()


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
            handshake.handshake(Address(f"127.0.0.1:{port - 1}", 2, 0), wait=1)


def test_a_process_alone_needs_nothing():
    assert initialize.discover(environment={}) is None
    assert initialize.discover("host:1", 1, 0, environment={}) is None


def test_addresses_come_from_flags_or_variables():
    expected = Address("host:1234", 4, 3)
    assert initialize.discover("host:1234", 4, 3, environment={}) == expected
    variables = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert initialize.discover(environment=variables) == expected
    assert expected.handshake_address == ("host", 1235)
    assert Address("host:65535", 2, 0).handshake_address == ("host", 61439)


@pytest.mark.parametrize(
    ("per_node", "devices"), [("8(x2)", (5,)), ("1(x2)", None)], ids=["a task per device", "a task per node"]
)
def test_slurm_is_read_as_jax_reads_it(monkeypatch, per_node, devices):
    variables = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[007-008]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "13",
        "SLURM_LOCALID": "5",
        "SLURM_STEP_TASKS_PER_NODE": per_node,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # Neighbouring jobs have neighbouring coordinator ports, so the greeting keeps away from them.
    assert initialize.discover(environment=os.environ) == Address("node007:61441", 16, 13, devices)
    assert Address("node007:61441", 16, 13).handshake_address == ("node007", 57345)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("", 2, -1), {}, "--coordinator, --process not given"),
        (("host:1", 2, -1), {}, "--process not given"),
        (("host", 2, 0), {}, "'host'; it must be HOST:PORT"),
        (("host:99999", 2, 0), {}, "must be HOST:PORT"),
        (("host:1", 2, 2), {}, "process 2 of 2; accepted: 0 to 1"),
        (("host:1", -2, 0), {}, "number of processes is -2"),
        (("", 0, -1), {"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID not given"),
        (
            ("", 0, -1),
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES is 'two'",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(arguments, environment, message):
    with pytest.raises(ConfigError, match=message):
        initialize.discover(*arguments, environment=environment)


def test_the_program_says_who_is_missing_and_ends_with_status_2(tmp_path):
    flags = ["--config=configs/digits.py", "--stage=vae", f"--workdir={tmp_path}"]
    flags += [f"--coordinator=127.0.0.1:{free_port()}", "--processes=3", "--process=0", "--wait=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: process(es) 1, 2 of 3 did not connect within 0.5 s")
