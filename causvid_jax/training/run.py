"""The run of one training stage: data position, checkpoints, metrics, samples and preemption.

A trainer uses it like this::

    state = run.loop(run.restore(initial_state), train_step, read, to_device, sample)
    run.finish(params, metadata)
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from causvid_jax.checkpoints import store
from causvid_jax.config import Recipe, RunError, StageConfig, changed_fields, require, to_json
from causvid_jax.config.files import write_text, writing
from causvid_jax.distributed import collectives
from causvid_jax.progress import Progress
from causvid_jax.sharding.placement import Placement
from causvid_jax.training import guard, preemption, provenance
from causvid_jax.training.checkpoint import Checkpoints
from causvid_jax.training.input_wait import InputWait
from causvid_jax.training.metrics import MetricsWriter
from causvid_jax.training.run_lock import claimed

Metrics = dict[str, jax.Array]
ReadBatches = Callable[..., Any]
"""``(batch_size=, frames=, seed=) -> iterator`` of host batches with ``get_state`` and ``set_state``."""


@dataclasses.dataclass(frozen=True)
class _PendingStep:
    """A step that runs on the device and whose metrics are not read yet."""

    step: int
    metrics: Metrics
    data_position: dict[str, Any]  # of the data before the step
    examples: Any  # numbers in the dataset of the examples that this process has read


class Run:
    """One stage in training in ``WORKDIR/STAGE``: data position, checkpoints, metrics, samples, preemption.

    After Ctrl-C or SIGTERM to any process of the run, all processes finish the same step, save a checkpoint and raise
    KeyboardInterrupt or :class:`preemption.Terminated`. Started again, the run continues from there and ends with the
    parameters of an uninterrupted run (bit for bit on CPU).

    Attributes:
        name: of the stage, and of its folder.
        recipe: the recipe.
        config: the settings of this stage.
        workdir: holds the data and the folders of all stages.
        placement: the mesh and the shardings on it.
        step: steps done.
        frames: length of the clips of the current stretch of the curriculum; 0: the full clip.
    """

    def __init__(self, name: str, recipe: Recipe, config: StageConfig, workdir: pathlib.Path, placement: Placement):
        self.name, self.recipe, self.config, self.workdir = name, recipe, config, workdir
        self.placement = placement
        self.folder = workdir / name
        self.step, self.frames = 0, config.frames
        self._checkpoints = Checkpoints(self.folder / "checkpoints", config.keep, config.keep_every)
        self._recipe_json = to_json(recipe)
        self._provenance: dict[str, Any] = provenance.origin(workdir)
        self._position: dict[str, Any] | None = None
        self._seconds, self._started = 0.0, time.monotonic()
        self._pending: collections.deque[_PendingStep] = collections.deque()
        self._metrics: Metrics = {}
        self._wait = InputWait()
        self._iterator: Any = None
        self._progress = Progress(name, config.steps, stream=collectives.log_stream())
        self._writer: MetricsWriter | None = None  # of process 0
        self._signal: Callable[[int], int] = lambda _: 0
        self._exit = contextlib.ExitStack()

    # ---- state -------------------------------------------------------------------------------------------------------

    def restore(self, state: Any) -> Any:
        """Return the state of the last good checkpoint, or ``state`` if there is none.

        Raises:
            ConfigError: the checkpoint does not fit ``state``, or is of a later step than ``steps``.
        """
        restored = self._checkpoints.restore(state)
        if restored is not None:
            state, saved = restored
            self.step, self._seconds, self._position = saved["step"], saved["seconds"], saved["iterator"]
            require(
                self.step <= self.config.steps,
                f"{self.config.label}.steps is {self.config.steps}, but {self.folder} has a checkpoint of step "
                f"{self.step}; accepted: at least {self.step}, or another --workdir",
            )
            if self.step == self.config.steps:
                self._provenance = saved.get(provenance.KEY, self._provenance)
            if self.config.on_bad_loss == "stop":
                state = guard.reset_skipped(state)  # updates refused while on_bad_loss was "skip"
            made_with = json.loads(saved.get("config") or "{}")
            for change in changed_fields(made_with, json.loads(self._recipe_json)).values():
                self.note(f"the checkpoint was made with {change}")
        self._report()
        if self.step:
            self.note(f"continuing from step {self.step}")
        if collectives.is_first():
            write_text(self.folder / "config.json", json.dumps(dataclasses.asdict(self.config), indent=1))
        return state

    def _save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        elapsed = self._seconds + time.monotonic() - self._started
        self._provenance |= {"steps": step, "hours": round(elapsed / 3600, 4)}
        progress = {
            "step": step,
            "seconds": elapsed,
            "iterator": position,
            "config": self._recipe_json,
            provenance.KEY: self._provenance,
        }
        self._checkpoints.save(step, state, progress)

    def _report(self) -> None:
        for report in self._checkpoints.reports():
            self.note(report)

    # ---- data --------------------------------------------------------------------------------------------------------

    def batches(self, read: ReadBatches, to_device: Callable[[dict[str, Any]], Any]) -> Iterator[Any]:
        """Yield the batches of the remaining steps on the devices: the curriculum's stretches, then the main one.

        ``read(batch_size=, frames=, seed=)`` is called once per stretch; each has a seed, and so an order of the data,
        of its own. ``to_device`` maps a batch of the host to arrays on the devices.
        """
        config, restored, start = self.config, self.step, 0
        self._open()
        for i, (end, frames, batch_size) in enumerate(config.stretches):
            begin, start = start, end
            if self.step >= end:
                continue
            seed = config.seed + len(config.curriculum) - i
            self.frames, self._iterator = frames, read(batch_size=batch_size, frames=frames, seed=seed)
            # Also if the stretch ends later than before, because ``steps`` was raised.
            if self._position is not None and begin < restored < end:
                self._iterator.set_state(self._position["iterator"])
            self._progress.note(f"{self.name}: compiling the step, which can take minutes ...")
            while self.step < end:
                before = self._data_position()
                batch, examples = self._wait(lambda: self._next(to_device), self._metrics)
                self._pending.append(_PendingStep(self.step + 1, {}, before, examples))
                yield batch

    def _next(self, to_device: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
        batch = next(self._iterator)
        return to_device(batch), batch.get("index")

    def _data_position(self) -> dict[str, Any]:
        return {"iterator": self._iterator.get_state()}

    def _open(self) -> None:
        if collectives.is_first():
            self._writer = self._exit.enter_context(MetricsWriter(self.folder, step=self.step))
        self._signal = self._exit.enter_context(preemption.requests())

    def loop(
        self,
        state: Any,
        step: Callable[[Any, Any], tuple[Any, Metrics]],
        read: ReadBatches,
        to_device: Callable[[dict[str, Any]], Any],
        sample: Callable[[Any], dict[str, float]],
    ) -> Any:
        """Run the remaining steps from ``state`` and return the last state.

        ``step(state, batch)`` returns the next state and metrics, and ``sample(state)`` writes samples and returns
        their scores. ``read`` and ``to_device`` are those of :meth:`batches`, errors those of :meth:`after_step`.
        """
        for batch in self.batches(read, to_device):
            state, metrics = step(state, batch)
            state = self.after_step(state, metrics)
            if self.samples_now and (scores := sample(state)):
                self._write({f"sample_{name}": value for name, value in scores.items()})
                text = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
                self.note(f"step {self.step}: {text}")
        return state

    # ---- steps -------------------------------------------------------------------------------------------------------

    @property
    def samples_now(self) -> bool:
        """Whether samples are due after the step just done."""
        due = self.step % self.config.sample_every == 0 or self.step == self.config.steps
        return due and self.config.samples > 0

    def after_step(self, state: Any, metrics: Metrics) -> Any:
        """Log, save and stop if that is due after a step; return the state.

        Raises:
            RunError: a loss stops the run (``StageConfig.on_bad_loss``), or it stops without a checkpoint.
            Interrupted: Ctrl-C stopped the run, and everything is saved.
            Terminated: SIGTERM stopped the run, and everything is saved.
        """
        self.step, self._metrics = self.step + 1, metrics
        self._pending.append(dataclasses.replace(self._pending.pop(), metrics=metrics))
        signal = self._signal(self.step)
        last = self.step == self.config.steps
        log = self.step % self.config.log_every == 0 or last
        save = self.step % self.config.save_every == 0 or last or bool(signal)
        # Reading metrics waits for the step. The newest one stays unread, so that the device always has work queued.
        while len(self._pending) > (0 if log or save or self.samples_now else 1):
            state = self._check(self._pending.popleft(), state)
        self._report()
        # Reading the losses waits for the device, so only a line that is shown does.
        self._progress.update(self.step, lambda: {name: float(metrics[name]) for name in metrics if "loss" in name})
        if log:
            hours = (self._seconds + time.monotonic() - self._started) / 3600
            self._write({**metrics, "input_wait": self._wait.share(), "hours": hours})
        if save:
            self._save(self.step, state, self._data_position())
        if signal:
            self._stop(signal)
        return state

    def _write(self, values: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(self.step, values)

    def _check(self, pending: _PendingStep, state: Any) -> Any:
        """Read the metrics of a step. If its update stops the run, save the state before it and raise RunError."""
        if not int(pending.metrics.get("skipped", 0)):
            return state
        what = f"step {pending.step}: {_bad(pending.metrics, self.config)}, {_examples(pending.examples)}"
        if self.config.on_bad_loss == "skip":
            self.note(f"{what}; its update is skipped")
            return state
        state = guard.reset_skipped(state)
        self._checkpoints.wait()
        # If some updates of the step were applied, the state belongs to no step; the checkpoint on disk stays the last.
        if not int(pending.metrics["applied"]) and self._checkpoints.last != pending.step - 1:
            self._save(pending.step - 1, state, pending.data_position)
        self._checkpoints.close()
        self._report()
        last = self._checkpoints.last
        last_checkpoint = "there is no checkpoint" if last is None else f"the checkpoint is of step {last}"
        raise RunError(
            f"{self.name}: {what}; {last_checkpoint} in {self.folder / 'checkpoints'}; with "
            f"--config.train_{self.name}.on_bad_loss=skip the same command continues without such updates"
        )

    def _stop(self, signal: int) -> None:
        self._checkpoints.close()
        self._report()
        if self._checkpoints.failed:
            raise RunError(f"{self.name}: stopped at step {self.step} without a checkpoint of it")
        name, error = preemption.STOPS[signal]
        self.note(f"stopped by {name} at step {self.step}; the same command continues from here")
        raise error

    def finish(self, params: Any, metadata: dict[str, str]) -> None:
        """Write ``WORKDIR/STAGE/weights.safetensors`` of the finished run, and print its path.

        ``params`` are on the mesh, or already gathered (``collectives.gather_to_first``).
        """
        self._progress.close()
        self._checkpoints.close()
        self._report()
        path = self.folder / "weights.safetensors"
        whole = collectives.gather_to_first(params)
        if collectives.is_first():
            store.save_params(path, whole, metadata | {provenance.KEY: json.dumps(self._provenance)})
        collectives.barrier(f"{self.name} written")
        self.note(f"done, weights at {path}")

    def note(self, text: str) -> None:
        """Write a line about this stage to the progress output of process 0."""
        self._progress.note(f"{self.name}: {text}")

    def close(self) -> None:
        """Close the metrics and restore the signal handlers."""
        self._exit.close()


@contextlib.contextmanager
def open_run(
    name: str, recipe: Recipe, config: StageConfig, workdir: pathlib.Path, placement: Placement
) -> Iterator[Run]:
    """Open the run of a stage on its mesh and lock its folder, so that no other run uses it.

    Raises:
        ConfigError: another run is training there.
        RunError: the disk is full.
    """
    folder = workdir / name
    with placement.current(), writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder), contextlib.closing(Run(name, recipe, config, workdir, placement)) as run:
            yield run


def _bad(metrics: dict[str, Any], config: StageConfig) -> str:
    """Describe why the update of a step was refused, from its metrics."""
    names = [*(k for k in metrics if k.endswith("loss")), *(k for k in metrics if k.endswith("gradient_norm"))]
    values = {name: float(metrics[name]) for name in names}
    wrong = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if wrong:
        return " and ".join(wrong)
    losses = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name.endswith("loss"))
    return f"a loss ({losses}) is more than {config.bad_loss_factor:g} times the median of the last"


def _examples(numbers: Any) -> str:
    """Name the examples of a batch, of all processes."""
    if numbers is None:
        return "examples unknown"
    if jax.process_count() > 1:
        numbers = multihost_utils.process_allgather(np.asarray(numbers))
    return f"examples {', '.join(str(int(number)) for number in np.ravel(numbers))}"
