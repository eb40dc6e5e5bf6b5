"""Datasets that networks make: latents of the clips (by the VAE) and ODE trajectories (by the teacher).

Both are written chunk by chunk and resume (:mod:`causvid_jax.data.arrays`). An example depends on its index alone: how
many are made, on how many devices and after how many interruptions changes nothing but rounding.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from causvid_jax.config import Recipe, VAEConfig, to_json
from causvid_jax.data import arrays, encoder, pipeline
from causvid_jax.diffusion.guidance import guided_velocity
from causvid_jax.distill.trajectories import teacher_trajectory
from causvid_jax.models import transformer, vae
from causvid_jax.weights import store


def weights_digest(params: dict[str, Any]) -> str:
    """A short digest of a parameter tree, for a dataset's identity."""
    return store.checksum(store.flatten(params), {})[:16]


def latent_shape(recipe: Recipe) -> tuple[int, int, int, int]:
    """``(F, h, w, C)`` of the recipe's clips."""
    factor = vae.space_factor(recipe.vae)
    video = recipe.video
    return video.latent_frames, video.height // factor, video.width // factor, recipe.vae.z_dim


def write_latents(
    folder: str | os.PathLike,
    source: pipeline.Source,
    params: dict[str, Any],
    config: VAEConfig,
    *,
    clips: str,
    count: int = 0,
    chunk: int = 256,
    batch: int = 8,
    **options,
) -> bool:
    """Encode the first ``count`` clips (0: all) to ``latents`` float16 [F, h, w, C] with their ``caption``.

    Args:
        folder: of the dataset.
        source: examples with ``video`` uint8 [T, H, W, 3] and ``caption``.
        params: of the VAE.
        config: of the VAE; its ``latent_mean`` and ``latent_std`` normalise what is stored.
        clips: names the dataset ``source`` reads, so that latents of other clips are told apart.
        count: how many clips.
        chunk: clips per shard.
        batch: clips per device and call.
        options: ``process_id``, ``process_count``, ``progress`` of :func:`arrays.write_dataset`.

    Returns:
        whether the dataset is finished.
    """
    count = min(count or len(source), len(source))
    encode = functools.partial(vae.encode, config=config)
    one = jax.ShapeDtypeStruct((1, *source[0]["video"].shape), jnp.float32)
    shape = jax.eval_shape(encode, params, one).shape[1:]
    run, size = _over_local_devices(encode, params, batch, chunk)

    def make_chunk(index: int) -> Iterator[dict[str, Any]]:
        for numbers in _groups(index, chunk, size, count):
            examples = [source[i] for i in numbers]
            video = pipeline.to_float(np.stack([e["video"] for e in examples]))
            for example, latents in zip(examples, run(video), strict=True):
                yield {"latents": latents.astype(np.float16), "caption": example["caption"]}

    return arrays.write_dataset(
        folder,
        name="latents",
        features=arrays.array_features("latents", shape),
        chunks=math.ceil(count / chunk),
        make_chunk=make_chunk,
        identity={"clips": clips, "count": count, "vae": weights_digest(params), "config": to_json(config)},
        **options,
    )


def write_trajectories(
    folder: str | os.PathLike,
    params: dict[str, Any],
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    chunk: int = 64,
    batch: int = 16,
    prompt_encoder: encoder.Encoder | None = None,
    **options,
) -> bool:
    """Run the teacher's guided ODE once per prompt and keep its states at the student's timesteps.

    Args:
        folder: of the dataset; examples are ``trajectory`` float16 [Q + 1, F, h, w, C] (state q at
            ``flow.student_timesteps(...)[q]``, the last one clean) and ``caption``.
        params: of the teacher.
        recipe: its networks and its diffusion.
        prompts: one per trajectory.
        seed: of the noise; trajectory i starts from ``fold_in(key(seed), i)``.
        chunk: trajectories per shard.
        batch: trajectories per device and call.
        prompt_encoder: of the prompts; a recipe of words needs none.
        options: ``process_id``, ``process_count``, ``progress`` of :func:`arrays.write_dataset`.

    Returns:
        whether the dataset is finished.
    """
    shape, diffusion, key = latent_shape(recipe), recipe.diffusion, jax.random.key(seed)
    reader = prompt_encoder or encoder.open_encoder(recipe)
    null = jnp.asarray(encoder.null_rows(reader))

    def trajectories(p, numbers, rows):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(numbers)
        network = functools.partial(transformer.bidirectional, p, config=recipe.teacher)
        states = teacher_trajectory(
            lambda x, timestep: guided_velocity(network, x, timestep, rows, null, diffusion.guidance), noise, diffusion
        )
        return rearrange(states, "q b ... -> b q ...")

    run, size = _over_local_devices(trajectories, params, batch, chunk)

    def make_chunk(index: int) -> Iterator[dict[str, Any]]:
        for numbers in _groups(index, chunk, size, len(prompts)):
            chosen = [prompts[i] for i in numbers]
            states = run(np.asarray(numbers, np.uint32), encoder.encode(reader, chosen))
            for prompt, trajectory in zip(chosen, states, strict=True):
                yield {"trajectory": trajectory.astype(np.float16), "caption": prompt}

    return arrays.write_dataset(
        folder,
        name="trajectories",
        features=arrays.array_features("trajectory", (len(diffusion.student_steps) + 1, *shape)),
        chunks=math.ceil(len(prompts) / chunk),
        make_chunk=make_chunk,
        identity={
            "count": len(prompts),
            "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
            "seed": seed,
            "teacher": weights_digest(params),
            "diffusion": to_json(diffusion),
        },
        **options,
    )


def prompt_sequence(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` prompts that run through ``captions`` in a new random order each time; a longer list only adds."""
    rounds = math.ceil(count / len(captions))
    orders = [np.random.default_rng([seed, r]).permutation(len(captions)) for r in range(rounds)]
    return [captions[i] for order in orders for i in order][:count]


def _groups(index: int, chunk: int, size: int, count: int) -> Iterator[range]:
    """The example numbers of a chunk, ``size`` at a time."""
    stop = min((index + 1) * chunk, count)
    for start in range(index * chunk, stop, size):
        yield range(start, min(start + size, stop))


def _over_local_devices(function: Callable, params: dict[str, Any], batch: int, chunk: int) -> tuple[Callable, int]:
    """``function(params, *inputs)`` jitted for one shape, with its inputs split over this process's devices.

    Returns:
        (call, size): ``call(*inputs)`` takes up to ``size`` examples along axis 0 (about ``batch`` per device, not
        many more than ``chunk`` in all) and returns as many, as a numpy array.
    """
    devices = jax.local_devices()
    size = len(devices) * max(1, min(batch, chunk // len(devices)))
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(function, out_shardings=split)
    params = jax.device_put(params, whole)

    def call(*inputs: np.ndarray) -> np.ndarray:
        count = len(inputs[0])
        padded = [np.concatenate([x, np.repeat(x[:1], size - count, axis=0)]) for x in inputs]
        return np.asarray(compiled(params, *jax.device_put(padded, split)))[:count]

    return call, size
