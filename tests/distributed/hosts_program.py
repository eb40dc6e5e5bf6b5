"""One of the processes of ``test_hosts.py``: it trains as ``launch.train`` does, several stages in one start.

``hosts_program.py stages WORKDIR PROCESS COUNT PORT NAMES`` trains the stages NAMES of ``WORKDIR/recipe.json`` in
``WORKDIR/NAME`` each and prints as JSON what it was refused on the way, and how much it read.
``hosts_program.py train EVENT STEP FLAGS...`` is ``launch.train`` with FLAGS to which the EVENT happens before step
STEP (0: never): a signal (TERM, INT, KILL), INT+INT or ERROR.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax

from causvid_jax.checkpoints import checkpoint
from causvid_jax.config import ConfigError, from_json
from causvid_jax.distributed import collectives, initialize
from causvid_jax.training import stages
from causvid_jax.training.run import Run


def _refusal(call, *arguments):
    try:
        call(*arguments)
    except ConfigError as error:
        return str(error)
    return None


def _stages(workdir, number, count, port, names):
    """These stages, in these processes; what the checks of arguments and folders say."""
    with initialize.notify_peers(
        initialize.initialize(initialize.discover(f"127.0.0.1:{port}", int(count), int(number)))
    ):
        _joined(workdir, number, names.split(","))


def _joined(workdir, number, names):
    jax.config.update("jax_default_matmul_precision", "highest")
    folder = pathlib.Path(workdir)
    own = folder / f"own{number}"
    own.mkdir()
    values = {"stage": "vae", "config": {"train_vae": {"batch_size": 4 + int(number), "steps": 3}}}
    said = {
        "count": jax.process_count(),
        "same": _refusal(collectives.check_same, {"a": {"b": [1, 2]}}),
        "other": _refusal(collectives.check_same, values),
        "shared": _refusal(collectives.check_shared, folder),
        "not shared": _refusal(collectives.check_shared, own),
    }
    recipe = from_json((folder / "recipe.json").read_text())
    read, parts, read_part = [], [], checkpoint.read_array

    def counted(opened, *arguments):
        part = read_part(opened, *arguments)
        if opened.network.component != "vae":
            parts.append(part)
        return part

    checkpoint.read_array = counted
    batches = Run.batches

    def counting(run, read_batches, to_device):
        def counted(batch):
            read.append(len(batch["caption"]))
            return to_device(batch)

        return batches(run, read_batches, counted)

    Run.batches = counting
    # Only the test of all stages in two processes looks at samples.
    if not (len(names) > 2 and jax.process_count() == 2):
        Run.samples_now = False
    for name in names:
        stages.train(name, recipe, folder / name)
    weights = sum(part.nbytes for part in parts)
    print("RESULT", json.dumps(said | {"first": collectives.is_first(), "read": read, "weights": weights}))


def _happen(event):
    if event == "ERROR":
        raise ZeroDivisionError("spoilt")
    for name in event.split("+"):
        if name == "UNPLUG":
            subprocess.run(["ip", "link", "set", "cable", "down"], check=True)
            continue
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        time.sleep(0.1)


def _train(event, event_at, arguments):
    """The program, its steps slow once a signal is under way: hosts agree in a fraction of a second."""
    from causvid_jax.cli import common

    batches, done = Run.batches, 0

    def patched(run, read_batches, to_device):
        nonlocal done
        for batch in batches(run, read_batches, to_device):
            done += 1
            if done == event_at:
                _happen(event)
            if event_at and done >= event_at:
                time.sleep(1.0)
            yield batch

    Run.batches, Run.samples_now = patched, False
    jax.config.update("jax_default_matmul_precision", "highest")
    common.run("train", arguments)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "stages":
        _stages(*arguments)
    else:
        _train(arguments[0], int(arguments[1]), arguments[2:])
