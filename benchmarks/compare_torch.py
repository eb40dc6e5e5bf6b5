"""Time the streaming student and a PyTorch version of it (the twin) by alternating calls in one process.

``python benchmarks/compare_torch.py --config=digits --output=compare.json`` needs PyTorch and JAX. Both have equal
sizes, cache, compute type and device, and on a CPU the same cores. Weights are random. PyTorch is compiled
(``torch.compile``) unless ``--eager`` is given. Each round runs a call once in both. Every other round starts with the
other program, so that a slow phase of the machine affects both. Prints medians and their ratio (above 1: JAX is faster)
with a 95% interval by bootstrap, and the range of the ratio over the rounds.

A CPU is measured in float32 on one core, in processor time, which other programs disturb least; ``--threads`` above 1
measures wall time. A GPU is measured in the recipe's type, in wall time.

``--check`` instead compares the twin's velocities with those of the JAX student, in float32 with the same weights.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same device

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.analysis import bench, delivery
from causvid_jax.cli import common
from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.config.files import write_text
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import transformer
from causvid_jax.sampling import stream

OURS, THEIRS = "jax", "torch"
WARM_UP = 2
"""Rounds that do not count; the first includes compilation."""
BACKENDS = ("auto", "cudnn", "flash", "efficient", "math")
Calls = Mapping[str, Callable[[], None]]


def interleave(calls: Calls, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return milliseconds of ``rounds`` alternating calls of all ``calls``; every other round runs them in reverse."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + WARM_UP):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            begin = clock()
            calls[name]()
            if i >= WARM_UP:
                times[name].append(1e3 * (clock() - begin))
    return times


def line(what: str, frames_seen: int, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the entry of one call: milliseconds of every round, medians, and the ratio of PyTorch's to ours.

    ``frames_seen`` is the number of latent frames that the block attends to.
    """
    medians = {name: float(np.median(ms)) for name, ms in times.items()}
    each = np.divide(times[THEIRS], times[OURS])
    return {
        "what": what,
        "seen": frames_seen,
        "ms": {name: list(ms) for name, ms in times.items()},
        "p50_ms": medians,
        "ratio": medians[THEIRS] / medians[OURS],
        "interval": delivery.ratio_interval(times[OURS], times[THEIRS]),
        "range": (float(each.min()), float(each.max())),
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines as a Markdown table."""
    rows = [f"| call | frames seen | JAX ms | PyTorch ms | ratio | 95% interval | rounds |\n|{'---|' * 7}"]
    for item in lines:
        ours, theirs = (f"{item['p50_ms'][name]:.4g}" for name in (OURS, THEIRS))
        interval, spread = (f"{low:.2f} to {high:.2f}" for low, high in (item["interval"], item["range"]))
        rows.append(
            f"| {item['what']} | {item['seen']} | {ours} | {theirs} | {item['ratio']:.2f} | {interval} | {spread} |"
        )
    return "\n".join(rows)


class Student:
    """Our student with random weights, and a stream of it that is moved from length to length."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.params = {"student": bench.random_weights(transformer.inference(recipe.student, unstacked=True))}
        text = jax.random.normal(jax.random.key(1), (1, recipe.text.length, recipe.text.dim))
        state = stream.init_stream(self.params, text, config=recipe)
        self.state = dataclasses.replace(state, decode=None)  # type: ignore[arg-type]
        shape = (1, recipe.causal.frames_per_block, *recipe.latent_size, recipe.vae.z_dim)
        self.latents = jax.random.normal(jax.random.key(2), shape)
        short = dataclasses.replace(recipe, causal=dataclasses.replace(recipe.causal, context_pass=False))
        self.denoise = functools.partial(stream.next_block, config=short)
        self.block = functools.partial(stream.next_block, config=recipe)

    def write(self, params: Any, state: stream.StreamState) -> tuple[None, stream.StreamState]:
        """Write the block to the cache; return None and the next state."""
        return None, stream.append(params, state, self.latents, config=self.recipe)

    def fill(self, frame: int) -> None:
        """Write blocks until the next one starts at latent frame ``frame``."""
        while int(self.state.cache.position) < frame:
            self.state = self.write(self.params, self.state)[1]

    def call(self, function: Callable[..., Any], frame: int) -> Callable[[], None]:
        """Return a call of ``function`` on the block at ``frame``, waited for."""

        def run() -> None:
            position = jnp.asarray(np.int32(frame))  # a new array each time: the state is donated
            state = dataclasses.replace(self.state, cache=dataclasses.replace(self.state.cache, position=position))
            self.state = jax.block_until_ready(function(self.params, state))[1]

        return run


def measure(recipe: Recipe, flags: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the report: both students timed at the full window, or with ``--lengths`` at every cache length."""
    import torch
    import torch_sampler

    device = torch.device(flags.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    mode = flags.mode or ("max-autotune-no-cudagraphs" if device.type == "cuda" else "default")
    ours, twin = Student(recipe), torch_sampler.Sampler(recipe, device, None if flags.eager else mode)
    steps, lengths, lines = len(recipe.diffusion.denoising_timesteps), bench.cache_lengths(recipe), []
    latents = torch.randn(twin.shape, device=device)
    for start, seen in lengths if flags.lengths else lengths[-1:]:
        ours.fill(start)
        twin.stream.position = start
        ready = twin.stream.block(twin.grid)

        def block(ready: Any = ready) -> None:
            x0 = twin.denoise(ready)
            if recipe.causal.context_pass:
                twin.write(ready, x0)

        pairs: dict[str, tuple[Any, Callable[[], Any]]] = {
            f"denoising, all {steps} steps": (ours.denoise, lambda ready=ready: twin.denoise(ready)),
            "cache write": (ours.write, lambda ready=ready: twin.write(ready, latents)),
            "block": (ours.block, block),
        }
        for what, (function, theirs) in pairs.items():

            def waited(theirs: Callable[[], Any] = theirs) -> None:
                theirs()
                wait()

            times = interleave({OURS: ours.call(function, start), THEIRS: waited}, flags.repeats, clock)
            lines.append(line(what, seen, times))
            print(table(lines[-1:]).splitlines()[-1], flush=True)
    words = bench.settings(recipe, bench.Options())
    return {
        "program": "benchmarks/compare_torch.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": bench.describe_device() | {"twin": f"PyTorch {torch.__version__}", "threads": flags.threads},
        "settings": words | {"twin": f"SDPA {flags.attention}, {'eager' if flags.eager else f'torch.compile {mode}'}"},
        "clock": clock.__name__,
        "lines": lines,
        "notes": [
            "The twin's residual stream is in the compute type, ours in float32.",
            "Neither has a sink: a recipe's sink frames are part of the window.",
        ],
    }


def read_recipe(flags: argparse.Namespace) -> Recipe:
    """Return the recipe that both run. The twin has no sink, so its frames are added to the window.

    Raises:
        ConfigError: no such recipe, or one that the twin does not know.
    """
    recipe = load_recipe(flags.config)
    causal, net = recipe.causal, recipe.student
    seen = causal.window + causal.sink if causal.window else 0  # 0: no window
    window = seen if flags.window is None else flags.window
    causal = dataclasses.replace(causal, window=window, sink=0)
    dtype = flags.dtype or ("float32" if flags.device == "cpu" else net.dtype)
    kernel = net.attention if dtype == net.dtype else "auto"
    recipe = dataclasses.replace(recipe, causal=causal, student=dataclasses.replace(net, dtype=dtype, attention=kernel))
    require(
        not (causal.independent_first_frame or net.image_dim),
        "the PyTorch twin knows neither an independent first frame nor an image branch; set "
        "causal.independent_first_frame=False",
    )
    plain = net.linear == net.kv_cache == "dtype" and net.attention != "int8"
    require(
        plain, "the PyTorch twin does not compute in 8 bits; accepted: student.linear, kv_cache, attention without it"
    )
    return recipe


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags; ``arguments`` None: those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare velocities with the JAX student at a tiny size")
    parser.add_argument("--config", default="digits", help="a recipe's name or file, for example configs/wan_1_3b.py")
    parser.add_argument("--output", help="the report, a .json file; the table goes beside it as .md")
    parser.add_argument("--window", type=int, help="instead of the recipe's causal.window")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type of both")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--threads", type=int, default=1, help="cores of a CPU")
    parser.add_argument("--attention", choices=BACKENDS, default="auto", help="kernel of SDPA")
    parser.add_argument("--eager", action="store_true", help="do not compile PyTorch")
    parser.add_argument(
        "--mode", help="of torch.compile; default: default on a CPU, max-autotune-no-cudagraphs on a GPU"
    )
    parser.add_argument("--lengths", action="store_true", help="every cache length, not only the full window")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if PyTorch has it")
    return parser.parse_args(arguments)


def main() -> None:
    """Read the flags; check velocities, or measure and write the report."""
    flags = parse()
    import torch
    import torch_sampler

    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jax.config.update("jax_platforms", flags.device)
    if flags.device == "cpu":
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
        torch.set_num_threads(flags.threads)
    with torch.no_grad():
        if flags.check:
            torch_sampler.check()
            return
        try:
            output, recipe = common.check_output(flags.output, (".json",)), read_recipe(flags)
            bench.Options(flags.repeats)
        except ConfigError as error:
            sys.exit(f"error: {error}")
        common.enable_compilation_cache()
        clock = time.process_time if flags.device == "cpu" and flags.threads == 1 else time.perf_counter
        with torch_sampler.kernels(flags.attention):
            report = measure(recipe, flags, clock)
    described = ", ".join(f"{name} {value}" for part in ("device", "settings") for name, value in report[part].items())
    text = f"{described}. Clock: {report['clock']}.\n\n{table(report['lines'])}\n"
    write_text(output, json.dumps(report, indent=1) + "\n")
    write_text(output.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
