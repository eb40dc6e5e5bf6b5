"""All other processes name the one that is lost.

Threads stand for processes here, real ones are killed in ``test_hosts.py``.
"""

import concurrent.futures
import contextlib
import socket
import threading

import jax
import pytest

from causvid_jax.distributed import handshake, initialize, watchdog
from causvid_jax.distributed.handshake import Address
from tests.programs import free_port


class Run:
    """``count`` processes that have greeted one another; ``ends`` gets (process, status) of each that is ended."""

    def __init__(self, count):
        port = free_port()
        everyone = [Address(f"127.0.0.1:{port}", count, i) for i in range(count)]
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            self.peers = list(pool.map(lambda address: handshake.handshake(address, wait=30), everyone))
        self.ends, self._changed = {}, threading.Condition()
        self.watches = [self._watch(i, count) for i in range(count)]

    def _watch(self, i, count):
        def end(status):
            with self._changed:
                self.ends[i] = status
                self._changed.notify_all()
            for peer in self.peers[i]:  # as the kernel does
                peer.connection.close()

        return watchdog.Watchdog(self.peers[i], count, end)

    def kill(self, i):
        # A killed process loses all of its connections at once. Without the lock its watch, which lives on in this
        # one, would see the first of them end before the last, and tell the last one that it misses the first.
        with self.watches[i]._lock:
            for peer in self.peers[i]:
                with contextlib.suppress(OSError):  # the other one was first
                    peer.connection.shutdown(socket.SHUT_RDWR)

    def ended(self, *numbers, within=10.0):
        with self._changed:
            return self._changed.wait_for(lambda: all(n in self.ends for n in numbers), within)


def test_whoever_is_killed_is_named_on_all_others(capfd):
    run = Run(4)
    run.kill(2)
    assert run.ended(0, 1, 3)
    assert all(run.ends[i] == 1 for i in (0, 1, 3))
    for i in (0, 1, 3):
        assert run.watches[i].lost.startswith(f"process 2 of 4 on {socket.gethostname()} was lost: it was killed")
    assert capfd.readouterr().err.count("error: process 2 of 4 on") >= 3


def test_process_0_is_missed_by_all():
    run = Run(3)
    run.kill(0)
    assert run.ended(1, 2)
    assert "process 0 of 3 on 127.0.0.1 was lost" in run.watches[1].lost
    assert run.watches[1].lost == run.watches[2].lost


def test_who_says_goodbye_is_not_missed():
    run = Run(3)
    for i in (1, 0, 2):
        run.watches[i].finish()
        run.kill(i)
    for one in run.watches:
        one.wait_for_loss(0.2)
    assert run.ends == {} and all(one.lost is None for one in run.watches)


def test_after_a_failure_the_others_have_time_to_say_what_they_met(monkeypatch):
    monkeypatch.setattr(watchdog, "GRACE", 0.5)
    run = Run(3)
    with pytest.raises(ZeroDivisionError), initialize.notify_peers(run.watches[1]):
        raise ZeroDivisionError
    assert run.watches[0].wait_for_loss(0.1) and run.ends == {}
    assert run.ended(0, 2)
    assert "process 1 of 3" in run.watches[2].lost and "has failed: see its own log" in run.watches[2].lost


def test_an_orderly_stop_is_a_goodbye():
    run = Run(2)
    with pytest.raises(initialize.Stopped), initialize.notify_peers(run.watches[1]):
        raise initialize.Stopped
    run.kill(1)
    assert run.watches[0].wait_for_loss(0.3) is None and run.ends == {}


def test_what_a_collective_says_of_a_missing_process_is_put_in_words():
    run = Run(2)
    run.kill(1)
    with pytest.raises(jax.errors.JaxRuntimeError), initialize.notify_peers(run.watches[0]):
        raise jax.errors.JaxRuntimeError("Gloo: Connection closed by peer")
    assert run.ended(0) and "process 1 of 2" in run.watches[0].lost
