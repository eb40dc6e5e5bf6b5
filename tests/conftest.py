"""Tests run on the CPU, on eight pretended devices, with matmuls in full float32. Set before JAX starts.

Compilation takes most of their time, and tiny networks gain nothing from optimised code: optimisation is off.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
