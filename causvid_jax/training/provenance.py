"""Provenance of weights: code, data, steps, time and machine, in the metadata of every weights file of a run."""

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

from causvid_jax.data import arrays
from causvid_jax.evaluation import report

KEY = "provenance"
"""Name in the metadata of a weights file and in a checkpoint; the value is JSON."""


def origin(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the constant entries of a run: ``code``, ``machine`` and ``data``."""
    return {"code": code(), "machine": machine(), "data": data(workdir)}


def code() -> str:
    """Return the version of the package and, in a clone, the commit: "0.1.0, commit 1a2b3c4d5e"."""
    version = importlib.metadata.version("causvid_jax")
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}, commit {commit}"


def machine() -> str:
    """Return devices, cores and versions: "1 x cpu, 2 cores, x86_64, Python 3.11.7, JAX 0.10.2"."""
    about = report.machine()
    return (
        f"{about['devices']}, {about['cpu_cores']} cores, {platform.machine()}, "
        f"Python {about['python']}, JAX {about['jax']}"
    )


def data(workdir: pathlib.Path) -> dict[str, str]:
    """Return a digest of every dataset under ``WORKDIR/data``, by the name of its folder.

    The digest of a dataset of arrays is the start of the SHA-256 of its inputs (``arrays.IDENTITY``). That of generated
    digits is part of their folder's name and covers every setting that changes a pixel.
    """
    folder = workdir / "data"
    digests = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.glob(f"*/{arrays.IDENTITY}"))
    }
    for path in sorted(folder.glob("moving_digits/*_*")):  # tfds puts .config beside them
        digests[f"{path.parent.name}/{path.name}"] = path.name.rpartition("_")[2]
    return digests
