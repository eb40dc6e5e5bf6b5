"""See it work: ``python -m launch.demo --config=configs/digits.py --output=demo``.

Streams a video with one change of prompt, as it is generated, and sets four-step student against teacher on a few
prompts. Writes ``stream.mp4``, ``stream.gif``, ``comparison.mp4``, ``comparison.gif`` and ``comparison.png``.
"""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from causvid_jax import media
from causvid_jax.checkpoints import workdir as stages
from causvid_jax.cli import common
from causvid_jax.config import Recipe, require
from causvid_jax.evaluation import contact_sheet
from causvid_jax.models import vae
from causvid_jax.sampling import batch, stream
from causvid_jax.text import encoder

_CONFIG = common.define_config_flag()
_OUTPUT = flags.DEFINE_string("output", "demo", "Directory for the videos and the picture.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Weights of your own training instead of those of the package.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt",
    ["a red 3 moving left", "a green 7 moving up", "a cyan 5 moving down right"],
    "Prompts to compare on; the stream starts with the first and switches to the second.",
)
_SECONDS = flags.DEFINE_float("seconds", 20.0, "Length of the stream in seconds of video.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
_UPSCALE = flags.DEFINE_integer("upscale", 4, "Size of a pixel in the files.")

Params = dict[str, Any]


def load(recipe: Recipe, workdir: str | None) -> tuple[Params, Recipe]:
    """``{"vae", "teacher", "student"}``, the tiny decoder if the recipe names it, and the recipe with the statistics of
    the VAE's latents."""
    params, measured = stages.load_decoders(recipe, workdir)
    for role, stage in (("teacher", "teacher"), ("student", "distill")):
        params[role], _ = stages.load_stage(recipe, stage, workdir)
    return params, measured


def rows_of(prompts: Sequence[str], recipe: Recipe) -> jax.Array:
    """Text rows ``[B, S, E]``."""
    return jnp.asarray(encoder.encode(encoder.open_encoder(recipe, _WORKDIR.value), prompts))


def blocks_of(params: Params, recipe: Recipe, prompts: Sequence[str], seed: int, blocks: int) -> Iterator[np.ndarray]:
    """The student's stream as uint8 ``[T, H, W, 3]`` per block; ``prompts`` share its length equally."""
    config = {"config": recipe}
    latent_frames = blocks * recipe.causal.frames_per_block
    state = stream.init_stream(params, rows_of(prompts[:1], recipe), seed=seed, frames=latent_frames, **config)
    for i in range(blocks):
        turn = i * len(prompts) // blocks
        if i and turn != (i - 1) * len(prompts) // blocks:
            state = stream.change_prompt(params, state, rows_of(prompts[turn : turn + 1], recipe), **config)
        _, frames, state = stream.next_frames(params, state, **config)
        yield media.to_uint8(frames)[0, stream.LEAD if i == 0 else 0 :]


def show_stream(params: Params, recipe: Recipe, prompts: Sequence[str], blocks: int, output: pathlib.Path) -> None:
    """Write the stream while it is generated, and print how fast it is."""
    print(f"Streaming {blocks} blocks: {' -> '.join(map(repr, prompts))}", flush=True)
    start, times, frames = time.perf_counter(), [], 0
    with contextlib.ExitStack() as files:
        out = [
            files.enter_context(media.VideoWriter(output / f"stream{suffix}", recipe.video.fps, _UPSCALE.value))
            for suffix in media.SUFFIXES
        ]
        for part in blocks_of(params, recipe, prompts, _SEED.value, blocks):
            times.append(time.perf_counter() - start)
            frames += len(part)
            for file in out:
                file.append(part)
    # The first block compiles; a change of prompt compiles once too, so the median block tells the speed.
    speed = len(part) / float(np.median(np.diff(times)))
    print(
        f"  {frames} frames, the first block after {times[0]:.1f} s (with compilation), then {speed:.0f} frames/s: "
        f"{speed / recipe.video.fps:.1f} times real time ({recipe.video.fps:g} frames/s)",
        flush=True,
    )


def compare(params: Params, recipe: Recipe, prompts: Sequence[str], output: pathlib.Path) -> None:
    """Teacher above student: the same prompts, one clip each, timed without compilation."""
    null = jnp.asarray(encoder.null_rows(encoder.open_encoder(recipe, _WORKDIR.value)))
    decode = jax.jit(vae.decode, static_argnames=("config",))
    blocks = len(recipe.causal.block_sizes(recipe.video.latent_frames))

    def teacher(prompt: str, seed: int) -> np.ndarray:
        latents = batch.teacher_latents(
            params["teacher"], rows_of([prompt], recipe), null, jnp.asarray([seed], jnp.uint32), config=recipe
        )
        return media.to_uint8(decode(params["vae"], latents, config=recipe.vae))[0]

    def student(prompt: str, seed: int) -> np.ndarray:
        return np.concatenate(list(blocks_of(params, recipe, [prompt], seed, blocks)))

    clips, seconds = {}, {}
    for name, sample in (("teacher", teacher), ("student", student)):
        print(f"{name.capitalize()}: {len(prompts)} clips of {recipe.video.frames} frames", flush=True)
        sample(prompts[0], 0)
        start = time.perf_counter()
        clips[name] = list(prompts), np.stack([sample(p, _SEED.value + i) for i, p in enumerate(prompts)])
        seconds[name] = (time.perf_counter() - start) / len(prompts)
        print(f"  {seconds[name]:.2f} s per clip", flush=True)
    print(f"The student takes {seconds['teacher'] / seconds['student']:.1f} times less time.", flush=True)
    sheet = contact_sheet.contact_sheet(clips, examples=len(prompts), columns=7)
    sheet.save(output / "comparison.png")
    grid = np.concatenate([np.concatenate(list(clips[name][1]), axis=2) for name in clips], axis=1)
    for suffix in media.SUFFIXES:
        media.write_video(output / f"comparison{suffix}", grid, recipe.video.fps, _UPSCALE.value)


def main() -> None:
    """Check everything, then stream, then compare."""
    start = time.perf_counter()
    recipe = common.load_recipe(_CONFIG)
    prompts, output = _PROMPT.value, pathlib.Path(_OUTPUT.value)
    require(_SECONDS.value > 0, f"--seconds is {_SECONDS.value:g}; it must be positive")
    rows_of(prompts, recipe)
    for suffix in media.SUFFIXES:
        media.check_output(output / f"stream{suffix}")
    params, recipe = load(recipe, _WORKDIR.value)
    common.enable_compilation_cache()
    per_block = recipe.causal.frames_per_block * vae.time_factor(recipe.vae)
    blocks = max(2, round(_SECONDS.value * recipe.video.fps / per_block))
    show_stream(params, recipe, prompts[:2], blocks, output)
    compare(params, recipe, prompts, output)
    print(f"Wrote {', '.join(sorted(p.name for p in output.iterdir() if p.is_file()))} to {output}/", flush=True)
    print(f"All in {time.perf_counter() - start:.0f} s.")
