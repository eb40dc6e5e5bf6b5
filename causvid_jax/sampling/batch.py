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
from causvid_jax.sampling import blocks, pipeline, stream, weights
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
    pipe = pipeline.StudentPipeline(config, streamed, reader)
    negative_embeds = jnp.asarray(encoder.negative_prompt_embeds(reader))

    def pixels(latents: jax.Array, name: str = "vae") -> np.ndarray:
        return files.to_uint8(_DECODE[name](params[name], latents, config=getattr(config, name)))

    def reconstruct(video: np.ndarray, name: str = "vae") -> np.ndarray:
        return pixels(_encode(params["vae"], jnp.asarray(files.to_float(video)), config=config.vae), name)

    def teacher(prompts: Sequence[str], seed: int, *, decode: bool = True) -> np.ndarray:
        seeds = stream.seeds_of(seed, len(prompts))
        embeds = pipe.encode_prompt(prompts)
        latents = sample_clip(params["teacher"], embeds, negative_embeds, seeds=seeds, config=config)
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
                streamed, pipe.encode_prompt(prompts), config=config, frames=latent_frames, seed=seed, decode=decode
            )
            return np.asarray(latents) if video is None else files.to_uint8(video)
        require(decode, "a stream with a prompt switch is always decoded")
        at, after = switch
        starts = [blocks.first_frame(i, config) for i in range(len(config.causal.block_sizes(latent_frames)))]
        require(at in starts, f"the prompt changes at frame {at}; blocks begin at {', '.join(map(str, starts))}")
        state, parts = pipe.stream(prompts, seed=seed, frames=latent_frames), []
        for start in starts:
            state = pipe.switch(state, after) if start == at else state
            part, state = next(pipe.frames(state))
            parts.append(part)
        return np.concatenate(parts, axis=1)

    tiny = functools.partial(reconstruct, name="taehv") if config.decoder == "taehv" else None
    teacher_or_none = teacher if "teacher" in params else None
    return Samplers(reconstruct=reconstruct, teacher=teacher_or_none, student=student, reconstruct_tiny=tiny)
