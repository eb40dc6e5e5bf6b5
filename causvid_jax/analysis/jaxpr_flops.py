"""Floating-point operations of the codecs, counted from their traced programs.

The transformer has a formula (:mod:`causvid_jax.analysis.flops`). A convolutional codec has a table of layers instead,
so its matmuls and convolutions are read off the trace, at any size and without running anything::

    matmul       2 (elements of the output) (elements summed over)
    convolution  2 (elements of the output) (kernel height, width and time) (input channels)

A multiply and an add are two. Norms, activations and everything else elementwise are left out.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def traced(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of matmuls and convolutions of ``function(*arguments)``; arguments may be ``jax.ShapeDtypeStruct``.

    A loop of known length counts as often as it turns, of the branches of a conditional the most expensive one.

    Raises:
        NotImplementedError: a loop whose length the trace does not say.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
        return 2.0 * equation.outvars[0].aval.size * summed
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / features
    inner = [_count(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise NotImplementedError("a loop of unknown length has no number of operations")
    return sum(inner)


def _jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs in a parameter of an equation."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _jaxprs(part)
