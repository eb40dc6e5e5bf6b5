"""Choose the compute type that suits this machine, without JAX: ``dtype="auto"`` of a recipe.

The ``dtype`` of a network may be ``"auto"`` in a recipe file or a flag. :func:`resolve` replaces it by a type when the
recipe is read. Recipes therefore always have a type, and checkpoints, weights and datasets record it. A training that
continues with another type logs the change in its first lines, as it logs every changed setting. A dataset that was
begun with another type is refused. To continue exactly, set the former type.
"""

import functools
import glob
import importlib.util
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

AUTO = "auto"
UNITS = ("avx512_bf16", "amx_bf16")
"""Flags of x86 processors that multiply bfloat16."""


def resolve(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the groups of a recipe with every ``dtype`` of ``"auto"`` replaced by the type of this machine."""
    resolved: dict[str, Any] = {}
    for name, value in values.items():
        group = value.to_dict() if hasattr(value, "to_dict") else value
        resolved[name] = resolve(group) if isinstance(group, Mapping) else group
        if name == "dtype" and value == AUTO:
            resolved[name] = auto_dtype()
    return resolved


@functools.cache
def auto_dtype() -> str:
    """Return ``"bfloat16"`` on a TPU, a GPU or a CPU with units for it, else ``"float32"``; log the choice once."""
    device, has_units = units(os.environ.get("JAX_PLATFORMS", ""))
    dtype = "bfloat16" if has_units else "float32"
    verb = "has" if has_units else "has no"
    logging.getLogger("absl").info(
        "dtype 'auto' is %s on this machine: its %s %s units for bfloat16.", dtype, device, verb
    )
    return dtype


def units(platforms: str, root: pathlib.Path = pathlib.Path("/")) -> tuple[str, bool]:
    """Return the kind of device that JAX will use (TPU, GPU or CPU), and whether it multiplies bfloat16.

    This does not call JAX, which would open the devices before the processes of a run are joined. The first name in
    ``platforms`` (the variable JAX_PLATFORMS) decides. If it is empty, a device is used if its device files exist below
    ``root`` and JAX's plugin for it is installed.
    """
    first = platforms.split(",")[0].strip()
    if first in ("tpu", "cuda", "rocm", "gpu"):
        return ("TPU" if first == "tpu" else "GPU"), True
    if not first:
        if _installed("libtpu") and _present(root, "dev/accel[0-9]*", "dev/vfio/[0-9]*"):
            return "TPU", True
        if _installed("jax_cuda12_plugin", "jax_cuda13_plugin") and _present(root, "dev/nvidia[0-9]*"):
            return "GPU", True
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return "CPU", not flags.isdisjoint(UNITS)


def _installed(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in modules)


def _present(root: pathlib.Path, *patterns: str) -> bool:
    return any(glob.glob(str(root / pattern)) for pattern in patterns)
