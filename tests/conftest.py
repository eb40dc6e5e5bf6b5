"""Tests run on the CPU, on eight pretended devices, with matmuls in full float32. Set before JAX starts.

Compilation takes most of their time, and tiny networks gain nothing from optimised code: optimisation is off, and
what one test has compiled is kept for the others of the same run, in other processes too.
"""

import atexit
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The first process of a run makes the folder and takes it away; workers and programs under test inherit its name.
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="causvid_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's pool; by default one for each pretended device. A device runs independent collectives of a program in
# any order, and each holds a thread until all devices take part. So eight threads waited for each other in three
# collectives (the sharded step of the stage consistency).
os.environ["NPROC"] = "32"
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Pretended devices share the cores; by default XLA ends a process whose devices wait 40 s for each other.
    "--xla_cpu_collective_call_terminate_timeout_seconds=900",
)
FAST = (
    # The compiler of fused operations takes four fifths of the time of a compilation; the older one gives the same.
    "--xla_cpu_use_fusion_emitters=false",
    # One module for each program instead of up to 32, whose compilation two cores gain nothing from.
    "--xla_cpu_parallel_codegen_split_count=1",
)
"""Flags of XLA that only save time. They come and go with its versions, and it ends the process at an unknown one."""


def _accepted(flag: str) -> bool:
    """Return whether the installed jaxlib takes ``flag``, by starting a client in another process."""
    start = "from jaxlib import xla_client; xla_client.make_cpu_client()"
    environment = {**os.environ, "XLA_FLAGS": flag}
    return not subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True).returncode


given = os.environ.get("XLA_FLAGS", "").split()
if FLAGS[0] not in given:  # workers and programs under test inherit them
    flags = (*FLAGS, *filter(_accepted, FAST))
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in flags if flag not in given)])

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from tests import shapes  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
shapes.install()  # before any other module imports the functions that it replaces


def _switch_cache(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()  # JAX asks whether it is on once


@pytest.fixture(scope="module")
def compiled_anew():
    """Tests of several devices in one process compile what they need: a process has died of a program of theirs that
    another one had compiled, and it is not known why."""
    _switch_cache(False)
    yield
    _switch_cache(True)


@functools.cache
def _shares_set_up(path: str) -> bool:
    return 'scope="module"' in (pathlib.Path(__file__).parents[1] / path).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a module to one process if they share what the module sets up once, and other tests singly."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if _shares_set_up(path) else nodeid

    return Scheduling(config, log)
