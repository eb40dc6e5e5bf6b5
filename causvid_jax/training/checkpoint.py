"""Checkpoints of a training run: Orbax v1, one folder a step, holding the state and the input iterator's place.

All use of Orbax is in this file, because its v1 interface still moves.
"""

import json
import logging
import os
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from causvid_jax.config import ConfigError

# Orbax reports every stage of every save at INFO.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno >= logging.WARNING)


class Checkpoints:
    """The checkpoints of one run, the newest ``keep`` of them; saving goes on in the background."""

    def __init__(self, folder: str | os.PathLike, keep: int):
        path = pathlib.Path(folder).resolve()
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(path, preservation_policy=policy, cleanup_tmp_directories=True)

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Save ``state`` (arrays) and ``progress`` (JSON values) as ``step``; returns while it is written."""
        # The state's buffers are donated to the next step, and jax arrays on CPU may be read in place: finish first.
        self.wait()
        place = {"json": json.dumps(progress)}
        self._checkpointer.save_checkpointables(step, {"state": state, "progress": place})

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint in the shapes, types and shardings of ``state``, or None when there is none.

        Raises:
            ConfigError: the checkpoint does not fit ``state``, as after a change of the configuration.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            loaded = self._checkpointer.load_checkpointables(latest.step, {"state": abstract, "progress": None})
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"checkpoint {latest.step} in {self._checkpointer.directory} does not fit this configuration; use "
                f"another --workdir or the configuration it was made with ({str(error).splitlines()[0]})"
            ) from error
        return loaded["state"], json.loads(loaded["progress"]["json"])

    def wait(self) -> None:
        """Until everything asked to be saved is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Wait, then release."""
        self._checkpointer.close()
