"""Write and read the scalars of a run: JSON lines and TensorBoard files."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import tensorboardX

from causvid_jax.config import ConfigError
from causvid_jax.config.files import atomic_write

JSONL = "metrics.jsonl"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the records of ``workdir/metrics.jsonl`` in order, up to the first line that a crash left incomplete."""
    path = pathlib.Path(workdir) / JSONL
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends records to ``workdir/metrics.jsonl`` and ``workdir/tensorboard``.

    A run that resumes at ``step`` drops the records beyond it, so that steps done twice appear once::

        with MetricsWriter(workdir, step=resumed_at) as metrics:
            metrics.write(step, {"loss": loss})

    A line reads ``{"step": 50, "time": 1700000000.0, "loss": 0.25}``. Values that are not finite become null in JSON
    and are written unchanged to TensorBoard.

    Raises:
        ConfigError: ``workdir`` cannot be made or written.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0):
        self._path = pathlib.Path(workdir) / JSONL
        try:
            records = [record for record in read_metrics(workdir) if record["step"] <= step]
            with atomic_write(self._path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise ConfigError(f"metrics cannot be written to {self._path}: {error.strerror}") from error
        # Drop records that an interrupted run wrote after the step from which this run starts.
        self._board = tensorboardX.SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write scalars (Python, numpy or JAX) of ``step`` to disk. This waits for JAX arrays."""
        scalars = {name: float(value) for name, value in values.items()}
        record = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": int(step), "time": round(time.time(), 3), **record}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, int(step))

    def __exit__(self, *error: object) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()
