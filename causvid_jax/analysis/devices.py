"""What the device at hand is: its kind, its published peak, its memory."""

import os
import pathlib
import platform
import resource
import sys

import jax

from causvid_jax.analysis.topology import CHIPS

# Dense bfloat16 FLOP/s of one device as JAX counts devices, by ``device_kind``. NVIDIA: data sheets, SXM parts (the
# PCIe and NVL parts of the same name are slower and report a longer name). TPU: Google Cloud's documentation; a v7x
# chip (2307e12) is two devices.
PEAK_BF16 = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": 2307e12 / 2,
}


def peak(kind: str, dtype: str) -> tuple[float | None, str]:
    """Peak FLOP/s of a device of ``kind`` for matmuls in ``dtype``, and where that is from or why it is not known."""
    if kind not in PEAK_BF16:
        return None, f"no published peak is known for device kind {kind!r}"
    if dtype != "bfloat16":
        return None, f"the peak of {kind} is published for bfloat16; this sampler computes in {dtype}"
    return PEAK_BF16[kind], f"dense bfloat16 peak of {kind} as published, {PEAK_BF16[kind] / 1e12:.0f} TFLOP/s"


def describe() -> dict[str, str | int]:
    """The device that single-device programs run on, the host and the versions that matter."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else _processor()
    return {
        "platform": device.platform,
        "kind": kind,
        "host_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "framework": f"JAX {jax.__version__}",
    }


def _processor() -> str:
    """The CPU's own name for itself; JAX calls every one of them "cpu"."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def memory_peak() -> tuple[int, str]:
    """Bytes in use at the highest so far, and of what: the device where it counts them, else this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"]), "device"
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process, with the interpreter and the compiler"


def memory_limit() -> int | None:
    """Bytes that a program may hold on the device; the host's memory where the device is the host; None if unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if jax.default_backend() == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
