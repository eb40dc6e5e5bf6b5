"""Run programs in forks of one process that has imported them, so that a run costs no imports; for test_kills.py.

Reads ``[program, arguments, seconds, log]`` in JSON per line; after ``seconds`` (null: never) the run gets SIGKILL.
Answers ``[status, seconds]`` per line. The program ``recording`` is the worker of ``causvid serve`` without sockets.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time

from causvid_jax.cli import common


def imports() -> None:
    """Import what programs import, without any computation: no backend of JAX may start before a fork."""
    import causvid_jax.analysis.bench
    import causvid_jax.analysis.compile_report
    import causvid_jax.checkpoints.convert
    import causvid_jax.data.prepare
    import causvid_jax.evaluation.measure
    import causvid_jax.evaluation.vbench.clips
    import causvid_jax.evaluation.vbench.drift
    import causvid_jax.sampling.session
    import causvid_jax.serve.programs
    import causvid_jax.training.curves
    import causvid_jax.training.experiment
    import causvid_jax.training.export
    import causvid_jax.training.stages  # noqa: F401


def record(workdir: str, recordings: str) -> None:
    """Record a film of some blocks, as ``causvid serve`` does."""
    from causvid_jax.serve.engine import Engine
    from causvid_jax.serve.programs import open_programs
    from causvid_jax.serve.session import Start
    from causvid_jax.serve.settings import Settings
    from tests.tiny import RECIPE

    engine = Engine(RECIPE, lambda: open_programs(RECIPE, workdir), Settings(recordings=recordings))
    engine.load()
    session = engine.open(Start("a red 3 moving left", seed=5))
    engine.record(session, True)
    for block in range(100):
        engine.pull(session, block, block)
        while engine.step():
            pass
    engine.stop()


def child(program: str, arguments: list[str], log: str) -> None:
    """Run a program and leave with its status."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 0
    try:
        if program == "recording":
            record(*arguments)
        else:
            common.run(program, arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 3
    sys.stdout.flush()
    os._exit(status)


def kill(number: int) -> None:
    """Kill a run that may have just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def main() -> None:
    """Serve until the input ends."""
    imports()
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        program, arguments, seconds, log = json.loads(line)
        begin, number = time.monotonic(), os.fork()
        if not number:
            child(program, arguments, log)
        timer = threading.Timer(seconds or 0, kill, (number,))
        if seconds is not None:
            timer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        timer.cancel()
        print(json.dumps([status, time.monotonic() - begin]), file=answers, flush=True)


if __name__ == "__main__":
    main()
