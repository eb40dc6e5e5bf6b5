"""Run VBench's own models on sampled clips, where the package ``vbench`` is installed (extra ``vbench``)."""

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

from causvid_jax.config import ConfigError, RunError, require
from causvid_jax.evaluation.vbench.totals import DIMENSIONS, FLICKER

INFO = "VBench_full_info.json"


def find_info(path: str | None) -> pathlib.Path:
    """Return the path of VBench's list of prompts: ``path``, else that of the installed package.

    Raises:
        ConfigError: there is none.
    """
    if path:
        return pathlib.Path(path)
    spec = importlib.util.find_spec("vbench")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    file = next((each for folder in folders if (each := pathlib.Path(folder) / INFO).is_file()), None)
    if file is None:
        raise ConfigError(f"no --info is given and the package vbench is not installed; give {INFO} of VBench")
    return file


def run_short(videos: pathlib.Path, info: pathlib.Path, output: pathlib.Path) -> list[pathlib.Path]:
    """Score clips of under five seconds by VBench, one dimension after the other; return the result files.

    Dimensions that have a result are not computed again. Temporal flickering is computed on static clips
    (:func:`static_videos`), and last, because the filter reads the weights that dynamic degree downloads.

    Raises:
        ConfigError: ``vbench`` is not installed, or no clip of temporal flickering is static.
    """
    if importlib.util.find_spec("vbench") is None:
        raise ConfigError("scoring needs vbench; install it: pip install 'causvid_jax[vbench]'")
    import torch  # type: ignore[import-not-found]
    from vbench import VBench  # type: ignore[import-not-found]

    output.mkdir(parents=True, exist_ok=True)
    bench = VBench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), str(info), str(output))
    results = []
    for name in sorted(DIMENSIONS, key=lambda name: name == FLICKER):
        result = output / f"{name}_eval_results.json"
        if not result.is_file():
            source = static_videos(videos, output) if name == FLICKER else videos
            bench.evaluate(videos_path=str(source), name=name, dimension_list=[name], mode="vbench_standard")
        results.append(result)
    return results


def static_videos(videos: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """Return a folder with up to five static clips of every prompt of temporal flickering, numbered from 0.

    VBench's command ``static_filter`` chooses them by optical flow and copies them.

    Raises:
        ConfigError: no clip is static.
    """
    done, partial = output / "static", output / "static.partial"
    if not done.is_dir():
        from vbench.cli import static_filter  # type: ignore[import-not-found]

        shutil.rmtree(partial, ignore_errors=True)
        parser = argparse.ArgumentParser()
        static_filter.register_subparsers(parser.add_subparsers())
        flags = ["static_filter", "--videos_path", str(videos), "--result_path", str(partial)]
        arguments = parser.parse_args(flags)
        arguments.func(arguments)
        partial.rename(done)
    chosen = done / "filtered_videos"
    count = len(list(chosen.glob("*.mp4")))
    require(
        count > 0,
        f"no clip of temporal flickering in {videos} is static, so the dimension has no score and the run no total",
    )
    print(f"temporal_flickering is computed on {count} static clips", flush=True)
    return chosen


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
            command += ["--static_filter_flag"] if name == FLICKER else []
            environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(checkout.absolute())}
            status = subprocess.run(command, cwd=checkout, env=environment, check=False).returncode
            found = sorted(folder.glob("*_eval_results.json"))
            if status or not found:
                raise RunError(f"VBench-Long ended with status {status} on {name}; its message is above")
        results.append(found[-1])
    return results
