"""Shardings of parameters, optimizer states and batches, from the logical axes of the parameters and the rules."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from causvid_jax.config import ParallelConfig, ShardingRules, require
from causvid_jax.sharding import constraints
from causvid_jax.sharding.mesh import make_mesh
from causvid_jax.sharding.params import ParamSpec, abstract_tree, map_spec


def param_shardings(spec: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Return the ``NamedSharding`` of every parameter of a :class:`ParamSpec` tree."""
    sizes = constraints.axis_sizes(mesh)

    def place(leaf: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, constraints.spec_for(leaf.axes, leaf.shape, sizes, rules))

    return map_spec(place, spec)


HOST = "pinned_host"


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh, *, on_host: bool = False
) -> Any:
    """Return the shardings of ``optimizer.init(params)``: moments like their parameters, the rest replicated.

    ``params`` may be abstract, and ``shardings`` are :func:`param_shardings` of them. With ``on_host`` the moments are
    stored in host memory, split in the same way.
    """
    if on_host:
        shardings = jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.eval_shape(optimizer.init, params)

    def masked(leaf: Any) -> bool:  # a parameter that another part of the optimizer updates
        return isinstance(leaf, optax.MaskedNode)

    return optax.tree_map_params(
        optimizer,
        lambda leaf, sharding: leaf if masked(leaf) else sharding,
        state,
        shardings,
        transform_non_params=lambda _: whole,
        is_leaf=masked,
    )


def batch_sharding(mesh: Mesh, rules: ShardingRules, leading: int = 0) -> NamedSharding:
    """Return the sharding of arrays ``[..., B, ...]``, the batch axis after ``leading`` axes that are not split."""
    sizes = constraints.axis_sizes(mesh)
    axes = tuple(a for a in rules.batch if a in sizes)
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, axes or None))


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh of a run and the shardings on it. Without a mesh (one device) every sharding is None.

    Attributes:
        mesh: of the run; None: one device.
        rules: for batches. Parameters of a network follow the rules of its own configuration.
        offload_optimizer: whether optimizers keep their moments in host memory (:meth:`offloaded`).
    """

    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()
    offload_optimizer: bool = False

    @property
    def offloads(self) -> bool:
        """Whether moments are moved to the host. On CPU they are not, because host and device memory are the same."""
        return self.offload_optimizer and self.mesh is not None and self.mesh.devices.flat[0].platform != "cpu"

    def current(self) -> contextlib.AbstractContextManager:
        """Return a context in which the mesh is the current one; sharding constraints and attention read it."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def params(self, spec: Any, rules: ShardingRules) -> Any:
        """Return :func:`param_shardings` of a network's parameters ``spec``; None without a mesh."""
        return None if self.mesh is None else param_shardings(spec, self.mesh, rules)

    def optimizer(self, optimizer: optax.GradientTransformation, spec: Any, shardings: Any) -> Any:
        """Return the shardings of an optimizer's state for the parameters ``spec``; None without a mesh."""
        if self.mesh is None:
            return None
        return optimizer_shardings(optimizer, abstract_tree(spec), shardings, self.mesh, on_host=self.offloads)

    def offloaded(
        self, optimizer: optax.GradientTransformation, spec: Any, rules: ShardingRules
    ) -> optax.GradientTransformation:
        """Return ``optimizer`` with its state in host memory. Every update fetches the state and writes it back.

        Without offloading, ``optimizer`` is returned unchanged. The state has the shardings of :meth:`optimizer`.
        """
        if not self.offloads or self.mesh is None:
            return optimizer
        params, shardings = abstract_tree(spec), self.params(spec, rules)
        here, there = (
            optimizer_shardings(optimizer, params, shardings, self.mesh, on_host=on_host) for on_host in (False, True)
        )

        def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            change, state = optimizer.update(gradient, jax.device_put(state, here), params)
            return change, jax.device_put(state, there)

        return optax.GradientTransformation(optimizer.init, update)

    def replicated(self) -> NamedSharding | None:
        """Return the sharding of a replicated array; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def put(self, tree: Any, shardings: Any) -> Any:
        """Return ``tree`` with ``shardings``, or unchanged without a mesh. Every process passes the whole tree."""
        if self.mesh is None:
            return tree
        if jax.process_count() == 1:
            return jax.device_put(tree, shardings)

        def from_whole(x: Any, sharding: NamedSharding) -> jax.Array:
            # device_put would first exchange every array, to check that all processes hold the same.
            return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

        return jax.tree.map(from_whole, tree, jax.tree.broadcast(shardings, tree))

    def jit_replicated(self, function: Callable[..., Any]) -> Any:
        """Return ``function`` jitted. Its results are replicated, so any process can read them."""
        return jax.jit(function, out_shardings=self.replicated())

    def example_indices(self, size: int) -> list[int]:
        """Return the ascending indices of the examples of a batch of ``size`` that this process reads.

        These are the examples on its devices. Processes that differ only in ``context`` or ``tensor`` have the same
        examples.

        Raises:
            ConfigError: the mesh does not divide the batch.
        """
        if self.mesh is None:
            return list(range(size))
        sharding = batch_sharding(self.mesh, self.rules)
        named: Any = sharding.spec[0]  # one name, several, or None
        axes = (named,) if isinstance(named, str) else tuple(named or ())
        ways = math.prod(self.mesh.shape[axis] for axis in axes)
        require(
            size % ways == 0,
            f"a batch of {size} cannot be split over {ways} parts of the mesh (data x fsdp); the nearest that can be "
            f"are {f'{size - size % ways} and ' if size > ways else ''}{size - size % ways + ways}",
        )
        shares = [indices[0] for indices in sharding.addressable_devices_indices_map((size,)).values() if indices]
        return sorted({row for share in shares for row in range(size)[share]})

    def init(self, make: Callable[..., Any], shardings: Any, *args: Any) -> Any:
        """Return ``make(*args)``, computed directly into ``shardings``, so no device holds the whole result."""
        return make(*args) if self.mesh is None else jax.jit(make, out_shardings=shardings)(*args)

    def batch(self, tree: Any, leading: int = 0) -> Any:
        """Return host arrays ``[..., b, ...]`` as global arrays ``[..., B, ...]`` split over the batch axis.

        Every process passes the b examples of its :meth:`example_indices`. ``leading`` axes come before the batch axis.
        Without a mesh the arrays are returned unchanged.
        """
        if self.mesh is None:
            return tree
        sharding = batch_sharding(self.mesh, self.rules, leading)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def stream_params(params: dict[str, Any], spec: Any, rules: ShardingRules, placement: Placement) -> dict[str, Any]:
    """Return a stream's parameters on the mesh: ``params["student"]`` by ``spec`` and ``rules``, others replicated.

    Under ``placement.current()`` every function of ``sampling.stream`` then runs sharded. The cache is split by heads.
    """
    whole = {name: jax.tree.map(lambda _: placement.replicated(), tree) for name, tree in params.items()}
    return placement.put(params, whole | {"student": placement.params(spec, rules)})


def place(config: ParallelConfig, rules: ShardingRules) -> Placement:
    """Return the placement of ``config`` over all devices of all processes.

    One device gets no mesh, unless it offloads its optimizer.

    Raises:
        ConfigError: the mesh does not fit the devices (:func:`causvid_jax.sharding.mesh.mesh_sizes`).
    """
    sizes = (config.slices, config.data, config.fsdp, config.context, config.tensor)
    if jax.process_count() == 1 and sizes == (1, 1, 1, 1, 1):
        mesh = make_mesh(config, jax.devices()[:1]) if config.offload_optimizer else None
        return Placement(mesh, rules, config.offload_optimizer)
    return Placement(make_mesh(config), rules, config.offload_optimizer)
