"""Describe machines by name, without access to them, and list the published figures of their chips.

TPU ``v5p:4x4x4``, ``v6e:16x16``, two slices as ``v5p:4x4x8*2``; GPU ``h100:8`` (one node), ``h200:8x8`` (eight nodes of
eight). Sizes are chips. Google's name v5p-64 counts cores, that is 32 chips, ``v5p:2x4x4``; names of v5e and v6e count
chips.
"""

import dataclasses
import math
import os
import re
from typing import Any

from causvid_jax.config import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device, as XLA counts devices.

    Attributes:
        memory: bytes of device memory that a program may use.
        flops: peak bfloat16 FLOP/s, dense.
        bandwidth: of its memory, bytes a second.
        ici_bandwidth: to the devices of its slice (ICI) or node (NVLink), bytes a second in one direction, all links.
        dcn_bandwidth: to other slices or nodes, bytes a second and device.
        device_kinds: JAX's ``device_kind`` of this device.
        platform: of XLA.
    """

    memory: float
    flops: float
    bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    device_kinds: tuple[str, ...]
    platform: str = "tpu"


GIB = 2.0**30
# TPU: Google Cloud's documentation; memory as XLA reports it, the network between slices is an assumption (100 Gbit/s
# per chip at best). GPU: NVIDIA's data sheets (SXM5), NVLink in one direction, one 400 Gbit/s port per device; 92% of
# the memory, because driver, NCCL and allocator use the rest.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 0.819e12, 200e9, 12.5e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(95.74 * GIB, 459e12, 2.765e12, 600e9, 12.5e9, ("TPU v5", "TPU v5p")),
    "v6e": Chip(31.25 * GIB, 918e12, 1.64e12, 448e9, 12.5e9, ("TPU v6 lite", "TPU v6e")),
    "h100": Chip(0.92 * 84942979072, 989e12, 3.35e12, 450e9, 50e9, ("NVIDIA H100 80GB HBM3",), "cuda"),
    "h200": Chip(0.92 * 151397597184, 989e12, 4.8e12, 450e9, 50e9, ("NVIDIA H200",), "cuda"),
}
_OTHER_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "TPU7x": 2307e12 / 2,
}
"""Dense bfloat16 FLOP/s of device kinds that programs are not compiled for. A TPU v7x chip (2307e12) is two devices."""
GPU_EXTRA = "jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12 and nvidia-cudnn-cu12"


@dataclasses.dataclass(frozen=True)
class TopologySpec:
    """Kind, shape and number of devices of a named machine; it needs no compiler.

    Attributes:
        name: as given.
        kind: key of :data:`CHIPS`.
        shape: of one slice, or (nodes, devices a node).
        slices: copies of it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Published figures of one device."""
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Number of devices in all slices or nodes."""
        return math.prod(self.shape) * self.slices

    @property
    def ici_size(self) -> int:
        """Number of devices that ICI or NVLink joins: those of a slice, or of a node."""
        return self.shape[-1] if self.chip.platform == "cuda" else math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described machine, with devices that a compiler accepts."""

    machine: TopologySpec
    devices: list[Any]


def parse(name: str) -> TopologySpec:
    """Parse the machine ``name``: KIND:AxB[xC][*SLICES] for TPU, KIND:N or KIND:NODESxN for GPU.

    Raises:
        ConfigError: an unknown kind or shape.
    """
    tpus, gpus = ([k for k, c in CHIPS.items() if c.platform == p] for p in ("tpu", "cuda"))
    match = re.fullmatch(rf"({'|'.join(tpus)}):(\d+(?:x\d+)+)(?:\*(\d+))?", name) or re.fullmatch(
        rf"({'|'.join(gpus)}):(\d+(?:x\d+)?)()", name
    )
    require(
        match is not None,
        f"topology is {name!r}; accepted: KIND:AxB or KIND:AxBxC, *N for N slices, with KIND one of {', '.join(tpus)}, "
        f"and KIND:N or KIND:NODESxN with KIND one of {', '.join(gpus)}",
    )
    assert match is not None
    shape = tuple(int(size) for size in match.group(2).split("x"))
    if match.group(1) in gpus and len(shape) == 1:
        shape = (1, *shape)
    require(math.prod(shape) > 0, f"topology is {name!r}; its sizes must be at least 1")
    return TopologySpec(name, match.group(1), shape, int(match.group(3) or 1))


def describe(name: str) -> Topology:
    """Return the machine ``name`` with devices to compile for. No such device is needed.

    TPU needs libtpu (extra ``tpu``). GPU needs XLA's CUDA compiler (extra ``cuda12``, no driver).

    Raises:
        ConfigError: an unknown kind or shape, or no compiler for it.
    """
    machine = parse(name)
    # On a host without TPU, libtpu would create a lock file and search for a metadata server.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # any existing type; the compilation target is set below
    from jax.experimental import topologies

    shape = "x".join(map(str, machine.shape))
    options: dict[str, Any]
    if machine.chip.platform == "cuda":
        options = {"topology_name": "", "topology": f"1x{shape}", "target_config": _gpu_target(machine.chip)}
        extra = f"pip install 'causvid_jax[cuda12]', or of it no more than {GPU_EXTRA}"
    else:
        options = {"topology_name": f"{machine.kind}:{shape}"}
        options |= {"num_slices": machine.slices} if machine.slices > 1 else {}
        extra = "pip install 'causvid_jax[tpu]'"
    try:
        described = topologies.get_topology_desc(platform=machine.chip.platform, **options)
    except Exception as error:  # the plugins raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"topology {name!r} cannot be described; it needs {extra} and a shape that exists ({reason}); "
            "--estimate computes the figures from shapes instead"
        ) from error
    return Topology(machine, list(described.devices))


def _gpu_target(chip: Chip) -> str:
    """Return XLA's description of a Hopper GPU with the memory of ``chip``, as the text of its GpuTargetConfigProto."""
    memory = round(chip.memory / 0.92)
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {round(chip.bandwidth)}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "Hopper, {memory} bytes"
"""


def peak_flops(device_kind: str, dtype: str) -> tuple[float | None, str]:
    """Return the peak FLOP/s of a device for matmuls in ``dtype``, and its source; or None, and why it is unknown.

    NVIDIA's figures are those of SXM parts. The PCIe and NVL parts are slower and report longer device kinds.
    """
    peaks = _OTHER_PEAKS | {kind: chip.flops for chip in CHIPS.values() for kind in chip.device_kinds}
    if device_kind not in peaks:
        return None, f"no published peak is known for device kind {device_kind!r}"
    if dtype != "bfloat16":
        return None, f"the peak of {device_kind} is published for bfloat16; this sampler computes in {dtype}"
    peak = peaks[device_kind]
    return peak, f"dense bfloat16 peak of {device_kind} as published, {peak / 1e12:.0f} TFLOP/s"
