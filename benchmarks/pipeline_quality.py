"""Measure the digits of a pipeline of denoising steps: ``python benchmarks/pipeline_quality.py [CLIPS] [RULE ...]``.

A loop over blocks on one device, with one cache per step and one of the write pass, makes the video of a pipeline
(docs/pipeline.md). The digits student was trained with the first rule. Prints for each rule the figures of the report
for one clip of every held-out prompt.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import causvid_jax as cv
from causvid_jax.diffusion import flow
from causvid_jax.evaluation import classifier, frame_metrics, report
from causvid_jax.models import precision
from causvid_jax.models.kv_cache import KVCache, block_slots, write_slots
from causvid_jax.sampling import schedule, stream
from causvid_jax.sampling.pipeline import StudentPipeline
from causvid_jax.training import experiment

RULES = (
    "exact", "exact, no write pass", "noisy keys", "estimates", "sent keys", "sent keys, at once",
    "sent keys, of every step",
)  # fmt: skip


def make_passes(pipe: StudentPipeline) -> tuple[Any, Any]:
    """Return jitted ``denoise(state, cache, block, x, time, level) -> (x0, cache)`` and ``send(cache, source, block)``.

    ``send`` copies the keys and values of a block from another cache, if the block is still in both.
    """
    config = pipe.config
    size = config.causal.frames_per_block

    def denoise(
        state: Any, cache: KVCache, block: jax.Array, x: jax.Array, time: jax.Array, level: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        cache = dataclasses.replace(cache, position=block * size)
        velocity, cache = stream.network_pass(pipe.params, state, cache, x, time, config)
        return precision.round_all(flow.x0_from_velocity(x, velocity, level), config.student), cache

    def send(cache: KVCache, source: KVCache, block: jax.Array) -> KVCache:
        slots = block_slots(block * size, size, config.causal)
        held = cache.frame[slots[0]] == block * size  # the ring of the digits holds whole blocks

        def copy(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(held, write_slots(old, jnp.take(new, slots, axis=1), slots, axis=1), old)

        arrays = (jax.tree.map(copy, getattr(cache, name), getattr(source, name)) for name in "kv")
        return dataclasses.replace(cache, **dict(zip("kv", arrays, strict=True)))

    return jax.jit(denoise), jax.jit(send)


def play(pipe: StudentPipeline, passes: tuple[Any, Any], rule: str, prompts: list[str], seed: int) -> jax.Array:
    """Return the latents ``[B, F, h, w, C]`` of a clip of each prompt."""
    config, (denoise, send) = pipe.config, passes
    times, sigmas = schedule.schedule(config, None)
    steps, exact = len(times), rule.startswith("exact")
    state = pipe.stream(prompts, seed=seed)
    caches = [state.cache] * (steps + 1)
    shape = (config.causal.frames_per_block, *config.latent_size, config.vae.z_dim)
    clip = []
    for number in range(len(config.causal.block_sizes(config.video.latent_frames))):
        block, x0 = jnp.int32(number), jnp.zeros((len(prompts), *shape))
        for step in range(steps):
            noise = stream.block_noise(state.seed, block, step, shape)
            x = precision.round_all(flow.add_noise(x0, noise, sigmas[step]), config.student)
            place, left = 0 if exact else step, steps - step
            sources = {
                "sent keys": {2 * left: steps},
                "sent keys, at once": {left + 1: steps},
                "sent keys, of every step": {i: step + i - 1 for i in range(2, left + 2)},
            }.get(rule, {})
            for before, source in sources.items():  # a block so many before this one, from the cache of that step
                if before <= number:
                    caches[place] = send(caches[place], caches[source], block - before)
            x0, caches[place] = denoise(state, caches[place], block, x, times[step], sigmas[step])
            if rule == "estimates":
                _, caches[place] = denoise(state, caches[place], block, x0, config.causal.context_noise, 0.0)
        if rule == "exact" or rule.startswith("sent"):
            place = 0 if exact else steps
            _, caches[place] = denoise(state, caches[place], block, x0, config.causal.context_noise, 0.0)
        clip.append(x0)
    return jnp.concatenate(clip, axis=1)


def main(clips: int, rules: list[str]) -> None:
    """Print a line for each rule: every measure with its 95 % interval over clips."""
    pipe = cv.load("digits")
    pipe = dataclasses.replace(pipe, config=dataclasses.replace(pipe.config, decoder="vae"))
    passes, reader = make_passes(pipe), classifier.load(pipe.config.data)
    prompts = report.held_out_prompts(pipe.config, clips, 0)
    first = int(report.stream_starts(pipe.config, 1)[1])
    for rule in rules or RULES:
        batches = experiment.in_batches(prompts)
        video = np.concatenate([pipe.decode(play(pipe, passes, rule, some, start)) for start, some in batches])
        scores = frame_metrics.frame_scores(reader, video, prompts, pipe.config.data, first)
        cells = [f"{name} {v['mean']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for name, v in scores.items()]
        print(f"{rule}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64, sys.argv[2:])
