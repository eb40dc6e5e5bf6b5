"""Ctrl-C and signals that come while Python drops exceptions, imports a module or cleans up."""

import gc
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from causvid_jax.cli import common
from causvid_jax.training import preemption

ROOT = pathlib.Path(__file__).parents[2]
SENTENCES = {signal.SIGINT: (130, "stopped by Ctrl-C\n"), signal.SIGTERM: (143, "stopped by SIGTERM\n")}


@pytest.fixture(params=SENTENCES)
def number(request):
    """Return a signal that has Python's own handler, as in a new process."""
    default = signal.default_int_handler if request.param == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(request.param, default)
    yield request.param
    signal.signal(request.param, inherited)


def ended(monkeypatch, capfd, program):
    """Run ``program()`` as a program; return its status, and what it wrote to stderr."""
    monkeypatch.setattr(common, "call", lambda *_: program())
    before = sys.unraisablehook, signal.getsignal(signal.SIGALRM)
    begin = time.monotonic()
    with pytest.raises(SystemExit) as end:
        common.run("sample", [])
    assert time.monotonic() - begin < 30 and (sys.unraisablehook, signal.getsignal(signal.SIGALRM)) == before
    return end.value.code, capfd.readouterr().err


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(monkeypatch, capfd, number):
    """JAX has such a callback; Python drops what it raises."""
    calls = []

    def callback(phase, info):
        calls.append(phase)
        if len(calls) <= 4:  # lost four times
            os.kill(os.getpid(), number)

    def program():
        gc.callbacks.append(callback)
        try:
            gc.collect()
            gc.collect()
            time.sleep(60)
        finally:
            gc.callbacks.remove(callback)

    assert ended(monkeypatch, capfd, program) == SENTENCES[number]


def test_a_signal_in_a_destructor_is_not_lost(monkeypatch, capfd, number):
    class Dies:
        def __del__(self):
            os.kill(os.getpid(), number)

    def program():
        Dies()
        time.sleep(60)

    assert ended(monkeypatch, capfd, program) == SENTENCES[number]


def test_other_errors_of_a_destructor_are_reported_as_before(monkeypatch, capfd):
    class Fails:
        def __del__(self):
            raise ValueError("a defect")

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))
    monkeypatch.setattr(common, "call", lambda *_: Fails() and None)
    common.run("sample", [])
    assert reported == ["a defect"]


def test_a_module_is_imported_whole(monkeypatch, capfd, tmp_path, number):
    """An exception in the import of an extension module crashed the process, or was taken for a missing module."""
    name = f"interrupted_by_{number}"
    (tmp_path / f"{name}.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\nexcept BaseException:\n    pass\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def program():
        importlib.import_module(name)
        time.sleep(60)

    assert ended(monkeypatch, capfd, program) == SENTENCES[number]
    assert sys.modules.pop(name).whole


@pytest.mark.parametrize("number", [signal.SIGINT], indirect=True)
def test_a_module_is_imported_whole_during_a_training(monkeypatch, capfd, tmp_path, number):
    """The first Ctrl-C asks a training to stop; the second one in the import of an extension module crashed it."""
    (tmp_path / "interrupted_again.py").write_text(
        "import os\ntry:\n    os.kill(os.getpid(), 2)\nexcept BaseException:\n    pass\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def program():
        with preemption.requests() as requested:
            os.kill(os.getpid(), number)
            assert requested(1) == number
            importlib.import_module("interrupted_again")
            time.sleep(60)

    assert ended(monkeypatch, capfd, program) == SENTENCES[number]
    assert sys.modules.pop("interrupted_again").whole


@pytest.mark.parametrize("number", [signal.SIGTERM], indirect=True)
def test_a_second_signal_does_not_interrupt_the_cleanup(monkeypatch, capfd, number):
    cleaned = []

    def program():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            try:
                raise ValueError
            except ValueError:
                os.kill(os.getpid(), number)
            cleaned.append(1)

    assert ended(monkeypatch, capfd, program) == SENTENCES[number] and cleaned


def interrupted(tmp_path, code):
    """Run a program whose first module, ``yaml``, is this code; return its status and what it wrote to stderr."""
    (tmp_path / "yaml.py").write_text(code)
    # A shell starts background programs with Ctrl-C ignored.
    start = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('launch.sample', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, "--config=digits", "--prompt=x", "--output=x.mp4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def test_ctrl_c_while_the_first_modules_are_imported_is_one_line(tmp_path):
    """``yaml`` is imported before the flags are read."""
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    assert interrupted(tmp_path, code) == (130, "stopped by Ctrl-C\n")


def test_ctrl_c_while_python_exits_ends_the_process_at_once(tmp_path):
    """It raised an exception among libraries that were half gone: a traceback, and crashes."""
    code = "import atexit, os\natexit.register(os.kill, os.getpid(), 2)\nos.kill(os.getpid(), 2)\n"
    assert interrupted(tmp_path, code) == (-signal.SIGINT, "stopped by Ctrl-C\n")
