"""Samplers of prompts: the recipe's VAE, teacher and student as functions from prompts to uint8 clips.

The VAE decodes the teacher's clips; the decoder that the recipe names decodes the student's streams.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import media as files
from causvid_jax.config import Recipe, require
from causvid_jax.models import taehv, transformer, vae
from causvid_jax.sampling import blocks, stream, weights
from causvid_jax.sampling.protocols import Samplers, Switch
from causvid_jax.sampling.teacher import sample_clip
from causvid_jax.text import encoder

_encode = jax.jit(vae.encode, static_argnames=("config",))
_DECODE = {name: jax.jit(model.decode, static_argnames=("config",)) for name, model in (("vae", vae), ("taehv", taehv))}


def make_samplers(
    params: Mapping[str, Any],
    config: Recipe,
    *,
    prompt_encoder: encoder.Encoder | None = None,
) -> Samplers:
    """Return the samplers of trained networks.

    Args:
        params: ``{"vae", "student"}``, ``"teacher"`` if there is one, ``"taehv"`` if that is the recipe's decoder.
        config: the recipe, with the statistics of the VAE's latents.
        prompt_encoder: the text encoder; None opens that of the recipe.

    Returns:
        Samplers of uint8 clips. Clip b of seed s has the noise of seed s + b. They raise ConfigError for a length that
        is no whole number of blocks, a prompt switch inside a block, or frames that are not finite.
    """
    reader = prompt_encoder or encoder.open_encoder(config)
    if "teacher" in params:
        params = {**params, "teacher": transformer.round_params(params["teacher"], config.teacher)}
    streamed = weights.for_stream({name: params[name] for name in ("student", config.decoder)}, config)
    negative_embeds = jnp.asarray(encoder.negative_prompt_embeds(reader))

    def embeds_of(prompts: Sequence[str]) -> jax.Array:
        return jnp.asarray(encoder.encode(reader, prompts))

    def pixels(latents: jax.Array, name: str = "vae") -> np.ndarray:
        return files.to_uint8(_DECODE[name](params[name], latents, config=getattr(config, name)))

    def reconstruct(video: np.ndarray, name: str = "vae") -> np.ndarray:
        return pixels(_encode(params["vae"], jnp.asarray(files.to_float(video)), config=config.vae), name)

    def teacher(prompts: Sequence[str], seed: int, *, decode: bool = True) -> np.ndarray:
        seeds = stream.seeds_of(seed, len(prompts))
        latents = sample_clip(params["teacher"], embeds_of(prompts), negative_embeds, seeds=seeds, config=config)
        if not decode:
            return np.asarray(latents)
        return pixels(latents)

    def student(
        prompts: Sequence[str], seed: int, *, frames: int, switch: Switch | None = None, decode: bool = True
    ) -> np.ndarray:
        factor = vae.time_factor(config.vae)
        require(
            frames % factor == 1 % factor, f"a stream of {frames} frames is asked for; accepted: 1 + {factor} n frames"
        )
        latent_frames = 1 + (frames - 1) // factor
        if switch is None:
            latents, video = stream.generate(
                streamed, embeds_of(prompts), config=config, frames=latent_frames, seed=seed, decode=decode
            )
            return np.asarray(latents) if video is None else files.to_uint8(video)
        require(decode, "a stream with a prompt switch is always decoded")
        at, after = switch
        state = stream.init_stream(streamed, embeds_of(prompts), config=config, seed=seed, frames=latent_frames)
        return _switched(streamed, state, config, latent_frames, at, embeds_of(after))

    tiny = functools.partial(reconstruct, name="taehv") if config.decoder == "taehv" else None
    teacher_or_none = teacher if "teacher" in params else None
    return Samplers(reconstruct=reconstruct, teacher=teacher_or_none, student=student, reconstruct_tiny=tiny)


def _switched(
    params: Mapping[str, Any], state: stream.StreamState, config: Recipe, latent_frames: int, at: int, after: jax.Array
) -> np.ndarray:
    """Return the frames uint8 ``[B, T, H, W, 3]`` of a stream whose prompt changes at the block that begins at ``at``.

    Raises:
        ConfigError: no block begins at frame ``at``.
    """
    networks, parts = dict(params), list[np.ndarray]()
    sizes = config.causal.block_sizes(latent_frames)
    starts = [blocks.first_frame(block, config) for block in range(len(sizes))]
    require(at in starts, f"the prompt changes at frame {at}; blocks begin at {', '.join(map(str, starts))}")
    for start in starts:
        if start == at:
            state = stream.change_prompt(networks, state, after, config=config)
        _, frames, state = stream.next_frames(networks, state, config=config)
        parts.append(files.to_uint8(frames)[:, 0 if parts else stream.LEAD :])
    return np.concatenate(parts, axis=1)
