"""Parameter declarations: a tree of :class:`ParamSpec` with shape, logical axes and initialiser of every array.

Initialisation, abstract shapes (for restore, conversion and ahead-of-time compilation) and the linen declaration are
made from this one tree, so they cannot disagree.
"""

import dataclasses
import zlib
from collections.abc import Callable, Container, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Init = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
        shape: of the array.
        axes: logical name of each axis (``config.ShardingRules``); None: never split.
        init: ``(key, shape, dtype) -> array``.

    Raises:
        ValueError: shape and axes differ in length.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def linear_spec(
    fan_in: int, fan_out: int, axes: tuple[str | None, str | None], init: Init | None = None
) -> dict[str, ParamSpec]:
    """Return the specs of kernel ``[in, out]`` and zero bias ``[out]`` of a linear layer (default: Xavier uniform)."""
    return {
        "kernel": ParamSpec((fan_in, fan_out), axes, init or nn.initializers.xavier_uniform()),
        "bias": ParamSpec((fan_out,), axes[1:], nn.initializers.zeros),
    }


def norm_spec(dim: int, axis: str | None = "embed") -> dict[str, ParamSpec]:
    """Return the specs of scale ``[dim]``, ones, and bias ``[dim]``, zeros, of a normalization."""
    return {
        "scale": ParamSpec((dim,), (axis,), nn.initializers.ones),
        "bias": ParamSpec((dim,), (axis,), nn.initializers.zeros),
    }


def stack_spec(spec: Any, length: int) -> Any:
    """Return the spec of ``length`` equal layers, with a leading ``layers`` axis."""

    def stacked(leaf: ParamSpec) -> ParamSpec:
        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.vmap(lambda k: leaf.init(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        return ParamSpec((length, *leaf.shape), ("layers", *leaf.axes), init)

    return map_spec(stacked, spec)


def map_spec(fn: Callable[[ParamSpec], Any], spec: Any) -> Any:
    """Apply ``fn`` to every ParamSpec of a nested dict."""
    return jax.tree.map(fn, spec, is_leaf=lambda x: isinstance(x, ParamSpec))


def init_tree(key: jax.Array, spec: Any) -> Any:
    """Return float32 parameters of ``spec``. The key of an array is ``fold_in(key, crc32(path))``."""

    def init(path: Any, leaf: ParamSpec) -> jax.Array:
        name = "/".join(str(p.key) for p in path)
        return leaf.init(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(init, spec, is_leaf=lambda x: isinstance(x, ParamSpec))


def abstract_tree(spec: Any) -> Any:
    """Return the float32 ``jax.ShapeDtypeStruct`` tree of ``spec``."""
    return map_spec(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), spec)


def inference_tree(abstract: Any, dtype: str, islands: Container[str] = ()) -> Any:
    """Return ``abstract`` with every ``kernel`` of type ``dtype``, except under the top-level names ``islands``.

    A kernel is rounded to the compute type wherever it is used. Parameters stored in this type therefore give the same
    bits as float32 ones; bfloat16 takes half the memory. The ``int8`` of a kernel in 8 bits has that type. All other
    parameters (norms, biases, modulation, scales) stay float32.
    """
    types = {"kernel": dtype, "int8": "int8"}

    def narrow(path: Any, leaf: Any) -> Any:
        keeps = path[-1].key not in types or path[0].key in islands
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if keeps else jnp.dtype(types[path[-1].key]))

    return jax.tree_util.tree_map_with_path(narrow, abstract)


def declare(module: nn.Module, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Declare ``spec`` as parameters of ``module`` (inside a compact method) and return the nested dict of arrays."""
    return {
        name: module.param(name, leaf.init, leaf.shape) if isinstance(leaf, ParamSpec) else _Group(leaf, name=name)()
        for name, leaf in spec.items()
    }


class _Group(nn.Module):
    """A named group of parameters, one level of the nested dict."""

    spec: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return declare(self, self.spec)
