"""Measure seconds and peak memory of a short stream of the full-size 1.3B student, without an accelerator.

``python benchmarks/stream_full_size.py`` gives the network of ``configs/wan_1_3b.py`` random weights in the types that
sampling holds (kernels bfloat16) and random prompt embeddings of 512 tokens. It streams two blocks of three latent
frames at 64 x 64 pixels through the VAE. It prints the planned memory and the peak of the process, and fails beyond
``--limit`` GiB.
"""

import argparse
import dataclasses
import pathlib
import time
import zlib

import jax
import numpy as np

from causvid_jax.analysis import memory
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import transformer
from causvid_jax.sampling import player

GIB = 2**30
ROOT = pathlib.Path(__file__).parents[1]


def random_arrays(shapes):
    """Return random arrays of ``shapes`` on the device, made one at a time.

    Kernels keep the variance of their input. Scales are around 1, all other arrays around 0. For speed, every array is
    the same noise from another start.
    """
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def one(path, leaf):
        kind, name = path[-1].key, "/".join(str(p.key) for p in path)
        # A convolution adds up over all axes but the last; layers are stacked in front of a matrix.
        fan_in = leaf.shape[-2] if path[0].key == "blocks" else int(np.prod(leaf.shape[:-1]))
        scale, centre = {"kernel": (fan_in**-0.5, 0.0), "scale": (0.1, 1.0), "gamma": (0.1, 1.0)}.get(kind, (0.1, 0.0))
        rolled = np.roll(noise, zlib.crc32(name.encode()) % len(noise))
        return jax.device_put(np.resize((centre + scale * rolled).astype(leaf.dtype), leaf.shape))

    return jax.tree_util.tree_map_with_path(one, shapes)


def main() -> None:
    """Print the memory plan, make weights, stream and report; end with an error beyond ``--limit``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(ROOT / "configs" / "wan_1_3b.py"))
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers, for a look in less time")
    parser.add_argument("--limit", type=float, default=20.0, help="GiB")
    flags = parser.parse_args()
    recipe = load_recipe(flags.config)
    student = dataclasses.replace(recipe.student, num_layers=flags.layers or recipe.student.num_layers, attention="xla")
    video = dataclasses.replace(recipe.video, height=flags.size, width=flags.size)
    recipe = dataclasses.replace(recipe, student=student, video=video)
    k = recipe.causal.frames_per_block
    latents = k * flags.blocks
    frames = 1 + 4 * (latents - 1)
    print(
        memory.describe(memory.sampling_phases(recipe, "student", batch=1, latents=latents, prompts=0)),
        flush=True,
    )
    begin, idle = time.perf_counter(), memory.peak_rss()
    coder = memory.codec_shapes(recipe, encodes=False)
    params = random_arrays({"student": transformer.inference(recipe.student)}["student"])
    params = {"student": params, **{name: random_arrays(shapes) for name, shapes in coder.items()}}
    count = sum(leaf.size for leaf in jax.tree.leaves(params["student"]))
    print(f"{count:,} random parameters in {time.perf_counter() - begin:.0f} s", flush=True)
    text = np.random.default_rng(1).standard_normal((1, recipe.text.length, recipe.text.dim), np.float32)
    timing, clips = player.Timing(), []
    for block, clip in enumerate(player.play(params, text, config=recipe, frames=frames, timing=timing)):
        clips.append(clip)
        print(
            f"block {block}: {clip.shape[1]} frames, {timing.total:.1f} s; peak {memory.peak_rss() / GIB:.2f} GiB",
            flush=True,
        )
    video_frames = np.concatenate(clips, axis=1)
    peak = memory.peak_rss()
    print(
        f"{video_frames.shape[1]} frames of {flags.size} x {flags.size} "
        f"(standard deviation {video_frames.std():.0f} of 255): compiled in {timing.compile:.0f} s, "
        f"first block after {timing.first:.1f} s, all after {timing.total:.1f} s; "
        f"peak {peak / GIB:.2f} GiB, of which {idle / GIB:.2f} before weights"
    )
    if peak > flags.limit * GIB:
        raise SystemExit(f"more than {flags.limit:g} GiB")


if __name__ == "__main__":
    main()
