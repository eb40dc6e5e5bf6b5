"""What differs between one process and many once they have started: who writes, and how a whole array is seen."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from causvid_jax.config import MESH_AXES, ConfigError, require

_PIECE_BYTES = 2**28
_SENTENCE_BYTES = 1024


def first() -> bool:
    """Whether this process is the one that writes logs, samples and weights."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Wait until every process has come to the point ``name``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def ask_first(check: Callable[[], Any]) -> None:
    """Run ``check`` in the first process; what it refuses is refused in all.

    Raises:
        ConfigError: that of ``check``.
    """
    if jax.process_count() == 1:
        check()
        return
    said = b""
    if first():
        try:
            check()
        except ConfigError as error:
            said = str(error).encode()[:_SENTENCE_BYTES]
    row = np.frombuffer(said.ljust(_SENTENCE_BYTES, b"\0"), np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(row)).astype(np.uint8).tobytes().rstrip(b"\0")
    require(not heard, heard.decode(errors="replace"))


def log_stream() -> TextIO | None:
    """Where a progress line goes: None (the default place) on the first process, nowhere on the others."""
    return None if first() else open(os.devnull, "w")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For work that one process does by itself, amid a run whose current mesh spans all: a mesh of one device here."""
    if jax.process_count() == 1:
        yield
        return
    device = np.asarray(jax.local_devices()[:1]).reshape((1,) * len(MESH_AXES))
    with jax.set_mesh(Mesh(device, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))):
        yield


def gather(tree: Any) -> Any:
    """``tree`` with every array whole as numpy in the first process's memory; None in the others.

    All processes must call it. A single process gets ``tree`` as it is. Large arrays travel in pieces along their
    first axis (layers), so that no device ever holds a whole one.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    whole = [_gather(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, whole) if first() else None


def _gather(x: Any) -> np.ndarray | None:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x) if first() else None
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0)) if first() else None
    replicated = NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
    if x.nbytes <= _PIECE_BYTES or x.ndim < 2:
        made = _copy(replicated)(x)
        return np.asarray(made) if first() else None
    pieces = [np.asarray(_piece(replicated)(x, np.int32(i))) for i in range(x.shape[0])]
    return np.stack(pieces) if first() else None


@functools.lru_cache
def _copy(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


@functools.lru_cache
def _piece(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=sharding)
