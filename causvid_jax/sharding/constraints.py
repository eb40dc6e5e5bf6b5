"""Where arrays lie on the mesh: logical axes to ``PartitionSpec`` by the rules, and constraints on activations.

The mesh is the one that ``jax.set_mesh`` has made current. Without one nothing here does anything, and the program is
the single-device one.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from causvid_jax.config import ShardingRules

Axes = Sequence[str | None]
KINDS = {"cpu": "cpu", "cuda": "NVIDIA H100", "tpu": "TPU v5"}
"""Devices to lower for where the platform is not at hand; only the layout of TPU kernels asks."""


def axis_sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Axis sizes of ``mesh``, those of size 1 left out."""
    return {name: size for name, size in mesh.shape.items() if size > 1}


def mesh_shape() -> dict[str, int]:
    """:func:`axis_sizes` of the current mesh; empty without one."""
    return axis_sizes(jax.sharding.get_abstract_mesh())


def mesh_axes(axes: Axes, shape: Sequence[int], mesh: Mapping[str, int], rules: ShardingRules) -> list[tuple[str, ...]]:
    """For each dimension of an array of ``shape`` with logical ``axes`` (None: whole), the mesh axes that split it.

    A mesh axis is used once per array, by the first logical axis that asks for it, and only where it divides the
    dimension: a bias of 3 stays whole. What must be divisible is checked when the mesh is made (``sharding.mesh``).
    """
    used: set[str] = set()
    parts: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        for name in getattr(rules, axis) if axis else ():
            extent = math.prod(mesh[c] for c in chosen) * mesh.get(name, 1)
            if mesh.get(name, 1) > 1 and name not in used and size % extent == 0:
                chosen.append(name)
        used.update(chosen)
        parts.append(tuple(chosen))
    return parts


def platform() -> str:
    """Of the current mesh's devices, which may be described only (ahead-of-time compilation); else of this process."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Inside, networks choose their kernels as on one device of ``platform`` (``cpu``, ``cuda``, ``tpu``), which need
    not be there."""
    here = jax.devices()[0]
    name = {"cuda": "gpu"}.get(platform, platform)
    device = jax.sharding.AbstractDevice(
        device_kind=here.device_kind if here.platform == name else KINDS[platform], num_cores=1, platform=name
    )
    mesh = AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def spec_for(axes: Axes, shape: Sequence[int], mesh: Mapping[str, int], rules: ShardingRules) -> PartitionSpec:
    """:func:`mesh_axes` as a ``PartitionSpec``."""
    return PartitionSpec(*(part or None for part in mesh_axes(axes, shape, mesh, rules)))


def constrain(x: jax.Array, axes: Axes, rules: ShardingRules) -> jax.Array:
    """``x``, kept on the current mesh as ``rules`` place ``axes``."""
    mesh = mesh_shape()
    return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, mesh, rules)) if mesh else x
