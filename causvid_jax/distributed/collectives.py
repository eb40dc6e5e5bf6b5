"""Collective operations of Python values and arrays between processes; all are trivial in a single process."""

import contextlib
import functools
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from causvid_jax.config import MESH_AXES, ConfigError, flat_fields, require
from causvid_jax.distributed.handshake import join_numbers

_PIECE_BYTES = 2**28
_MESSAGE_BYTES = 1024


def is_first() -> bool:
    """Return whether this is process 0, which writes logs, samples and weights."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier ``name``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_on_first(check: Callable[[], Any]) -> None:
    """Run ``check`` only in process 0. All processes must call this.

    Raises:
        ConfigError: in every process, with the message of the error that ``check`` raised.
    """
    if jax.process_count() == 1:
        check()
        return
    message = b""
    if is_first():
        try:
            check()
        except ConfigError as error:
            message = str(error).encode()[:_MESSAGE_BYTES]
    row = np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(row)).astype(np.uint8).tobytes().rstrip(b"\0")
    require(not received, received.decode(errors="replace"))


def log_stream() -> TextIO | None:
    """Return the stream of progress lines: None (the default) on process 0, the null device on the others."""
    return None if is_first() else open(os.devnull, "w")


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Set a mesh of one local device in the block, for work of one process in a run whose mesh spans all processes."""
    if jax.process_count() == 1:
        yield
        return
    device = np.asarray(jax.local_devices()[:1]).reshape((1,) * len(MESH_AXES))
    with jax.set_mesh(Mesh(device, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))):
        yield


def gather_to_first(tree: Any) -> Any:
    """Return ``tree`` with complete numpy arrays in process 0, and None in the others.

    All processes must call this. A single process gets ``tree`` unchanged. Arrays above 256 MiB are gathered slice by
    slice along their first axis (layers), so no device holds a whole one.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    arrays = [_gather(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, arrays) if is_first() else None


def _gather(x: Any) -> np.ndarray | None:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x) if is_first() else None
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0)) if is_first() else None
    replicated = NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
    if x.nbytes <= _PIECE_BYTES or x.ndim < 2:
        copy = _copy(replicated)(x)
        return np.asarray(copy) if is_first() else None
    pieces = [np.asarray(_piece(replicated)(x, np.int32(i))) for i in range(x.shape[0])]
    return np.stack(pieces) if is_first() else None


@functools.lru_cache
def _copy(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


@functools.lru_cache
def _piece(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=sharding)


def check_same(values: Mapping[str, Any]) -> None:
    """Check that all processes have the same ``values``: nested dicts of JSON values.

    Raises:
        ConfigError: in every process, with the first three fields that differ and their values.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values, sort_keys=True).encode()
    sizes = _all_gather(np.asarray([len(text)], np.int32))
    rows = _all_gather(np.frombuffer(text.ljust(sizes.max()), np.uint8))
    if (rows == rows[0]).all():
        return
    values_of = [flat_fields(json.loads(row.tobytes())) for row in rows]
    problems = []
    for i, other in enumerate(values_of):
        fields = sorted(k for k in {*values_of[0], *other} if values_of[0].get(k) != other.get(k))
        problems += [f"{k} is {values_of[0].get(k)!r} on process 0 and {other.get(k)!r} on process {i}" for k in fields]
    rest = f"; and {len(problems) - 3} more differences" if len(problems) > 3 else ""
    raise ConfigError(f"{'; '.join(problems[:3])}{rest}; start all processes with the same arguments")


def check_shared(folder: str | os.PathLike) -> None:
    """Check that ``folder`` is the same directory on every host.

    Raises:
        ConfigError: in every process, with the numbers of those that cannot read what process 0 writes.
    """
    if jax.process_count() == 1:
        return
    token = np.frombuffer(secrets.token_bytes(8), np.uint8)
    name = _all_gather(token)[0].tobytes().hex()  # process 0's
    mark = pathlib.Path(folder) / f".shared-{name}"
    if is_first():
        mark.touch()
    barrier("mark written")
    visible = _all_gather(np.asarray([mark.exists()], np.uint8))[:, 0]
    if is_first():
        mark.unlink(missing_ok=True)
    blind = [i for i, exists in enumerate(visible) if not exists]
    require(
        not blind,
        f"process(es) {join_numbers(blind)} cannot read in {folder} what process 0 writes there; --workdir must be "
        "on a file system that all hosts share",
    )


def _all_gather(row: np.ndarray) -> np.ndarray:
    """Return ``[processes, ...]``: the ``row`` of every process, all of one shape."""
    return np.asarray(multihost_utils.process_allgather(row)).reshape(jax.process_count(), *row.shape)
