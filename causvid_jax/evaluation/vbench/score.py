"""Run VBench's own models on sampled clips, where the package ``vbench`` is installed (extra ``vbench``)."""

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

from causvid_jax.config import ConfigError, RunError, require
from causvid_jax.evaluation.vbench.totals import DIMENSIONS

INFO = "VBench_full_info.json"


def find_info(given: str | None) -> pathlib.Path:
    """Return VBench's list: the file ``given``, else the one of the installed package.

    Raises:
        ConfigError: there is none.
    """
    if given:
        return pathlib.Path(given)
    spec = importlib.util.find_spec("vbench")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    file = next((path for folder in folders if (path := pathlib.Path(folder) / INFO).is_file()), None)
    if file is None:
        raise ConfigError(f"no --info is given and the package vbench is not installed; give {INFO} of VBench")
    return file


def run_short(
    videos: pathlib.Path, info: pathlib.Path, output: pathlib.Path, dimensions: Sequence[str] = tuple(DIMENSIONS)
) -> list[pathlib.Path]:
    """Score clips of under five seconds by VBench, one dimension after the other; return the result files.

    Dimensions that have a result are not computed again.

    Raises:
        ConfigError: ``vbench`` is not installed.
    """
    if importlib.util.find_spec("vbench") is None:
        raise ConfigError("scoring needs vbench; install it: pip install 'causvid_jax[vbench]'")
    import torch  # type: ignore[import-not-found]
    from vbench import VBench  # type: ignore[import-not-found]

    output.mkdir(parents=True, exist_ok=True)
    bench = VBench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), str(info), str(output))
    results = []
    for name in dimensions:
        result = output / f"{name}_eval_results.json"
        if not result.is_file():
            bench.evaluate(videos_path=str(videos), name=name, dimension_list=[name], mode="vbench_standard")
        results.append(result)
    return results


def run_long(
    checkout: pathlib.Path, videos: pathlib.Path, output: pathlib.Path, dimensions: Sequence[str] = tuple(DIMENSIONS)
) -> list[pathlib.Path]:
    """Score longer clips by VBench-Long, the program ``vbench2_beta_long/eval_long.py`` of a checkout of VBench.

    Raises:
        ConfigError: no such program.
        RunError: it failed.
    """
    program = checkout / "vbench2_beta_long" / "eval_long.py"
    require(program.is_file(), f"--long {checkout} has no vbench2_beta_long/eval_long.py; give a checkout of VBench")
    results = []
    for name in dimensions:
        folder = output / name
        found = sorted(folder.glob("*_eval_results.json"))
        if not found:
            command = [sys.executable, str(program), "--videos_path", str(videos.absolute()), "--dimension", name]
            command += ["--mode", "long_vbench_standard", "--dev_flag", "--output_path", str(folder.absolute())]
            environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(checkout.absolute())}
            status = subprocess.run(command, cwd=checkout, env=environment, check=False).returncode
            found = sorted(folder.glob("*_eval_results.json"))
            if status or not found:
                raise RunError(f"VBench-Long ended with status {status} on {name}; its message is above")
        results.append(found[-1])
    return results
