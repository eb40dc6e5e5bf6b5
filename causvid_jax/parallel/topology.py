"""Machines by name: ``v5p:4x4x4``, ``v6e:16x16``, two slices as ``v5p:4x4x8*2``. Described, they need not be there."""

import dataclasses
import os
import re
from typing import Any

from causvid_jax.config import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device, as XLA counts devices.

    Attributes:
      memory: bytes of device memory that a program may use.
      flops: peak bfloat16 FLOP/s.
    """

    memory: float
    flops: float


GIB = 2.0**30
# Google Cloud's TPU documentation; the limit is what XLA reports as available.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12),
    "v5p": Chip(95.74 * GIB, 459e12),
    "v6e": Chip(31.25 * GIB, 918e12),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described machine and its devices."""

    name: str
    chip: Chip
    devices: list[Any]


def describe(name: str) -> Topology:
    """The machine ``name``, KIND:AxB[xC][*SLICES], without one being there; needs the extra ``tpu`` (libtpu).

    Raises:
        ConfigError: an unknown kind or shape, or no libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)(?:\*(\d+))?", name)
    require(
        match is not None and match.group(1) in CHIPS,
        f"topology is {name!r}; accepted: KIND:AxB or KIND:AxBxC, *N for N slices; KIND is one of {', '.join(CHIPS)}",
    )
    assert match is not None
    kind, shape, slices = match.group(1), match.group(2), int(match.group(3) or 1)
    # libtpu takes a lock file and looks for a metadata server unless told that this is no TPU host.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options)
    except Exception as error:  # libtpu raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"topology {name!r} cannot be described; it needs pip install 'causvid_jax[tpu]' and a shape that exists "
            f"({reason})"
        ) from error
    return Topology(name, CHIPS[kind], list(described.devices))
