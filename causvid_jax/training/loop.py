"""The training loop, the same for every stage: batches in, checkpoints, metrics and samples out."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from causvid_jax.config import StageConfig
from causvid_jax.parallel import hosts
from causvid_jax.training import stopping
from causvid_jax.training.checkpoint import Checkpoints
from causvid_jax.training.metrics import open_writer
from causvid_jax.training.progress import Progress
from causvid_jax.training.waiting import InputWait


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with batches of one shape: until step ``end``, from ``batches()`` (a Grain iterator)."""

    end: int
    batches: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage, as the loop needs it.

    Attributes:
      name: of the stage and of its folder under the working directory.
      config: steps, batch size, intervals.
      init: ``() -> state``, a pytree of arrays.
      step: ``(state, batch) -> (state, metrics)``, jitted, donating the state.
      phases: in order; the last one ends at ``config.steps``.
      ready: host batch -> what ``step`` takes (prompts become text rows here).
      sample: ``(state, folder, step) -> metrics``; writes pictures and videos to ``folder``.
      export: ``(state, path)``; writes the weights file.
      context: what all of it runs in: the mesh.
    """

    name: str
    config: StageConfig
    init: Callable[[], Any]
    step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    phases: tuple[Phase, ...]
    ready: Callable[[dict[str, Any]], Any]
    sample: Callable[[Any, pathlib.Path, int], dict[str, float]]
    export: Callable[[Any, pathlib.Path], None]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def train(stage: Stage, workdir: pathlib.Path) -> None:
    """Run ``stage`` to its last step from where ``workdir`` left it, then export its weights.

    Ctrl-C or SIGTERM, to any one of the processes of the run, makes all of them finish the same step, save a checkpoint
    and raise KeyboardInterrupt or :class:`stopping.Terminated`; started again, the run goes on from there and ends with
    the parameters an uninterrupted run would have (bit for bit on CPU).
    """
    with stage.context():
        _train(stage, workdir)


def _train(stage: Stage, workdir: pathlib.Path) -> None:
    folder = workdir / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    config = stage.config
    checkpoints = Checkpoints(folder / "checkpoints", config.keep)
    state = stage.init()
    restored = checkpoints.restore(state)
    step, seconds, place = 0, 0.0, None
    if restored is not None:
        state, saved = restored
        step, seconds, place = saved["step"], saved["seconds"], saved["iterator"]

    progress = Progress(stage.name, total=config.steps, start=step, stream=hosts.log_stream())
    if step:
        progress.note(f"{stage.name}: going on from step {step}")
    if hosts.first():
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))

    metrics: dict[str, jax.Array] = {}
    started = time.monotonic()
    wait = InputWait()

    def save() -> None:
        position = {"phase_end": phase.end, "iterator": iterator.get_state()}
        elapsed = seconds + time.monotonic() - started
        checkpoints.save(step, state, {"step": step, "seconds": elapsed, "iterator": position})

    with open_writer(folder, step=step) as writer, stopping.requests() as asked:
        for phase in stage.phases:
            if step >= phase.end:
                continue
            iterator = phase.batches()
            if place is not None and place["phase_end"] == phase.end:
                iterator.set_state(place["iterator"])
            while step < phase.end:
                batch = wait(lambda: stage.ready(next(iterator)), metrics)  # noqa: B023 (called at once)
                state, metrics = stage.step(state, batch)
                step += 1
                signal = asked(step)
                progress.update(step, functools.partial(_losses, metrics))
                if step % config.log_every == 0 or step == config.steps:
                    elapsed = seconds + time.monotonic() - started
                    writer.write(step, {**metrics, "input_wait": wait.share(), "hours": elapsed / 3600})
                if step % config.save_every == 0 or step == config.steps or signal:
                    save()
                if signal:
                    checkpoints.close()
                    name = stopping.NAMES[signal]
                    progress.note(f"{stage.name}: stopped by {name} at step {step}; the same command goes on from here")
                    stopping.stop(signal)
                if step % config.sample_every == 0 or step == config.steps:
                    scores = stage.sample(state, folder / "samples", step)
                    if scores:
                        writer.write(step, {f"sample_{k}": v for k, v in scores.items()})
                        progress.note(
                            f"{stage.name}: step {step}: " + ", ".join(f"{k} {v:.3g}" for k, v in scores.items())
                        )
    progress.close()
    checkpoints.close()
    stage.export(state, folder / "weights.safetensors")


def _losses(metrics: dict[str, Any]) -> dict[str, float]:
    """What the progress line shows; reading the values waits for the device."""
    return {name: float(value) for name, value in metrics.items() if "loss" in name}
