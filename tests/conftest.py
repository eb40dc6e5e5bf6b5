"""Tests run on the CPU, on eight pretended devices, with matmuls in full float32. Set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
DEVICES = "--xla_force_host_platform_device_count=8"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
