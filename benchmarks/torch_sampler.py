"""An equivalent PyTorch sampler, timed as ``launch.bench`` times ours, into the same JSON. Needs PyTorch beside JAX.

``python benchmarks/torch_sampler.py --config=configs/wan_1_3b.py --window=21 --compile --output=torch.json`` and then
``causvid bench --against=torch.json``. Random weights. ``--check`` compares it with the JAX student at
a tiny size instead, in float32 with the same weights and inputs. The network is ``benchmarks/torch_network.py``.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # JAX only reads the recipe here; the accelerator is PyTorch's
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import torch
from torch_network import Student, load_ours, rotary

from causvid_jax.analysis import bench, flops, memory, topology
from causvid_jax.analysis import report as report_format
from causvid_jax.cli import common
from causvid_jax.config import CausalConfig, ConfigError, Recipe, TransformerConfig, require
from causvid_jax.config.recipes import load_recipe
from causvid_jax.diffusion import flow

BACKENDS = ("auto", "cudnn", "flash", "efficient", "math")


class Stream:
    """A stream of blocks: the ring cache and the position, and one pass on the current block."""

    def __init__(self, student: Student, text, causal: CausalConfig, slots: int, tokens: int, compiled: str | None):
        net, device, dtype = student.net, text.device, student.patch.weight.dtype
        self.net, self.causal, self.slots, self.tokens, self.device = net, causal, slots, tokens, device
        self.text = student.encode_text(text)
        shape = (text.shape[0], slots * tokens, net.num_heads, net.dim // net.num_heads)
        self.cache = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv") for _ in student.blocks]
        self.run = torch.compile(student, mode=compiled, dynamic=False) if compiled else student
        self.position = 0

    def block(self, grid: tuple[int, int]):
        """(rotary table, token slots, tokens in use) of the block at the position."""
        k = self.causal.frames_per_block
        frames = torch.arange(self.position, self.position + k, device=self.device)
        turn = rotary(frames, *grid, self.net.dim // self.net.num_heads, self.net.rope_theta)
        slots = (frames % self.slots)[:, None] * self.tokens + torch.arange(self.tokens, device=self.device)
        return turn, slots.flatten(), min(self.position + k, self.slots) * self.tokens

    def velocity(self, x, timestep: torch.Tensor, ready):
        turn, slots, used = ready
        return self.run(x, timestep, turn, self.text, self.cache, slots, used)


class Sampler:
    """The student of a recipe with random weights, and a stream of it at any length."""

    def __init__(self, recipe: Recipe, device: torch.device, compiled: str | None):
        net, causal = recipe.student, recipe.causal
        torch.manual_seed(0)
        dtype = getattr(torch, net.dtype)
        with torch.device(device):
            student = Student(net)
            for parameter in student.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.02)
            student = student.cast(dtype).eval()
            rows = torch.randn(1, recipe.text.length, recipe.text.dim)
        height, width = recipe.latent_size
        _, p, q = net.patch_size
        self.grid = (height // p, width // q)
        slots = causal.window or recipe.video.latent_frames
        self.stream = Stream(student, rows, causal, slots, self.grid[0] * self.grid[1], compiled)
        self.shape = (1, causal.frames_per_block, height, width, recipe.vae.z_dim)
        steps = [float(t) for t in flow.student_timesteps(recipe.diffusion)]
        self.table = [(t, t / 1000, s / 1000) for t, s in zip(steps, [*steps[1:], 0.0], strict=True)]
        self.device, self.clean = device, causal.context_noise
        self.told = {t: torch.full((1, causal.frames_per_block), t, device=device) for t in (*steps, self.clean)}

    def denoise(self, ready):
        """All denoising steps of the block at the stream's position: x0."""
        x = torch.randn(self.shape, device=self.device)
        for timestep, sigma, following in self.table:
            x0 = x - sigma * self.stream.velocity(x, self.told[timestep], ready)
            x = x0 if not following else (1 - following) * x0 + following * torch.randn(self.shape, device=self.device)
        return x

    def write(self, ready, latents):
        """Write the cache."""
        return self.stream.velocity(latents, self.told[self.clean], ready)


def timed(call, device: torch.device, repeats: int) -> tuple[float, ...]:
    """Seconds of ``repeats`` calls, each waited for, after three that do not count (compilation among them)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(repeats + 3):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - begin)
    return tuple(seconds[3:])


def measure(recipe: Recipe, given: argparse.Namespace, device: torch.device) -> dict:
    """Return the report, with the fields of ``launch.bench``."""
    begin = time.perf_counter()
    sampler = Sampler(recipe, device, given.mode if given.compile else None)
    stream, lines = sampler.stream, []
    tokens, k = flops.tokens_per_frame(recipe, recipe.student), recipe.causal.frames_per_block
    latents = torch.randn(sampler.shape, device=device)
    steps, found = len(sampler.table), bench.cache_lengths(recipe)

    def add(what, seen, seconds, passes, parts=1, fps=None):
        p50, p99 = (float(np.percentile(seconds, p)) * 1e3 / parts for p in (50, 99))
        one = flops.forward(recipe.student, k, tokens, k * seen, text=False) / 1e12
        each = tuple(x * 1e3 / parts for x in seconds)
        lines.append(report_format.Line(what, seen, "none", p50, p99, len(seconds), passes * one, fps, each))

    for start, seen in found if given.lengths else found[-1:]:
        stream.position = start
        ready = stream.block(sampler.grid)
        seconds = timed(lambda ready=ready: sampler.denoise(ready), device, given.repeats)
        add("denoising step", seen, seconds, 1, parts=steps)
        if seen == found[-1][1]:
            add(f"denoising, all {steps} steps", seen, seconds, steps)
        seconds = timed(lambda ready=ready: sampler.write(ready, latents), device, given.repeats)
        add("cache write", seen, seconds, 1)

    def block():
        x0 = sampler.denoise(ready)
        return sampler.write(ready, x0) if recipe.causal.context_pass else x0

    seconds = timed(block, device, given.repeats)
    add(
        "block, steady",
        found[-1][1],
        seconds,
        steps + recipe.causal.context_pass,
        fps=4 * k / float(np.median(seconds)),
    )
    words = bench.settings(recipe, bench.Options())
    how = f"torch.compile {given.mode}" if given.compile else "eager"
    words["attention"] = f"SDPA {given.attention}, {how}"
    on_gpu = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if on_gpu else str(bench.describe_device()["kind"])
    peak, why = topology.peak_flops(kind, recipe.student.dtype)
    held = torch.cuda.max_memory_allocated(device) if on_gpu else memory.memory_peak()[0]
    return {
        "program": "benchmarks/torch_sampler.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": {
            "platform": "gpu" if on_gpu else "cpu",
            "kind": kind,
            "host_cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "framework": f"PyTorch {torch.__version__}",
        },
        "settings": words,
        "weights": f"random, in {recipe.student.dtype}",
        "peak": why,
        "compile_seconds": time.perf_counter() - begin - sum(x.p50_ms * x.calls for x in lines) / 1e3,
        "memory": {"of": "device" if on_gpu else "process", "bytes": {"student": int(held)}},
        "lines": [report_format.line(item, words, peak) for item in lines],
        "notes": ["Keys are stored rotated, attention runs over the slots in use, the residual stream is in bfloat16."],
    }


def check() -> None:
    """Compare velocities with the JAX student, block by block past the end of a window, in float32."""
    import jax
    import jax.numpy as jnp

    from causvid_jax.models import transformer

    jax.config.update("jax_default_matmul_precision", "highest")
    # A head size of 12 splits its rotary pairs evenly, one of 20 (4, 3, 3) does not.
    net = TransformerConfig(
        dim=40, ffn_dim=56, num_heads=2, num_layers=3, in_channels=6, out_channels=6, text_dim=14, text_length=9
    )
    causal, seed = CausalConfig(frames_per_block=2, window=6), int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    scale = {"scale": 1.0}

    def draw(path, leaf):
        return (scale.get(path[-1].key, 0.0) + 0.15 * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, transformer.abstract(net))
    text = rng.standard_normal((1, 9, 14)).astype(np.float32)
    student = Student(net).eval()
    load_ours(student, params)
    theirs = Stream(student, torch.tensor(text), causal, causal.window, 12, None)
    ours = jax.jit(lambda p, x, t, c, cache: transformer.cached(p, x, t, c, cache, config=net, causal=causal))
    encoded = transformer.encode_text(params, jnp.asarray(text), config=net)
    cache = transformer.init_cache(net, causal, batch=1, height=6, width=8)
    worst, size = 0.0, 0.0
    for block in range(5):
        theirs.position = 2 * block
        ready = theirs.block((3, 4))
        for timestep in (987.5, 41.25, 0.0):  # the last one stays in the cache
            x = rng.standard_normal((1, 2, 6, 8, 6)).astype(np.float32)
            told = np.full((1, 2), timestep, np.float32)
            expected, cache = ours(params, x, told, encoded, cache)
            found = theirs.velocity(torch.tensor(x), torch.tensor(told), ready).numpy()
            worst, size = max(worst, float(np.abs(found - expected).max())), float(np.std(expected))
        cache = transformer.advance(cache, 2)
    print(f"torch sampler: max |torch - jax| = {worst:.1e} over 15 passes, std {size:.2f} (seed {seed})")
    assert worst <= 5e-5 * max(1.0, size)


def kernels(name: str):
    """Return the context in which SDPA uses the kernel ``name``."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    return contextlib.nullcontext() if name == "auto" else sdpa_kernel([getattr(SDPBackend, kinds[name])])


def main() -> None:
    """Read the arguments, check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the JAX student at a tiny size")
    parser.add_argument("--config", help="recipe file, for example configs/wan_1_3b.py")
    parser.add_argument("--output", help="the report, a .json file; .md goes beside it")
    parser.add_argument("--window", type=int, default=None, help="instead of the recipe's causal.window")
    parser.add_argument("--dtype", default=None, help="instead of the student's: float32 or bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each program")
    parser.add_argument("--attention", choices=BACKENDS, default="auto", help="kernel of SDPA")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--mode", default="max-autotune-no-cudagraphs", help="of torch.compile")
    parser.add_argument("--lengths", action="store_true", help="every cache length, not only the full window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    with torch.no_grad():
        if given.check:
            check()
            return
        try:
            require(given.config, "no --config is given; for example --config=configs/wan_1_3b.py")
            output = common.check_output(given.output, (".json",))
            recipe = load_recipe(given.config)
            window = recipe.causal.window if given.window is None else given.window
            recipe = dataclasses.replace(
                recipe,
                causal=dataclasses.replace(recipe.causal, window=window),
                student=dataclasses.replace(recipe.student, dtype=given.dtype or recipe.student.dtype),
            )
            require(
                recipe.causal.sink == 0 and not recipe.causal.independent_first_frame,
                "this sampler knows neither a sink nor an independent first frame; set causal.sink=0 and "
                "causal.independent_first_frame=False",
            )
            bench.Options(given.repeats)
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None
        with kernels(given.attention):
            report = measure(recipe, given, torch.device(given.device))
    text = report_format.markdown(report)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
