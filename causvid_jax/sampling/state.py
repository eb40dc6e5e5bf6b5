"""The state of a stream between two blocks, as a pytree of constant size."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import Recipe, require
from causvid_jax.models import adapters, decoder, transformer
from causvid_jax.models.decoder import DecodeCache
from causvid_jax.models.image_branch import Picture, check_picture
from causvid_jax.models.kv_cache import TEXT_AXES, KVCache, TextCache
from causvid_jax.models.unstacked import is_unstacked
from causvid_jax.sampling import schedule
from causvid_jax.sharding import constraints

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """The state of B streams between two blocks, which the next block reads. Its size never changes.

    It is a pytree: functions of :mod:`causvid_jax.sampling.stream` take it and return the next one, and
    :func:`~causvid_jax.sampling.state_io.save_stream` writes it to a file.
    """

    cache: KVCache  # self-attention keys and values of the frames in the window and the sink
    text: TextCache  # the prompt
    decode: DecodeCache  # the decoder's past
    recent: jax.Array  # [B, R, h, w, C] float32, the last latent frames, newest at the end, for recompute_context()
    seed: jax.Array  # [B] uint32
    block: jax.Array  # [] int32: blocks finished
    adapters: "Adapters | None" = None  # strengths of LoRAs, if the student has any
    picture: Picture | None = None  # what the video starts from, if the student has an image branch
    started: bool = dataclasses.field(default=True, metadata={"static": True})  # False: an independent frame is next


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """The strengths of a stream's LoRAs, and the prompt, whose keys and values depend on them."""

    scale: jax.Array  # [r] float32: one factor per column of the adapters (models.adapters)
    prompt_embeds: jax.Array  # [B, S, E]


def block_frames(state: StreamState, config: Recipe) -> int:
    """Return the number of latent frames of the next block: K, or 1 for an independent first frame."""
    return config.causal.frames_per_block if state.started else 1


def init_stream(
    params: Params,
    text: jax.Array,
    *,
    config: Recipe,
    seed: int | Sequence[int] = 0,
    frames: int | None = None,
    picture: Picture | None = None,
) -> StreamState:
    """Return the state before the first block.

    Args:
        params: ``{"student"}`` is read.
        text: prompt embeddings ``[B, S, E]`` of B parallel streams.
        seed: of the noise: one integer s, or B integers, modulo 2^32. With one s, stream b has seed s + b and equals a
            single stream of that seed.
        frames: maximum latent frames of the stream; None: those of the recipe's clip. Only a recipe without
            ``causal.window`` needs it; with a window a stream has no maximum.
        picture: of a student with an image branch, which generates the first block too.

    Returns:
        The state, with an empty cache and the prompt's keys and values.

    Raises:
        ConfigError: embeddings of another shape than the recipe's, not as many seeds as prompts, a picture for a
            student without an image branch, or none for one with it.
    """
    check_picture(picture, config.student, "student")
    seeds = seeds_of(seed, text.shape[0])
    return first_state(params, text, seeds, config=config, capacity=capacity_of(config, frames), picture=picture)


def check_text(text: jax.Array, config: Recipe) -> None:
    """Refuse prompt embeddings that are not ``[B, S, E]`` of the recipe: fewer tokens would leave out padding."""
    size = config.text.length, config.text.dim
    require(
        text.ndim == 3 and len(text) > 0 and text.shape[1:] == size,
        f"the prompt embeddings have shape {text.shape}; accepted: [B, {size[0]}, {size[1]}] of 1 or more",
    )


def capacity_of(config: Recipe, frames: int | None = None) -> int | None:
    """Return the latent frames that the cache of a stream of ``frames`` holds (None: a clip); None with a window."""
    if config.causal.window:
        return None
    return config.video.latent_frames if frames is None else frames


def seeds_of(seed: int | Sequence[int], batch: int) -> jax.Array:
    """Return the seeds uint32 ``[batch]`` of ``seed``: s, s + 1, ... of one integer s, else the integers themselves.

    Raises:
        ConfigError: neither one integer nor ``batch`` of them.
    """
    each = np.asarray(seed).astype(object)
    require(all(isinstance(one, int) for one in each.flat), f"seed is {seed!r}; accepted: whole numbers")
    each = each + np.arange(batch).astype(object) if each.ndim == 0 else each
    require(each.shape == (batch,), f"{each.size} seeds are given for {batch} prompts; accepted: 1 or {batch}")
    return jnp.asarray((each % 2**32).astype(np.uint32))


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def first_state(
    params: Params,
    text: jax.Array,
    seeds: jax.Array,
    picture: Picture | None = None,
    *,
    config: Recipe,
    capacity: int | None = None,
) -> StreamState:
    """Return the first state: :func:`init_stream` for uint32 ``seeds [B]``, jitted.

    ``capacity`` is the maximum number of latent frames of a stream without a window; with a window it is None.
    """
    schedule.check_single_blocks(config)
    prompt = encode_prompt(params, text, config, None, picture)
    batch, (height, width), causal = text.shape[0], config.latent_size, config.causal
    size = {"batch": batch, "height": height, "width": width}
    if capacity is None:
        recent_frames = causal.context_frames()
    else:
        recent_frames = capacity - int(causal.independent_first_frame)
        recent_frames -= recent_frames % causal.frames_per_block
    return StreamState(
        cache=transformer.init_cache(
            config.student, causal, frames=capacity, unstacked=is_unstacked(params["student"]), **size
        ),
        text=prompt,
        decode=decoder.init_decode_cache(config, **size),
        recent=jnp.zeros((batch, recent_frames, height, width, config.vae.z_dim), jnp.float32),
        seed=seeds,
        block=jnp.zeros((), jnp.int32),
        started=not causal.independent_first_frame,
        picture=picture,
    )


def abstract_state(
    params: Params, config: Recipe, batch: int, *, frames: int | None = None, picture: Any = None
) -> StreamState:
    """Return the shapes of the first state of ``batch`` streams; arguments as of :func:`init_stream`, in shapes."""
    text = jax.ShapeDtypeStruct((batch, config.text.length, config.text.dim), jnp.float32)
    seeds = jax.ShapeDtypeStruct((batch,), jnp.uint32)
    start = functools.partial(first_state, config=config, capacity=capacity_of(config, frames))
    return jax.eval_shape(start, params, text, seeds, picture)


def student_params(params: Params, strengths: Adapters | None) -> Any:
    """Return the student's parameters, with the stream's strengths in its adapters.

    Raises:
        ConfigError: strengths for stacked layers, whose scan would not read them.
    """
    if strengths is None:
        return params["student"]
    require(
        is_unstacked(params["student"]),
        "the stream has strengths of LoRAs, and the student's layers are stacked; accepted: layers of "
        "models.transformer.unstack",
    )
    return adapters.scaled(params["student"], strengths.scale)


def encode_prompt(
    params: Params, text: jax.Array, config: Recipe, strengths: Adapters | None, picture: Picture | None
) -> TextCache:
    """Return the keys and values of the prompt ``text [B, S, E]``, and of the picture's embeddings if it has any.

    They are in the type that attention reads, which gives the same bits with half the memory of float32. On a mesh a
    device holds only the keys and values of its own streams. Embeddings of another shape are refused by a ConfigError.
    """
    check_text(text, config)
    net = config.student
    embeds = () if picture is None or picture.embeds is None else (picture.embeds,)
    cache = transformer.encode_text(student_params(params, strengths), text, *embeds, config=net)
    return jax.tree.map(lambda x: constraints.constrain(x.astype(net.dtype), TEXT_AXES[-x.ndim :], net.rules), cache)


def copy_stream(state: StreamState) -> StreamState:
    """Copy a state, so that one stream can be continued in two ways."""
    return jax.tree.map(jnp.copy, state)
