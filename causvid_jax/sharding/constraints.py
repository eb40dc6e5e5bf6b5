"""Map logical axes to ``PartitionSpec`` by the sharding rules, and constrain activations.

The mesh is the current one (``jax.set_mesh``). Without a mesh nothing is constrained, and the program is that of a
single device.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from causvid_jax.config import ShardingRules

Axes = Sequence[str | None]
KINDS = {"cpu": "cpu", "cuda": "NVIDIA H100", "tpu": "TPU v5"}
"""Device kind that is assumed for a platform that is not present; only the TPU kernel layout depends on it."""


def axis_sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Return the axis sizes of ``mesh`` without axes of size 1."""
    return {name: size for name, size in mesh.shape.items() if size > 1}


def mesh_shape() -> dict[str, int]:
    """Return :func:`axis_sizes` of the current mesh; empty without a mesh.

    Inside ``jax.shard_map`` arrays are local to the axes that it splits, so those do not count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in axis_sizes(mesh).items() if name not in mesh.manual_axes}


def mesh_axes(axes: Axes, shape: Sequence[int], mesh: Mapping[str, int], rules: ShardingRules) -> list[tuple[str, ...]]:
    """Return the mesh axes of each dimension of an array of ``shape``, outermost first.

    The first logical axis whose rule names a mesh axis takes it, and no other dimension of the array does. A mesh axis
    that does not divide the dimension is not taken: a bias of 3 is not split. Heads, tokens and batches that must be
    divisible are checked in the config.

    Args:
        axes: logical axis of each dimension; None: not split.
        shape: of the array.
        mesh: sizes of the mesh axes.
        rules: logical axis to mesh axes.
    """
    used: set[str] = set()
    parts: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=True):
        axes_of_dimension: list[str] = []
        for name in getattr(rules, axis) if axis else ():
            extent = math.prod(mesh[c] for c in axes_of_dimension) * mesh.get(name, 1)
            if mesh.get(name, 1) > 1 and name not in used and size % extent == 0:
                axes_of_dimension.append(name)
        used.update(axes_of_dimension)
        parts.append(tuple(axes_of_dimension))
    return parts


def platform() -> str:
    """Return the platform (``cpu``, ``gpu``, ``tpu``) of the current mesh's abstract device, else JAX's default one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Choose kernels in the block as on one device of ``platform`` (``cpu``, ``cuda``, ``tpu``), present or not."""
    here = jax.devices()[0]
    name = {"cuda": "gpu"}.get(platform, platform)
    device = jax.sharding.AbstractDevice(
        device_kind=here.device_kind if here.platform == name else KINDS[platform], num_cores=1, platform=name
    )
    mesh = AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def spec_for(axes: Axes, shape: Sequence[int], mesh: Mapping[str, int], rules: ShardingRules) -> PartitionSpec:
    """Return :func:`mesh_axes` as a ``PartitionSpec``."""
    return PartitionSpec(*(part or None for part in mesh_axes(axes, shape, mesh, rules)))


def constrain(x: jax.Array, axes: Axes, rules: ShardingRules) -> jax.Array:
    """Return ``x`` with a sharding constraint for its logical ``axes`` on the current mesh."""
    mesh = mesh_shape()
    return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, mesh, rules)) if mesh else x
