"""Where every tree of a run lies on a mesh: all of it follows from the parameters' logical axes and the rules."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from causvid_jax.config import ParallelConfig, Recipe, ShardingRules, require
from causvid_jax.models import transformer
from causvid_jax.sharding import constraints
from causvid_jax.sharding.mesh import make_mesh
from causvid_jax.sharding.params import ParamSpec, abstract_tree


def param_shardings(spec: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """The ``NamedSharding`` of every parameter of a :class:`ParamSpec` tree."""
    sizes = constraints.axis_sizes(mesh)

    def place(leaf: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, constraints.spec_for(leaf.axes, leaf.shape, sizes, rules))

    return jax.tree.map(place, spec, is_leaf=lambda x: isinstance(x, ParamSpec))


HOST = "pinned_host"


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh, *, on_host: bool = False
) -> Any:
    """The shardings of ``optimizer.init(params)``: moments lie as their parameters, the rest is whole.

    ``params`` may be abstract; ``shardings`` is :func:`param_shardings` of it. With ``on_host`` the moments lie in the
    memory of the hosts, split in the same way.
    """
    if on_host:
        shardings = jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.eval_shape(optimizer.init, params)

    def masked(leaf: Any) -> bool:  # a parameter that another of an optimizer's parts takes care of
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
    """Of arrays ``[..., B, ...]`` with the batch after ``leading`` whole axes."""
    sizes = constraints.axis_sizes(mesh)
    axes = tuple(a for a in rules.batch if a in sizes)
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, axes or None))


def _cut(x: Any, sharding: NamedSharding) -> jax.Array:
    """The parts of ``x`` that belong on this process's devices, as a global array."""
    return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts a stage's arrays on its mesh; with ``mesh = None`` (one device) everything stays as it is.

    Attributes:
      mesh: of the run.
      rules: of the batch axis; a network's parameters follow the rules of its own configuration.
      offload_optimizer: whether optimizers keep their moments in the hosts' memory (:meth:`hosted`).
    """

    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()
    offload_optimizer: bool = False

    @property
    def offloads(self) -> bool:
        """Whether moments really move: on CPU the host's memory is the device's."""
        return self.offload_optimizer and self.mesh is not None and self.mesh.devices.flat[0].platform != "cpu"

    def current(self) -> contextlib.AbstractContextManager:
        """Makes the mesh the current one, which constraints and attention ask for."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def params(self, spec: Any, rules: ShardingRules) -> Any:
        """Shardings of a network's parameters; None without a mesh."""
        return None if self.mesh is None else param_shardings(spec, self.mesh, rules)

    def optimizer(self, optimizer: optax.GradientTransformation, spec: Any, shardings: Any) -> Any:
        """Shardings of an optimizer's state for the parameters ``spec``; None without a mesh."""
        if self.mesh is None:
            return None
        return optimizer_shardings(optimizer, abstract_tree(spec), shardings, self.mesh, on_host=self.offloads)

    def hosted(
        self, optimizer: optax.GradientTransformation, spec: Any, rules: ShardingRules
    ) -> optax.GradientTransformation:
        """``optimizer`` of the parameters ``spec`` that fetches its state from the hosts for an update and leaves the
        new one there; unchanged unless this placement offloads. The state lies as :meth:`optimizer` says."""
        if not self.offloads or self.mesh is None:
            return optimizer
        params, shardings = abstract_tree(spec), self.params(spec, rules)
        here, there = (
            optimizer_shardings(optimizer, params, shardings, self.mesh, on_host=on_host) for on_host in (False, True)
        )

        def update(gradient, state, params=None):
            change, state = optimizer.update(gradient, jax.device_put(state, here), params)
            return change, jax.device_put(state, there)

        return optax.GradientTransformation(optimizer.init, update)

    def whole(self) -> NamedSharding | None:
        """A copy on every device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def put(self, tree: Any, shardings: Any) -> Any:
        """``tree`` laid out as ``shardings``; unchanged without a mesh. Every process gives the whole tree."""
        if self.mesh is None:
            return tree
        if jax.process_count() == 1:
            return jax.device_put(tree, shardings)
        # device_put would first send every array around, to see that all processes hold the same.
        return jax.tree.map(_cut, tree, jax.tree.broadcast(shardings, tree))

    def everywhere(self, function: Callable[..., Any]) -> Any:
        """``function`` jitted, its results whole on every device, so that any process can read them."""
        return jax.jit(function, out_shardings=self.whole())

    def rows(self, size: int) -> list[int]:
        """Which examples of a batch of ``size`` lie on this process's devices, in order; without a mesh all do.

        Processes over which the batch is not split (by ``context`` or ``tensor``) share theirs.

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
        """``make(*args)`` computed straight into ``shardings``, so that no device ever holds the whole."""
        return make(*args) if self.mesh is None else jax.jit(make, out_shardings=shardings)(*args)

    def batch(self, tree: Any, leading: int = 0) -> Any:
        """Host arrays ``[..., B, ...]``, the batch after ``leading`` axes, as global arrays split over the batch.

        Every process gives the examples of its :meth:`rows`.
        """
        if self.mesh is None:
            return tree
        sharding = batch_sharding(self.mesh, self.rules, leading)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def stream_params(params: dict[str, Any], recipe: Recipe, placement: Placement) -> dict[str, Any]:
    """The parameters of a stream (``sampling.stream``) on the mesh: the student by its rules, the rest whole.

    Under ``placement.current()`` every function of ``sampling.stream`` then runs sharded; the cache is split by heads.
    """
    spec = transformer.spec(recipe.student)
    student = placement.params(spec, recipe.student.rules)
    whole = {name: jax.tree.map(lambda _: placement.whole(), tree) for name, tree in params.items()}
    return placement.put(params, whole | {"student": student})


def place(config: ParallelConfig, rules: ShardingRules) -> Placement:
    """The placement that ``config`` asks for, over all devices of all processes; one device needs no mesh, unless it
    offloads."""
    sizes = (config.slices, config.data, config.fsdp, config.context, config.tensor)
    if jax.process_count() == 1 and sizes == (1, 1, 1, 1, 1):
        mesh = make_mesh(config, jax.devices()[:1]) if config.offload_optimizer else None
        return Placement(mesh, rules, config.offload_optimizer)
    return Placement(make_mesh(config), rules, config.offload_optimizer)
