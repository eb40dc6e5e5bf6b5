"""Datasets that networks make: latents, ODE trajectories, streams and embedded prompts.

The VAE makes latents of clips, the teacher makes ODE trajectories, the student makes streams. All datasets are written
chunk by chunk and resume after an interruption (:mod:`causvid_jax.data.arrays`). An example depends only on its index.
Another number of examples, devices or interruptions changes it only by rounding.

In all functions ``folder`` is the folder of the dataset, ``chunk`` the number of examples per shard, and ``options``
are ``process_id``, ``process_count`` and ``progress`` of :func:`arrays.write_dataset`. They return whether the dataset
is finished, and raise a ConfigError if the folder holds a dataset of another identity.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from causvid_jax.config import Recipe, to_json
from causvid_jax.data import arrays, captions, pictures, pipeline, trajectories
from causvid_jax.data.devices import over_local_devices
from causvid_jax.data.identity import teacher_identity, weights_digest
from causvid_jax.media import to_float, to_uint8
from causvid_jax.models import vae
from causvid_jax.sampling import stream, weights
from causvid_jax.text import encoder

CLIPS_AT_ONCE = 8
"""Clips per device and call of the VAE."""
STREAMS_AT_ONCE = 16
"""Trajectories per device and call, or streams per call."""


def generate(
    folder: str | os.PathLike,
    name: str,
    count: int,
    make_batch: Callable[[range], Iterable[dict[str, Any]]],
    features: tfds.features.FeaturesDict,
    *,
    identity: dict[str, Any],
    chunk: int,
    batch: int,
    **options: Any,
) -> bool:
    """Write a dataset of ``count`` examples that are computed in batches; resume where it was interrupted.

    Args:
        folder, chunk, options: see above.
        name: name of the dataset.
        count: number of examples, or of streams of several examples.
        make_batch: returns the examples of up to ``batch`` numbers; they must depend on the numbers alone.
        features: features of one example.
        identity: as in :func:`arrays.write_dataset`; ``count`` is added.
        batch: examples per call of ``make_batch``.
    """

    def make_chunk(index: int) -> Iterator[dict[str, Any]]:
        stop = min((index + 1) * chunk, count)
        for start in range(index * chunk, stop, batch):
            yield from make_batch(range(start, min(start + batch, stop)))

    return arrays.write_dataset(
        folder,
        name=name,
        features=features,
        chunks=math.ceil(count / chunk),
        make_chunk=make_chunk,
        identity={"count": count, **identity},
        **options,
    )


def write_latents(
    folder: str | os.PathLike,
    source: pipeline.Source,
    clip_encoder: pictures.ClipEncoder,
    *,
    clips: str,
    count: int = 0,
    chunk: int = 256,
    batch: int = CLIPS_AT_ONCE,
    prompt_encoder: encoder.Encoder | None = None,
    **options: Any,
) -> bool:
    """Encode the first ``count`` clips (0: all) to ``latents`` float16 [F, h, w, C] with their ``caption``.

    Args:
        folder, chunk, options: see above.
        source: examples with ``video`` uint8 [T, H, W, 3] and ``caption``.
        clip_encoder: encodes the clips; its VAE's ``latent_mean`` and ``latent_std`` normalise the stored latents.
        clips: name of the dataset that ``source`` reads, part of the identity.
        count: number of clips.
        batch: clips per device and call.
        prompt_encoder: stores the embeddings of the captions as ``text`` too; None: training encodes the captions.
    """
    count = min(count or len(source), len(source))
    encode, params = clip_encoder.encode, clip_encoder.params
    one = jax.ShapeDtypeStruct((1, *source[0]["video"].shape), jnp.float32)
    shapes: dict[str, Any] = {name: x.shape[1:] for name, x in jax.eval_shape(encode, params, one).items()}
    run, size = over_local_devices(encode, params, batch, chunk)
    if prompt_encoder:
        shapes["text"] = (None, prompt_encoder.config.dim)

    def make_batch(numbers: range) -> Iterator[dict[str, Any]]:
        examples = [source[i] for i in numbers]
        video = to_float(np.stack([e["video"] for e in examples]))
        captions_of = [pipeline.as_text(e["caption"]) for e in examples]
        embeds = encoder.encode(prompt_encoder, captions_of) if prompt_encoder else [None] * len(examples)
        arrays_of = run(video)
        for i, (caption, text_of) in enumerate(zip(captions_of, embeds, strict=True)):
            text = {} if text_of is None else {"text": arrays.trim_text(text_of)}
            yield {name: x[i].astype(np.float16) for name, x in arrays_of.items()} | {"caption": caption, **text}

    return generate(
        folder,
        "latents",
        count,
        make_batch,
        arrays.array_features(**shapes),
        chunk=chunk,
        batch=size,
        identity={"clips": clips, **clip_encoder.identity()},
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
    batch: int = STREAMS_AT_ONCE,
    prompt_encoder: encoder.Encoder | None = None,
    clips: pipeline.Source | None = None,
    **options: Any,
) -> bool:
    """Run the teacher's guided ODE once per prompt and store its states at the student's timesteps.

    An example is ``trajectory`` float16 [Q + 1, F, h, w, C] and ``caption``. State q < Q is the teacher's at
    ``flow.student_timesteps(...)[q]`` (0 to 1000), the last one is its x0. Source: CausVid, section 4.3.

    Args:
        folder, chunk, options: see above.
        params: parameters of the teacher, or of its two experts by name.
        recipe: its networks and its diffusion are used.
        prompts: one per trajectory.
        seed: seed of the noise; trajectory i starts from ``normal(fold_in(key(seed), i))``.
        batch: trajectories per device and call.
        prompt_encoder: encoder of the prompts; a recipe of words needs none.
        clips: examples with the pictures of a recipe with image branches; trajectory i has the picture of clip i modulo
            their number.
    """
    shape, diffusion, key = recipe.latent_shape, recipe.trajectory_diffusion, jax.random.key(seed)
    reader = prompt_encoder or encoder.open_encoder(recipe)
    negative = jnp.asarray(encoder.negative_prompt_embeds(reader))
    # Store the embeddings of a network; word embeddings are cheap to compute.
    embedded = recipe.text.kind != "words"

    states_of = functools.partial(trajectories.bidirectional_states, recipe=recipe, key=key, negative=negative)
    run, size = over_local_devices(states_of, params, batch, chunk)

    shapes: dict[str, Any] = {"trajectory": (len(diffusion.denoising_timesteps) + 1, *shape), **pictures.shapes(recipe)}
    if embedded:
        shapes["text"] = (None, recipe.text.dim)

    def make_batch(numbers: range) -> Iterator[dict[str, Any]]:
        batch_prompts = [prompts[i] for i in numbers]
        embeds = encoder.encode(reader, batch_prompts)
        batch_pictures = pictures.of_numbers(clips, numbers, recipe)
        states = run(np.asarray(numbers, np.uint32), embeds, *pictures.stacked(batch_pictures))
        for prompt, trajectory, row, picture in zip(batch_prompts, states, embeds, batch_pictures, strict=True):
            text = {"text": arrays.trim_text(row)} if embedded else {}
            yield {"trajectory": trajectory.astype(np.float16), "caption": prompt, **text, **pictures.half(picture)}

    return generate(
        folder,
        "trajectories",
        len(prompts),
        make_batch,
        arrays.array_features(**shapes),
        chunk=chunk,
        batch=size,
        identity={
            "prompts": captions.digest(prompts),
            "seed": seed,
            **teacher_identity(params, recipe),
            "diffusion": to_json(diffusion),
            "text": to_json(recipe.text),
        },
        **options,
    )


def write_causal_trajectories(
    folder: str | os.PathLike,
    params: dict[str, Any],
    recipe: Recipe,
    clips: pipeline.Source,
    *,
    count: int,
    identity: str,
    frames: int = 0,
    seed: int = 0,
    chunk: int = 64,
    batch: int = STREAMS_AT_ONCE,
    prompt_encoder: encoder.Encoder | None = None,
    **options: Any,
) -> bool:
    """Run the causal teacher's guided ODE on every block of ``count`` clips, each block given its clean past.

    All blocks are denoised in one pass. The teacher-forcing mask hides each block's noise from the others. With
    probability ``train_init.prompt_switch_prob`` a clip has the past of the next clip (``ode_regression.splice``). An
    example is ``trajectory`` as in :func:`write_trajectories`, ``context`` float16 [F, h, w, C], the past that each
    block read (with the noise of ``causal.add_context_noise``), and ``caption``. Source: Causal Forcing, arXiv
    2602.02214.

    Args:
        folder, chunk, options: see above.
        params: parameters of the causal teacher.
        recipe: its networks, blocks and diffusion are used.
        clips: examples with ``latents`` and ``caption``; trajectory i uses clip i modulo their number.
        count: number of trajectories.
        identity: identifies these clips, a digest or a name.
        frames: number of latent frames of every clip, from its first one on; 0: all.
        seed: seed of :func:`trajectories.causal_key`.
        batch, prompt_encoder: as in :func:`write_trajectories`.
    """
    whole, diffusion, key = recipe.latent_shape, recipe.trajectory_diffusion, trajectories.causal_key(seed, frames)
    shape = (frames or whole[0], *whole[1:])
    reader = prompt_encoder or encoder.open_encoder(recipe)
    negative = jnp.asarray(encoder.negative_prompt_embeds(reader))
    states_of = functools.partial(trajectories.causal_states, recipe=recipe, key=key, negative=negative)
    run, size = over_local_devices(states_of, params, batch, chunk)
    shapes = {"trajectory": (len(diffusion.denoising_timesteps) + 1, *shape), "context": shape}
    shapes |= pictures.shapes(recipe, shape[0])

    def latents(numbers: Iterable[int]) -> np.ndarray:
        return np.stack([clips[i % len(clips)]["latents"][: shape[0]] for i in numbers]).astype(np.float32)

    def make_batch(numbers: range) -> Iterator[dict[str, Any]]:
        batch_captions = [pipeline.as_text(clips[i % len(clips)]["caption"]) for i in numbers]
        batch_pictures = pictures.of_numbers(clips, numbers, recipe, shape[0])
        states = run(
            np.asarray(numbers, np.uint32),
            encoder.encode(reader, batch_captions),
            latents(numbers),
            latents(i + 1 for i in numbers),
            *pictures.stacked(batch_pictures),
        )
        for caption, state, picture in zip(batch_captions, states.astype(np.float16), batch_pictures, strict=True):
            yield {"trajectory": state[:-1], "context": state[-1], "caption": caption, **pictures.half(picture)}

    return generate(
        folder,
        "causal_trajectories",
        count,
        make_batch,
        arrays.array_features(None, **shapes),
        chunk=chunk,
        batch=size,
        identity={
            "frames": shape[0],
            "clips": identity,
            "seed": seed,
            "dtype": recipe.teacher.dtype,
            "teacher": weights_digest(params),
            "diffusion": to_json(diffusion),
            "causal": to_json(recipe.causal),
            "prompt_switch_prob": recipe.train_init.prompt_switch_prob,
            "text": to_json(recipe.text),
            **({} if recipe.causal.add_context_noise == "never" else {"context": "with noise"}),
        },
        **options,
    )


def write_streams(
    folder: str | os.PathLike,
    params: dict[str, Any],
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    clips: int,
    seed: int = 0,
    chunk: int = 32,
    batch: int = STREAMS_AT_ONCE,
    prompt_encoder: encoder.Encoder | None = None,
    **options: Any,
) -> bool:
    """Stream ``clips`` clips of the student for every prompt and split each stream into clips, decoded by the VAE.

    An example is one clip: ``latents`` float16 [F, h, w, C], ``video`` uint8 [T, H, W, 3] and ``caption``. The clips of
    a stream follow each other. Clip k starts at latent frame k F. Except in the first clip, the first three pixel
    frames of its first latent frame are left out, because a decoder that starts with this clip does not decode them.

    Args:
        folder, options: see above.
        params: ``{"student", "vae"}``.
        recipe: its networks, blocks and diffusion are used.
        prompts: one per stream; stream i has the seed ``seed + i``.
        clips: number of clips of a stream.
        seed: seed of the first stream.
        chunk: streams per shard.
        batch: streams per call.
        prompt_encoder: encoder of the prompts; a recipe of words needs none.

    Raises:
        ConfigError: ``clips`` clips are not a whole number of blocks.
    """
    recipe = dataclasses.replace(recipe, decoder="vae")
    length, frames_per_clip, factor = recipe.video.latent_frames, recipe.video.frames, vae.time_factor(recipe.vae)
    recipe.causal.block_sizes(clips * length)  # refuses an impossible number of clips
    reader, batch = prompt_encoder or encoder.open_encoder(recipe), min(batch, chunk)
    streamed = weights.for_stream(jax.tree.map(jnp.asarray, params), recipe)

    def run(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        # Pad a short last batch, so that there is one batch size and one compilation.
        full = [*numbers, *([numbers[-1]] * (batch - len(numbers)))]
        embeds = jnp.asarray(encoder.encode(reader, [prompts[i] for i in full]))
        return _stream(streamed, embeds, recipe, [seed + i for i in full], clips * length)

    def make_batch(numbers: range) -> Iterator[dict[str, Any]]:
        for number, latents, video in zip(numbers, *run(numbers), strict=False):
            for first in range(0, clips * length, length):
                start = factor * first
                yield {
                    "latents": latents[first : first + length].astype(np.float16),
                    "video": video[start : start + frames_per_clip],
                    "caption": prompts[number],
                }

    shape = (frames_per_clip, recipe.video.height, recipe.video.width, 3)
    pixels = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib")
    return generate(
        folder,
        "streams",
        len(prompts),
        make_batch,
        arrays.array_features({"video": pixels}, latents=recipe.latent_shape),
        chunk=chunk,
        batch=batch,
        identity={
            "clips": clips,
            "prompts": captions.digest(prompts),
            "seed": seed,
            "dtype": recipe.student.dtype,
            "student": weights_digest(params["student"]),
            "vae": weights_digest(params["vae"]),
            "causal": to_json(recipe.causal),
            "diffusion": to_json(recipe.diffusion),
        },
        **options,
    )


def _stream(
    params: dict[str, Any], embeds: jax.Array, recipe: Recipe, seeds: Sequence[int], frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents float32 [B, frames, h, w, C] of streams and their video uint8, without the padding frames."""
    state = stream.init_stream(params, embeds, config=recipe, seed=seeds, frames=frames)
    parts = []
    for _ in recipe.causal.block_sizes(frames):
        latents, decoded, state = stream.next_frames(params, state, config=recipe)
        parts.append((np.asarray(latents), to_uint8(decoded)))
    latents, video = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return latents, video[:, stream.LEAD :]


def write_prompts(
    folder: str | os.PathLike,
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    chunk: int = 1024,
    batch: int = 64,
    prompt_encoder: encoder.Encoder | None = None,
    **options: Any,
) -> bool:
    """Embed ``prompts`` for training that needs no video: ``text`` float16 [tokens, dim] and ``caption``.

    Args:
        folder, chunk, options: see above.
        recipe: its text encoder is used.
        prompts: one per example.
        batch: prompts per call of the encoder.
        prompt_encoder: encoder of the prompts; a recipe of words needs none.
    """

    reader = prompt_encoder or encoder.open_encoder(recipe)

    def make_batch(numbers: range) -> Iterator[dict[str, Any]]:
        batch_prompts = [prompts[i] for i in numbers]
        for prompt, row in zip(batch_prompts, encoder.encode(reader, batch_prompts), strict=True):
            yield {"text": arrays.trim_text(row), "caption": prompt}

    return generate(
        folder,
        "prompts",
        len(prompts),
        make_batch,
        arrays.array_features(text=(None, recipe.text.dim)),
        chunk=chunk,
        batch=batch,
        identity={"prompts": captions.digest(prompts), "text": to_json(recipe.text)},
        **options,
    )


def prompt_sequence(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """Return ``count`` prompts: all of ``captions`` in a random order, then all in another order, and so on.

    A larger ``count`` only appends.
    """
    rounds = math.ceil(count / len(captions))
    orders = [np.random.default_rng([seed, r]).permutation(len(captions)) for r in range(rounds)]
    return [captions[i] for order in orders for i in order][:count]
