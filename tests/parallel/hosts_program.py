"""One of the processes of ``test_hosts.py``; it does what ``launch.train`` does, so that one start serves many checks.

``hosts_program.py stages WORKDIR PROCESS COUNT PORT`` trains every stage of ``WORKDIR/recipe.json`` in ``WORKDIR`` and
prints as JSON what it was refused on the way. ``hosts_program.py train SIGNAL_AT FLAGS...`` is ``launch.train`` with
FLAGS that gets a SIGTERM during step SIGNAL_AT (0: never).
"""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import time

import jax

from causvid_jax.config import ConfigError, from_json
from causvid_jax.parallel import hosts, start
from causvid_jax.training import loop, stages


def _refusal(call, *arguments):
    try:
        call(*arguments)
    except ConfigError as error:
        return str(error)
    return None


def _stages(workdir, number, count, port):
    """Every stage, in these processes; what the checks of arguments and folders say."""
    start.join(start.find(f"127.0.0.1:{port}", int(count), int(number)))
    jax.config.update("jax_default_matmul_precision", "highest")
    folder = pathlib.Path(workdir)
    own = folder / f"own{number}"
    own.mkdir()
    values = {"stage": "vae", "config": {"train_vae": {"batch_size": 4 + int(number), "steps": 3}}}
    said = {
        "count": jax.process_count(),
        "same": _refusal(start.check_same, {"a": {"b": [1, 2]}}),
        "other": _refusal(start.check_same, values),
        "shared": _refusal(start.check_shared, folder),
        "not shared": _refusal(start.check_shared, own),
    }
    recipe = from_json((folder / "recipe.json").read_text())
    read = []
    for name in stages.STAGES:
        stage = stages.make_stage(name, recipe, folder)

        def ready(batch, stage=stage):
            read.append(len(batch["caption"]))
            return stage.ready(batch)

        loop.train(dataclasses.replace(stage, ready=ready), folder)
    print("RESULT", json.dumps(said | {"first": hosts.first(), "read": read}))


def _train(signal_at):
    """The program, its steps slow once the signal is under way: hosts agree in a fraction of a second."""
    from launch import common, train

    original, done = loop.train, 0

    def patched(stage, workdir):
        def step(state, batch):
            nonlocal done
            done += 1
            if done == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if signal_at and done >= signal_at:
                time.sleep(1.0)
            return stage.step(state, batch)

        original(dataclasses.replace(stage, step=step), workdir)

    loop.train = patched
    jax.config.update("jax_default_matmul_precision", "highest")
    common.run(train.main)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "stages":
        _stages(*arguments)
    else:
        from launch import train  # noqa: F401 (defines the flags)

        sys.argv = ["launch.train", *arguments[1:]]
        _train(int(arguments[0]))
