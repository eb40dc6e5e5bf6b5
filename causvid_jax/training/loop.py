"""The training loop, the same for every stage: batches in, checkpoints, metrics and samples out."""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from causvid_jax.config import Recipe, RunError, StageConfig, to_json
from causvid_jax.distributed import collectives
from causvid_jax.training import guard, preemption
from causvid_jax.training.checkpoint import Checkpoints
from causvid_jax.training.input_wait import InputWait
from causvid_jax.training.metrics import open_writer
from causvid_jax.training.progress import Progress
from causvid_jax.training.run_lock import claimed


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
      step: ``(state, batch) -> (state, metrics)``, jitted, donating the state. Where the metric ``skipped`` is not 0,
        updates were not taken; where ``taken`` is 0 the state is as before.
      phases: in order; the last one ends at ``config.steps``.
      ready: host batch -> what ``step`` takes (prompts become text rows here).
      sample: ``(state, folder, step) -> metrics``; writes pictures and videos to ``folder``.
      export: ``(state, path)``; writes the weights file.
      context: what all of it runs in: the mesh.
      recipe: what the stage was made from; kept in every checkpoint.
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
    recipe: Recipe | None = None


def train(stage: Stage, workdir: pathlib.Path) -> None:
    """Run ``stage`` to its last step from where ``workdir`` left it, then export its weights.

    Ctrl-C or SIGTERM, to any one of the processes of the run, makes all of them finish the same step, save a checkpoint
    and raise KeyboardInterrupt or :class:`stopping.Terminated`; started again, the run goes on from there and ends with
    the parameters an uninterrupted run would have (bit for bit on CPU).

    Raises:
        ConfigError: another run is training there.
        RunError: a loss that stops the run (``StageConfig.on_bad_loss``), or a disk that is full; it names the last
            good checkpoint.
    """
    folder = workdir / stage.name
    with stage.context():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with claimed(folder):
                _train(stage, folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"{stage.name}: {workdir} cannot be written: {error.strerror}; make room, and the same command goes on "
                "from the last checkpoint"
            ) from error


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A step that was handed to the device and not looked at yet."""

    step: int
    metrics: dict[str, jax.Array]
    before: dict[str, Any]  # where the data stood before it
    examples: Any  # their numbers in the dataset, as far as this process read them


def _train(stage: Stage, folder: pathlib.Path) -> None:
    config = stage.config
    checkpoints = Checkpoints(folder / "checkpoints", config.keep, config.keep_every)
    state = stage.init()
    restored = checkpoints.restore(state)
    step, seconds, place = 0, 0.0, None
    described = to_json(stage.recipe) if stage.recipe is not None else None

    progress = Progress(stage.name, total=config.steps, stream=collectives.log_stream())
    if restored is not None:
        state, saved = restored
        step, seconds, place = saved["step"], saved["seconds"], saved["iterator"]
        if config.on_bad_loss == "stop":
            state = guard.forgive(state)  # updates that were left out while it was to skip
        progress = Progress(stage.name, total=config.steps, start=step, stream=collectives.log_stream())
        for change in _changes(saved.get("config"), described):
            progress.note(f"{stage.name}: the checkpoint was made with {change}")

    def tell() -> None:
        for report in checkpoints.reports():
            progress.note(f"{stage.name}: {report}")

    tell()
    if step:
        progress.note(f"{stage.name}: going on from step {step}")
    if collectives.first():
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))

    metrics: dict[str, jax.Array] = {}
    started = time.monotonic()
    wait = InputWait()
    unseen: collections.deque[_Taken] = collections.deque()

    def take(batch: Any) -> tuple[Any, Any]:
        """A batch on the devices, and the numbers of its examples."""
        return stage.ready(batch), batch.get("index")

    def position() -> dict[str, Any]:
        return {"phase_end": phase.end, "iterator": iterator.get_state()}

    def save(step: int, position: dict[str, Any]) -> None:
        elapsed = seconds + time.monotonic() - started
        checkpoints.save(step, state, {"step": step, "seconds": elapsed, "iterator": position, "config": described})

    def look(done: _Taken) -> None:
        """Raises RunError, the state before it saved, if the step's loss was bad and the run is to stop."""
        nonlocal state
        if not int(done.metrics.get("skipped", 0)):
            return
        what = f"{stage.name}: step {done.step}: {_bad(done.metrics, config)}, {_examples(done.examples)}"
        if config.on_bad_loss == "skip":
            progress.note(f"{what}; its update is left out")
            return
        state = guard.forgive(state)
        checkpoints.wait()
        # With part of the step's updates taken the state is that of no step; what is on disk has to do.
        if not int(done.metrics["taken"]) and checkpoints.last != done.step - 1:
            save(done.step - 1, done.before)
        checkpoints.close()
        tell()
        left = "there is no checkpoint" if checkpoints.last is None else f"the checkpoint is of step {checkpoints.last}"
        raise RunError(
            f"{what}; {left} in {folder / 'checkpoints'}; with --config.train_{stage.name}.on_bad_loss=skip the same "
            "command goes on without such updates"
        )

    with open_writer(folder, step=step) as writer, preemption.requests() as asked:
        for phase in stage.phases:
            if step >= phase.end:
                continue
            iterator = phase.batches()
            if place is not None and place["phase_end"] == phase.end:
                iterator.set_state(place["iterator"])
            while step < phase.end:
                before = position()
                batch, examples = wait(lambda: take(next(iterator)), metrics)  # noqa: B023 (called at once)
                state, metrics = stage.step(state, batch)
                step += 1
                unseen.append(_Taken(step, metrics, before, examples))
                signal = asked(step)
                log = step % config.log_every == 0 or step == config.steps
                keep = step % config.save_every == 0 or step == config.steps or signal
                show = step % config.sample_every == 0 or step == config.steps
                # To look at a step is to wait for it: one stays unseen, so that the device always has the next.
                while len(unseen) > (0 if log or keep or show else 1):
                    look(unseen.popleft())
                tell()
                progress.update(step, functools.partial(_losses, metrics))
                if log:
                    elapsed = seconds + time.monotonic() - started
                    writer.write(step, {**metrics, "input_wait": wait.share(), "hours": elapsed / 3600})
                if keep:
                    save(step, position())
                if signal:
                    checkpoints.close()
                    tell()
                    if checkpoints.failed:
                        raise RunError(f"{stage.name}: stopped at step {step} without a checkpoint of it")
                    name = preemption.NAMES[signal]
                    progress.note(f"{stage.name}: stopped by {name} at step {step}; the same command goes on from here")
                    preemption.stop(signal)
                if show:
                    scores = stage.sample(state, folder / "samples", step)
                    if scores:
                        writer.write(step, {f"sample_{k}": v for k, v in scores.items()})
                        progress.note(
                            f"{stage.name}: step {step}: " + ", ".join(f"{k} {v:.3g}" for k, v in scores.items())
                        )
    progress.close()
    checkpoints.close()
    tell()
    stage.export(state, folder / "weights.safetensors")


def _losses(metrics: dict[str, Any]) -> dict[str, float]:
    """What the progress line shows; reading the values waits for the device."""
    return {name: float(value) for name, value in metrics.items() if "loss" in name}


def _bad(metrics: dict[str, Any], config: StageConfig) -> str:
    """What is wrong with the metrics of a step that was left out, in words."""
    names = [*(k for k in metrics if k.endswith("loss")), *(k for k in metrics if k.endswith("gradient_norm"))]
    seen = {name: float(metrics[name]) for name in names}
    wrong = [f"{name} is {value}" for name, value in seen.items() if not np.isfinite(value)]
    if wrong:
        return " and ".join(wrong)
    losses = ", ".join(f"{name} {value:.4g}" for name, value in seen.items() if name.endswith("loss"))
    return f"a loss ({losses}) is more than {config.bad_loss_factor:g} times the median of the last"


def _examples(numbers: Any) -> str:
    """The examples of a batch, of all processes."""
    if numbers is None:
        return "examples unknown"
    if jax.process_count() > 1:
        numbers = multihost_utils.process_allgather(np.asarray(numbers))
    return f"examples {', '.join(str(int(number)) for number in np.ravel(numbers))}"


def _changes(before: str | None, now: str | None) -> list[str]:
    """The fields that differ between two recipes in JSON: "train_teacher.steps 100, now 200"."""
    if before is None or now is None:
        return []

    def flat(tree: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {path: tree}
        return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{path}.{name}" if path else name).items()}

    old, new = flat(json.loads(before)), flat(json.loads(now))
    return [f"{name} {old[name]!r}, now {new[name]!r}" for name in old if name in new and old[name] != new[name]]
