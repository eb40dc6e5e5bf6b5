"""Measure peak memory and time of converting full-size checkpoints: write random weights, convert and delete them.

``python benchmarks/convert_memory.py --size=1.3B --folder=/tmp`` writes a float32 file as Wan2.1 publishes it (5.7 GB),
converts it to our format, and reports the memory of the process above that of a dry run.
``--size=14B --dtype=bfloat16`` writes diffusers' shards (28.6 GB) and converts them in the same way. Twice the size
must be free on the disk. The limits are 4 GiB for 1.3B, and 1.5 times the largest shard plus 2 GiB for 14B.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints.safetensors_io import write_safetensors
from causvid_jax.checkpoints.save import SHARD_BYTES
from causvid_jax.checkpoints.wan_transformer import NETWORK
from causvid_jax.config import TransformerConfig

SIZES = {"1.3B": TransformerConfig(), "14B": TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)}
GIB = 2**30


def write_random(folder: pathlib.Path, config: TransformerConfig, naming: str, dtype: np.dtype) -> int:
    """Write a random transformer as shards of at most 10 GB, like diffusers; return the bytes of the largest file.

    ``naming`` is "original" or "diffusers".
    """
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(dtype)

    def pieces(name: str):
        # Each tensor is another slice of the same noise, which is fast and random enough.
        start, left = hash(name) % len(noise), int(np.prod(layout[name][0]))
        while left:
            piece = noise[start : start + left]
            yield piece
            start, left = 0, left - len(piece)

    layout = {name: (shape, dtype) for name, shape in NETWORK.shapes(config, naming).items()}
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, (shape, _) in sorted(layout.items()):
        room -= int(np.prod(shape)) * dtype.itemsize
        if room < 0:
            shards.append([])
            room = SHARD_BYTES - int(np.prod(shape)) * dtype.itemsize
        shards[-1].append(name)
    weight_map = {}
    for i, names in enumerate(shards):
        file = folder / f"diffusion_pytorch_model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(file, {name: layout[name] for name in names}, pieces, {"format": "pt"}, checksum=False)
        weight_map |= dict.fromkeys(names, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak(*arguments: str) -> tuple[int, float]:
    """Run ``python -m launch.convert`` with ``arguments``; return its peak resident bytes and its seconds."""
    program = (
        "import resource, runpy, sys\n"
        "try:\n    runpy.run_module('launch.convert', run_name='__main__', alter_sys=True)\n"
        "finally:\n    print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    begin = time.perf_counter()
    root = pathlib.Path(__file__).parents[1]
    process = subprocess.run([sys.executable, "-c", program, *arguments], cwd=root, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    lines = process.stdout.splitlines()
    if process.returncode:
        raise SystemExit(process.stderr)
    print("\n".join(line for line in lines if "->" in line))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return int(lines[-1].removeprefix("PEAK ")) * unit, seconds


def main() -> None:
    """Write, convert, report and delete; end with an error if the peak is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.3B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--naming", choices=("original", "diffusers"), default="original")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a look at less disk and time")
    parser.add_argument("--folder", default=None, help="where the files go for the time being")
    flags = parser.parse_args()
    config = SIZES[flags.size]
    config = dataclasses.replace(config, num_layers=flags.layers or config.num_layers)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="convert_memory_", dir=flags.folder))
    try:
        begin = time.perf_counter()
        largest = write_random(folder, config, flags.naming, jnp.dtype(flags.dtype))
        seconds_to_write = time.perf_counter() - begin
        print(
            f"wrote random {flags.size} of {config.num_layers} layers, {flags.dtype}, in {seconds_to_write:.0f} s",
            flush=True,
        )
        arguments = f"--input={folder}", f"--output={folder / 'ours.safetensors'}"
        # A dry run does everything except moving weights: imports, headers, the plan.
        idle, _ = peak(*arguments, "--dry_run")
        used, seconds = peak(*arguments)
        limit = 4 * GIB if flags.size == "1.3B" else int(1.5 * largest) + 2 * GIB
        size = (folder / "ours.safetensors").stat().st_size
        print(
            f"converted {size / 1e9:.2f} GB in {seconds:.0f} s; peak {used / 2**20:.0f} MiB, of which "
            f"{idle / 2**20:.0f} MiB without weights: {(used - idle) / 2**20:.0f} MiB above "
            f"(limit {limit / 2**20:.0f} MiB)"
        )
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"(the writer of random weights peaked at {own / 1024:.0f} MiB)")
        if used - idle > limit:
            raise SystemExit("too much")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
