"""Shared parts of the programs that start training on other machines: arguments, remote command, dry run.

They are for login nodes and laptops: nothing here imports JAX.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence

STAGES = ("vae", "taehv", "teacher", "causal", "init", "consistency", "distill")
Command = list[str]


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of the arguments that name the training.

    Other flags of ``launch.train`` follow after ``--``.
    """
    usage = "%(prog)s [options] [-- flags of launch.train]"
    result = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    result.add_argument("--config", required=True, help="recipe file, as for launch.train")
    result.add_argument("--stage", required=True, choices=STAGES, help="what to train")
    result.add_argument("--workdir", required=True, help="on a file system that all hosts share")
    result.add_argument("--name", default="causvid", help="of the job or resource")
    result.add_argument("--dry_run", action="store_true", help="print what would be run, run nothing")
    return result


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``words`` (None: the command line). ``flags`` holds the arguments after ``--``."""
    words = list(sys.argv[1:] if words is None else words)
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.flags = words[end + 1 :]
    return arguments


def train_command(arguments: argparse.Namespace, python: str = "python3", *extra: str) -> str:
    """Return the shell command of ``launch.train``."""
    flags = [f"--config={arguments.config}", f"--stage={arguments.stage}", f"--workdir={arguments.workdir}"]
    return shlex.join([python, "-m", "launch.train", *flags, *extra, *arguments.flags])


def finished(arguments: argparse.Namespace) -> str:
    """Return a shell test of whether the stage is trained to its end. SIGTERM ends a run with status 0 too."""
    return f"test -e {shlex.quote(f'{arguments.workdir}/{arguments.stage}/weights.safetensors')}"


def execute(commands: Sequence[Command], *, dry_run: bool, text: str = "") -> int:
    """Run ``commands`` in parallel with ``text`` as standard input; return the first status that is not 0, else 0.

    The dry run prints the commands and the text in shell syntax.
    """
    if dry_run:
        for command in commands:
            print(f"{shlex.join(command)} <<'END'\n{text.rstrip()}\nEND" if text else shlex.join(command))
        return 0
    try:
        running = [subprocess.Popen(command, stdin=subprocess.PIPE if text else None) for command in commands]
    except FileNotFoundError as error:
        print(
            f"error: {error.filename} is not installed here; --dry_run prints the input that it would get",
            file=sys.stderr,
        )
        return 2
    for process in running:
        if process.stdin:
            process.stdin.write(text.encode())
            process.stdin.close()
    return next((status for status in [process.wait() for process in running] if status), 0)
