"""Measure the seconds from Enter to the first frame of a stream, and to the refusal of a flag.

``python benchmarks/start.py 5`` runs ``causvid sample --config=digits`` once to fill the compilation cache, then five
times. It prints the times until the line "First frame", which the program writes when the frames are on the host, and
the times until the program refuses an unknown flag. The machine should be idle.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

SAMPLE = [sys.executable, "-u", "-m", "launch.sample", "--config=digits", "--prompt=a red 3 moving left", "--frames=33"]


def first_frame(folder: str) -> float:
    """Return the seconds until the first frame of a stream.

    Raises:
        RuntimeError: the program ended without a frame.
    """
    begin = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*SAMPLE, f"--output={folder}/out.mp4"], **pipes) as program:
        assert program.stdout is not None
        seconds = [time.perf_counter() - begin for line in program.stdout if line.startswith("First frame")]
    if not seconds:
        raise RuntimeError(f"causvid sample ended with status {program.returncode} and without a frame")
    return seconds[0]


def refusal() -> float:
    """Return the seconds until an unknown flag is refused."""
    begin = time.perf_counter()
    program = subprocess.run([*SAMPLE, "--promt=x"], capture_output=True, text=True)
    assert program.returncode == 2 and "--promt" in program.stderr, program.stderr
    return time.perf_counter() - begin


def main(count: int) -> None:
    """Print median and range of both times over ``count`` runs."""
    with tempfile.TemporaryDirectory() as folder:
        first_frame(folder)
        measures: dict[str, Callable[[], float]] = {
            "first frame": lambda: first_frame(folder),
            "refused flag": refusal,
        }
        for name, measure in measures.items():
            seconds = [measure() for _ in range(count)]
            print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
