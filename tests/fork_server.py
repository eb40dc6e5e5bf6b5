"""Run programs in forks of one process that has imported them, so that a run costs no imports; for test_kills.py.

Reads ``[program, arguments, seconds, log]`` in JSON per line; after ``seconds`` (null: never) the run gets SIGKILL.
Answers ``[status, seconds]`` per line.
"""

import json
import os
import signal
import sys
import threading
import time

from causvid_jax.cli import common


def imports() -> None:
    """Import what programs import, without any computation: no backend of JAX may start before a fork."""
    import causvid_jax.analysis.compile_report
    import causvid_jax.checkpoints.convert
    import causvid_jax.data.prepare
    import causvid_jax.sampling.session
    import causvid_jax.training.curves
    import causvid_jax.training.export
    import causvid_jax.training.stages  # noqa: F401


def child(program: str, arguments: list[str], log: str) -> None:
    """Run a program and leave with its status."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 0
    try:
        common.run(program, arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 3
    sys.stdout.flush()
    os._exit(status)


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
        timer = threading.Timer(seconds or 0, os.kill, (number, signal.SIGKILL))
        if seconds is not None:
            timer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        timer.cancel()
        print(json.dumps([status, time.monotonic() - begin]), file=answers, flush=True)


if __name__ == "__main__":
    main()
