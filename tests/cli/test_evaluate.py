"""The report's flags: one sentence for what it cannot do, before any compute."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "recipe 'two_digits' comes with no trained teacher; train it with launch.train --stage=teacher;"),
        (
            ["--student_only", "--teacher=own.safetensors"],
            "--teacher=own.safetensors and --student_only are both given",
        ),
        (["--student_only", "--student=own.safetensors"], "own.safetensors"),
    ],
)
def test_weights_that_cannot_be_judged(tmp_path, arguments, message):
    output = tmp_path / "report.json"
    command = [sys.executable, "-m", "launch.evaluate", "--config=configs/digits.py:two", f"--output={output}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith("error: ") and message in last, done.stderr
    assert not output.exists()
