"""Make the device mesh of a recipe."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from causvid_jax.config import MESH_AXES, ParallelConfig, require


def mesh_sizes(config: ParallelConfig, devices: int) -> tuple[int, int, int, int]:
    """Return the sizes ``(data, fsdp, context, tensor)`` of one slice; ``data = 0`` takes the devices that are left.

    Raises:
        ConfigError: slices do not divide the devices, or the product is not the number of devices of a slice.
    """
    inner = config.fsdp * config.context * config.tensor
    per_slice = devices // config.slices
    require(
        per_slice * config.slices == devices,
        f"parallel.slices is {config.slices}; {devices} devices cannot be split into so many equal slices",
    )
    data = config.data or max(1, per_slice // inner)
    require(
        data * inner == per_slice,
        f"the mesh is data {config.data or 'left over'} x fsdp {config.fsdp} x context {config.context} x tensor "
        f"{config.tensor}; {per_slice} devices per slice need a product of {per_slice} "
        f"(data {per_slice // inner} fits)"
        if per_slice % inner == 0
        else f"fsdp x context x tensor is {inner}; it must divide the {per_slice} devices per slice",
    )
    return data, config.fsdp, config.context, config.tensor


def make_mesh(config: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh over ``devices`` (default: all), ordered along the interconnect where its shape is known.

    With several slices the data axis is outermost over them, so only gradients cross the slow network.

    Raises:
        ConfigError: as :func:`mesh_sizes`.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_sizes(config, len(devices))
    if config.slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (config.slices, 1, 1, 1), devices)
    else:
        try:
            grid = mesh_utils.create_device_mesh(shape, devices)
        except NotImplementedError:  # the torus has no such axis: any order works, over longer links
            grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
