"""Compute the examples of a dataset on all devices of this process."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def over_local_devices(function: Callable, params: dict[str, Any], batch: int, chunk: int) -> tuple[Callable, int]:
    """Compile ``function(params, *inputs)`` for one batch size, with the batch split over this process's devices.

    Args:
        function: pure; inputs and results have examples along axis 0.
        params: replicated on every device.
        batch: examples per device and call.
        chunk: examples of a chunk; a call takes no more than these need.

    Returns:
        (call, size). ``call(*inputs)`` takes 1 to ``size`` examples and returns the results of as many, as NumPy
        arrays. ``size`` is ``devices * max(1, min(batch, chunk // devices))``.
    """
    devices = jax.local_devices()
    size = len(devices) * max(1, min(batch, chunk // len(devices)))
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(function, out_shardings=split)
    params = jax.device_put(params, whole)

    def call(*inputs: np.ndarray) -> np.ndarray:
        count = len(inputs[0])
        padded = [np.concatenate([x, np.repeat(x[:1], size - count, axis=0)]) for x in inputs]
        return jax.tree.map(lambda x: np.asarray(x)[:count], compiled(params, *jax.device_put(padded, split)))

    return call, size
