"""Checkpoints of a training run: Orbax v1, one folder per step, with the state and the position of the run.

A checkpoint is used if its checksums are complete and correct (:mod:`causvid_jax.training.checksums`). A damaged one is
renamed to ``STEP.damaged``, and the step before it is used. Only this file calls Orbax, because its v1 interface may
still change.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from causvid_jax.config import RunError, require
from causvid_jax.config.files import disk_failure
from causvid_jax.distributed import collectives
from causvid_jax.training import checksums

# Orbax logs every phase of a save at INFO, warns at each save of strings that there is nothing to merge, and logs a
# full disk with a traceback from each thread, although the error is raised and reported here in one sentence.
_SILENCED = (
    "Skipping merge of OCDBT",
    "_SignalingThread.run() raised",
    "Handler Commit operations",
    "save_finalize",
)


def _filter_orbax(record: logging.LogRecord) -> bool:
    if "orbax" not in record.pathname:
        return True
    return record.levelno >= logging.WARNING and not any(text in record.getMessage() for text in _SILENCED)


logging.getLogger("absl").addFilter(_filter_orbax)


class Checkpoints:
    """The checkpoints of one run: the newest ``keep``, and those of every ``keep_every`` steps (0: none).

    Saving continues in the background. :meth:`reports` returns messages about damaged checkpoints and full disks.

    Raises:
        RunError: there are checkpoints, and all of them are damaged.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, keep_every: int = 0):
        self._folder = pathlib.Path(folder).resolve()
        policies = ocp.training.preservation_policies
        self._policy: Any = policies.LatestN(keep)
        if keep_every:
            self._policy = policies.AnyPreservationPolicy([self._policy, policies.EveryNSteps(keep_every)])
        self._reports: list[str] = []
        self._worker = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self.last: int | None = self._choose()
        """The step of the last good checkpoint."""
        self.failed = False
        """Whether the last save failed."""
        self._open()

    def _open(self) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            self._folder, preservation_policy=self._policy, cleanup_tmp_directories=True
        )

    def _choose(self) -> int | None:
        """Return the newest step whose checksums are correct, and rename newer damaged ones; None if there is no step.

        Checkpoints without checksums are used only if there is no other: their save was interrupted, or an older
        version wrote them.

        Raises:
            RunError: there are checkpoints, and all of them are damaged.
        """
        steps = _steps(self._folder)
        newest: int | None = None
        aside: dict[int, str] = {}
        for step in reversed(steps):
            why = _problem(self._folder / str(step))
            if why is None:
                newest = step
                break
            aside[step] = why
        plain = [step for step in steps if not checksums.present(self._folder / str(step))]
        if newest is None and plain:
            newest = plain[-1]
            aside = {step: why for step, why in aside.items() if step > newest}
            self._reports.append(f"checkpoint {newest} in {self._folder} has no checksums; it is used as it is")
        if steps and newest is None:
            each = "; ".join(f"{step}: {why}" for step, why in sorted(aside.items()))
            raise RunError(
                f"every checkpoint in {self._folder} is damaged ({each}); restore one, or move the folder away to "
                "start again"
            )
        for other, why in aside.items():
            self._reports.append(
                f"checkpoint {other} in {self._folder} is damaged: {why}; the one of step {newest} is used"
            )
        if collectives.is_first():
            for other in aside:
                target = self._folder / f"{other}.damaged"
                shutil.rmtree(target, ignore_errors=True)
                (self._folder / str(other)).rename(target)
        collectives.barrier("set aside")
        return newest

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return the state and the progress of the last good checkpoint, or None if there is none.

        The state has the shapes, types and shardings of ``state``, a dataclass. If the checkpoint fits, the arrays of
        ``state`` are deleted first, to free memory for the arrays that are read.

        Raises:
            ConfigError: the checkpoint does not fit ``state``, for example after a change of the configuration.
        """
        if self.last is None:
            return None
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        different = self._difference(fields)
        require(
            not different,
            f"checkpoint {self.last} in {self._folder} does not fit this configuration: {different}; use another "
            "--workdir or the configuration it was made with",
        )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fields)
        jax.tree.map(lambda x: x.delete(), fields)
        loaded = self._checkpointer.load_checkpointables(self.last, {"state": abstract, "progress": None})
        return dataclasses.replace(state, **loaded["state"]), json.loads(loaded["progress"]["json"])

    def _difference(self, fields: dict[str, Any]) -> str:
        """Return the first array in which the last checkpoint differs from ``fields``, and how many differ; "": none.

        Orbax would begin to read, and its sentence has every array of the run.
        """
        assert self.last is not None
        saved = _shapes(self._checkpointer.checkpointables_metadata(self.last).metadata["state"])
        wanted = _shapes(fields)
        differ = [path for path in {**wanted, **saved} if saved.get(path) != wanted.get(path)]
        if not differ:
            return ""
        first = differ[0]
        of_saved, of_run = (f"{tree[first]}" if first in tree else "no such array" for tree in (saved, wanted))
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        return f"{first}{more} (saved: {of_saved}, this run: {of_run})"

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Start to save ``state`` (arrays) and ``progress`` (JSON values) as ``step``, and return.

        A full or failing disk raises no error; it is reported, the run continues, and the last good checkpoint stays.
        """
        self.wait()
        if jax.default_backend() == "cpu":
            # On CPU Orbax writes the arrays in the background from their own buffers, which the next step overwrites
            # (they are donated). From an accelerator it copies them to the host before this returns.
            state = jax.tree.map(jnp.copy, state)
        items = {"state": state, "progress": {"json": json.dumps(progress)}}
        try:
            response = self._checkpointer.save_checkpointables_async(step, items, force=True)
        except Exception as error:
            self._give_up(step, error)
        else:
            self._saving = step, self._worker.submit(self._finish, step, response)

    def _finish(self, step: int, response: Any) -> None:
        response.result()
        checksums.write(self._folder / str(step), jax.process_index(), jax.process_count())

    def _give_up(self, step: int, error: Exception) -> None:
        reason = error.strerror or str(error) if isinstance(error, OSError) else disk_failure(error)
        if not reason:
            raise error
        self.failed = True
        fallback = f"the last good one is of step {self.last}" if self.last is not None else "there is none before it"
        self._reports.append(f"checkpoint {step} could not be written to {self._folder}: {reason}; {fallback}")
        # A new checkpointer removes the incomplete files, which fill the disk.
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._open()

    def wait(self) -> None:
        """Wait until the last save is on disk, checksums included."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            self._give_up(step, error)
        else:
            self.last, self.failed = step, False

    def reports(self) -> list[str]:
        """Return the messages since the last call."""
        if self._saving is not None and self._saving[1].done():
            self.wait()
        reports, self._reports = self._reports, []
        return reports

    def close(self) -> None:
        """Wait for the last save, then release the threads."""
        self.wait()
        self._worker.shutdown()
        self._checkpointer.close()


def read(folder: str | os.PathLike, part: str, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
    """Read one field of the state of a checkpoint to the host, and nothing else; return ``(step, tree, progress)``.

    The folder may be that of an active run. Nothing in it is changed.

    Args:
        folder: of the run's checkpoints.
        part: path of the field, for example ``"network.ema"``.
        step: of the checkpoint; None takes the newest complete one.

    Raises:
        ConfigError: there is no such checkpoint or field, or the checkpoint is damaged.
    """
    folder = pathlib.Path(folder).resolve()
    steps = _steps(folder)
    if step is None:
        whole = (number for number in reversed(steps) if _problem(folder / str(number)) is None)
        step = next(whole, steps[-1] if steps else 0)
    require(
        step in steps, f"there is no checkpoint {step} in {folder}; accepted: {', '.join(map(str, steps)) or 'none'}"
    )
    path = folder / str(step)
    if checksums.present(path):
        why = checksums.problem(path)
        require(why is None, f"checkpoint {step} in {folder} is damaged: {why}")
    described: Any = ocp.checkpointables_metadata(path).metadata["state"]
    placeholders = jax.tree.map(lambda _: ocp.PLACEHOLDER, described)
    *parents, name = part.split(".")
    branch, requested = described, placeholders
    for parent in parents:
        branch, requested = branch.get(parent, {}), requested.get(parent, {})
    require(name in branch, f"checkpoint {step} in {folder} has no {part}; it has {', '.join(branch or described)}")
    requested[name] = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), branch[name])
    loaded: Any = ocp.load_checkpointables(path, {"state": placeholders, "progress": None})
    tree = functools.reduce(lambda tree, key: tree[key], part.split("."), loaded["state"])
    return step, tree, json.loads(loaded["progress"]["json"])


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a state by their paths, which those of a checkpoint's description equal."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _steps(folder: pathlib.Path) -> list[int]:
    """Return the steps of the checkpoints that Orbax finished, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _problem(path: pathlib.Path) -> str | None:
    """Describe the damage of a checkpoint, or return None; every process checks its share."""
    if not checksums.present(path):
        return "it has no checksums, because its save was interrupted"
    process, processes = jax.process_index(), jax.process_count()
    own = checksums.problem(path, process, processes)
    if processes == 1:
        return own
    sound = np.asarray(multihost_utils.process_allgather(np.array(own is None)))
    return own if own is not None or sound.all() else f"as process {int(np.argmin(sound))} found"
