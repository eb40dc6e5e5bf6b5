"""Check the jaxtyping annotations of public functions at every call.

:func:`install` replaces the annotated functions of the given modules before other modules import them. A name such as
``B`` has one value within a call, over all arguments and results. NumPy arrays and abstract arrays are checked too.
"""

import functools
import importlib
import inspect
import types
import typing

import jaxtyping

MODULES = (
    *("causvid_jax.diffusion." + name for name in ("flow", "guidance", "solvers")),
    *("causvid_jax.models." + name for name in ("layers", "rope", "attention", "image_branch", "conv", "vae", "taehv")),
    *("causvid_jax.models." + name for name in ("umt5", "clip_vision", "transformer")),
)


def check(value: object, hint: object, where: str) -> None:
    """Raise TypeError unless ``value`` has the shape and type that ``hint`` says; other hints are ignored."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hints = [h for h in typing.get_args(hint) if h is not type(None)]
        if value is not None and len(hints) == 1:
            check(value, hints[0], where)
    elif typing.get_origin(hint) is tuple and isinstance(value, tuple):
        for i, (item, item_hint) in enumerate(zip(value, typing.get_args(hint), strict=False)):
            check(item, item_hint, f"{where}[{i}]")
    elif isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray) and hasattr(value, "dtype"):
        accepted = hint.dtype[typing.Any, hint.dim_str]
        if not isinstance(value, accepted):
            raise TypeError(f"{where} has shape {value.shape} and type {value.dtype}; annotated {hint.__name__}")


def checked(function):
    """Return ``function`` with a check of its annotated arguments and result."""
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        with jaxtyping.jaxtyped("context"):
            for name, value in bound.arguments.items():
                check(value, hints.get(name), f"{function.__name__}: {name}")
            result = function(*args, **kwargs)
            check(result, hints.get("return"), f"{function.__name__}: result")
        return result

    return call


def install() -> int:
    """Check all annotated public functions of :data:`MODULES` from now on; return their number."""
    count = 0
    for module in map(importlib.import_module, MODULES):
        for name, function in list(vars(module).items()):
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and not name.startswith("_") and "jaxtyping" in repr(typing.get_type_hints(function)):
                setattr(module, name, checked(function))
                count += 1
    return count
