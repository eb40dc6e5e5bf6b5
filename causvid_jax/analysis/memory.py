"""Compute the memory of sampling on one device from shapes, before anything is loaded; read limits and peaks.

The memory of a stage on a mesh is estimated by :mod:`causvid_jax.analysis.estimate`, with the same formula for the
largest temporaries of a layer (:func:`layer_work`).

Sampling has phases. The memory of a phase is freed before the next begins. So the text encoder and the transformer are
never loaded together, and neither are the teacher (which makes a whole clip at once) and the decoder. Parameters and
caches are exact, by ``jax.eval_shape``. ``work`` is an estimate of the largest temporaries of a layer, because they
depend on the compiler.
"""

import dataclasses
import functools
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import CLIPConfig, Recipe, TransformerConfig, require
from causvid_jax.config.files import format_bytes, host_memory
from causvid_jax.models import attention, decoder, experts, transformer, vae
from causvid_jax.models.decoder import codec_shapes, image_encoder_shapes, vae_shapes
from causvid_jax.models.image_branch import Picture, has_branch
from causvid_jax.sampling import stream
from causvid_jax.text import encoder

Sizes = Mapping[str, int]  # bytes by type of element
PROMPTS = 4  # prompts that the encoder computes at once


@dataclasses.dataclass(frozen=True)
class Phase:
    """Arrays that are on the device at the same time: for each of ``items`` bytes by type of element."""

    name: str
    items: Mapping[str, Sizes]

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(sum(sizes.values()) for sizes in self.items.values())


def sizes(tree: Any) -> dict[str, int]:
    """Return the bytes of all arrays (or shapes) of ``tree``, by type of element: ``{"float32": 4096}``."""
    out: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        kind = jnp.dtype(leaf.dtype)
        out[kind.name] = out.get(kind.name, 0) + int(np.prod(leaf.shape, dtype=np.int64)) * kind.itemsize
    return out


def sampling_phases(
    recipe: Recipe,
    role: str,
    *,
    batch: int,
    latents: int,
    prompts: int = 1,
    image: bool = False,
    video: bool = False,
    clip: CLIPConfig | None = None,
    state: stream.StreamState | None = None,
) -> tuple[Phase, ...]:
    """Return the phases of a run of the sampler, in order; the memory of one is freed before the next.

    Args:
        recipe: gives the sizes of the networks.
        role: ``"student"`` streams, ``"teacher"`` makes a clip.
        batch: number of parallel videos.
        latents: latent frames of each.
        prompts: number of prompts that a network encodes; with 0 there is no such phase.
        image, video: whether the stream starts from an image or a video, which needs the VAE's encoder.
        clip: the image encoder of a teacher with an image branch, for image to video.
        state: shapes of the stream's state; None: those that the model gives.
    """
    phases = _prompt_phases(recipe, prompts)
    net = getattr(recipe, role)
    picture = _picture_shapes(recipe, net, batch, latents) if image else None
    if picture is not None:
        phases += _picture_phases(recipe, clip)
    weights = transformer.inference(net, unstacked=role == "student")
    if net.linear == "int8":
        items = {"transformer": sizes(weights), "array being read": _largest_array(transformer.read_shapes(net))}
        phases += (Phase("read the weights", items),)
    if role == "teacher":
        return phases + _teacher_phases(recipe, weights, batch, latents, picture)
    if state is None:
        single = dataclasses.replace(recipe, rolling_blocks=0)
        state = stream.abstract_state({"student": weights}, single, batch, frames=latents, picture=picture)
    return (*phases, _stream_phase(recipe, weights, batch, state, image=image, video=video))


def _prompt_phases(recipe: Recipe, prompts: int) -> tuple[Phase, ...]:
    """Return the phase that encodes prompts by UMT5; none without prompts or with a recipe of words."""
    if not prompts or recipe.text.kind != "umt5":
        return ()
    work = _encoder_work(recipe, min(prompts, PROMPTS))
    items: dict[str, Sizes] = {"text encoder": sizes(encoder.inference_shapes(recipe.umt5)), "work, about": work}
    if recipe.umt5.weights == "int8":
        items["array being read"] = _largest_array(encoder.read_shapes(recipe.umt5))
    return (Phase("encode the prompts", items),)


def _stream_phase(
    recipe: Recipe, weights: Any, batch: int, state: stream.StreamState, *, image: bool, video: bool
) -> Phase:
    """Return the phase that generates and decodes the blocks of ``batch`` streams."""
    coder, k = codec_shapes(recipe, encodes=image or video), recipe.causal.frames_per_block
    together = k * max(1, recipe.rolling_blocks)
    work = layer_work(recipe.student, batch, together, state.cache.frame.shape[0], *recipe.latent_size)
    items = {
        "transformer": sizes(weights),
        "keys and values": sizes(state.cache.arrays),
        "prompt's keys and values": sizes(state.text),
        _codec_name(coder): sizes(coder),
        "decoder's past": sizes(state.decode),
        "work, about": _largest(work, _decoder_work(recipe, batch, k)),
    }
    if recipe.rolling_blocks:
        items["copy of keys and values"] = sizes(state.cache.arrays)
    if video:
        size = {"batch": batch, "height": recipe.video.height, "width": recipe.video.width}
        past = jax.eval_shape(functools.partial(vae.init_encode_cache, recipe.vae, **size))
        items["encoder's past"] = sizes(past)
    return Phase("stream", items)


def _teacher_phases(
    recipe: Recipe, weights: Any, batch: int, latents: int, picture: Picture | None
) -> tuple[Phase, ...]:
    """Return the phases that denoise and decode ``batch`` clips of the teacher."""
    height, width = recipe.latent_size
    clean = jax.ShapeDtypeStruct((batch, latents, height, width, recipe.vae.z_dim), jnp.float32)
    both = batch * (1 if recipe.diffusion.guidance_scale == 1.0 else 2)
    past = jax.eval_shape(functools.partial(decoder.init_decode_cache, recipe, batch=batch, height=height, width=width))
    name = "both experts" if recipe.experts.boundary else "transformer"
    denoise = {
        name: sizes(experts.per_expert(weights, recipe.experts)),
        "latents": sizes([clean] * (4 if recipe.diffusion.solver == "unipc" else 2)),
        "work, about": layer_work(recipe.teacher, both, latents, latents, height, width),
    }
    if picture is not None:
        denoise["picture's embeddings and latents"] = sizes(picture)
    coder = codec_shapes(recipe, encodes=False)
    decode = {
        "latents": sizes(clean),
        _codec_name(coder): sizes(coder),
        "decoder's past": sizes(past),
        "work, about": _decoder_work(recipe, batch, recipe.causal.frames_per_block),
    }
    return Phase("denoise", denoise), Phase("decode", decode)


def describe(phases: tuple[Phase, ...], limit: int | None = None) -> str:
    """Return the phases as lines of text."""
    lines = ["Memory on the device; each phase is freed before the next one."]
    for number, phase in enumerate(phases, 1):
        lines.append(f"  {number}. {phase.name}: {format_bytes(phase.total)}")
        for name, types in phase.items.items():
            parts = ", ".join(f"{format_bytes(count)} {kind}" for kind, count in sorted(types.items()) if count)
            lines.append(f"       {name:<26}{parts or 'nothing'}")
    peak = max(phases, key=lambda phase: phase.total)
    limit_text = f" of {format_bytes(limit)} on the device" if limit else "; the memory of the device is not known"
    lines.append(f"  Most: {format_bytes(peak.total)} ({peak.name}){limit_text}.")
    return "\n".join(lines)


LESS = "a smaller video.height and video.width, fewer --frames or prompts at once, a causal.window, decoder=taehv"
"""Settings that reduce the memory of sampling."""


def check_fits(phases: Sequence[Phase], limit: int | None, less: str = LESS, owner: str = "the device has") -> None:
    """Refuse phases that need more than the memory of ``owner`` (``limit`` bytes; None: unknown).

    ``less`` names settings that reduce it.

    Raises:
        ConfigError: a phase that needs more; the message has its bytes and ``less``.
    """
    for phase in phases:
        require(
            limit is None or phase.total <= limit,
            f"to {phase.name} takes about {format_bytes(phase.total)}, and {owner} {format_bytes(limit or 0)}; "
            f"to reduce it: {less}",
        )


def peak_rss() -> int:
    """Return the peak resident bytes of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_peak() -> tuple[int, str]:
    """Return the peak bytes in use and their owner: the device if it counts them, else this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"]), "device"
    return peak_rss(), "process, with the interpreter and the compiler"


def memory_limit() -> int | None:
    """Return the bytes of the device that a program may use; on CPU the host's memory; None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory() if jax.default_backend() == "cpu" else None


def _picture_shapes(recipe: Recipe, net: TransformerConfig, batch: int, latents: int) -> Picture | None:
    """Return the shapes of a picture's inputs to a network with an image branch; None without an image branch."""
    if not has_branch(net):
        return None
    condition = jax.ShapeDtypeStruct((batch, latents, *recipe.latent_size, net.image_channels), jnp.float32)
    embeds = jax.ShapeDtypeStruct((batch, net.image_tokens, net.image_dim), jnp.float32) if net.image_dim else None
    return Picture(cast(Any, condition), cast(Any, embeds))


def _picture_phases(recipe: Recipe, encoder: CLIPConfig | None) -> tuple[Phase, ...]:
    """Return the phases that encode an image by CLIP, if the network reads it, then by the VAE."""
    read: tuple[Phase, ...] = ()
    if encoder is not None:
        hidden = encoder.tokens * max(encoder.ffn_dim, 4 * encoder.dim) * 4
        scores = encoder.num_heads * encoder.tokens**2 * 2 * 4
        items = {"image encoder": sizes(image_encoder_shapes(encoder)), "work, about": {"float32": hidden + scores}}
        read = (Phase("embed the picture", items),)
    size = {"batch": 1, "height": recipe.video.height, "width": recipe.video.width}
    past = jax.eval_shape(functools.partial(vae.init_encode_cache, recipe.vae, **size))
    pixels = vae.time_factor(recipe.vae) * recipe.video.height * recipe.video.width
    work = pixels * (5 * recipe.vae.base_dim * _width(recipe.vae.dtype) + 3 * 4)
    return (
        *read,
        Phase(
            "encode the picture",
            {
                "VAE": sizes(vae_shapes(recipe)),
                "encoder's past": sizes(past),
                "work, about": {"float32 and less": work},
            },
        ),
    )


def _codec_name(coder: Mapping[str, Any]) -> str:
    return " and ".join({"vae": "VAE", "taehv": "TAEHV"}[name] for name in coder)


def _largest_array(shapes: Any) -> dict[str, int]:
    """Return the size of the largest array; in 8 bits each comes in the compute type and is rounded on the device."""
    return _largest(*(sizes(leaf) for leaf in jax.tree.leaves(shapes)))


def _largest(*works: dict[str, int]) -> dict[str, int]:
    return max(works, key=lambda work: sum(work.values()))


def _width(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def layer_work(
    net: TransformerConfig,
    batch: int,
    frames: int,
    context_frames: int,
    height: int,
    width: int,
    backend: str | None = None,
    tensor: int = 1,
) -> dict[str, int]:
    """Return the bytes of the largest temporaries of one layer that is not differentiated.

    ``frames`` latent frames of ``height`` x ``width`` attend to ``context_frames`` of them.

    These are the residual stream, and the MLP's hidden layer or attention, each in float32 and in the compute type.
    XLA's attention also holds all scores. ``backend`` is that of attention; None: the backend that this process would
    use. Hidden layer and heads are split over ``tensor`` devices.
    """
    n = (height // net.patch_size[1]) * (width // net.patch_size[2])
    tokens, keys, size = batch * frames * n, batch * context_frames * n, 4 + _width(net.dtype)
    hidden = tokens * net.ffn_dim * size
    attended = (3 * tokens + 2 * keys) * net.dim * size
    if (backend or attention.resolve(net.attention, net.dtype)) == "xla":
        attended += tokens * context_frames * n * net.num_heads * size
    return {"float32 and less": 2 * tokens * net.dim * 4 + max(hidden, attended) // tensor}


def _decoder_work(recipe: Recipe, batch: int, latents: int) -> dict[str, int]:
    """Return the temporaries of the decoder's last level: a few arrays of all frames of a block at full size."""
    channels = recipe.vae.base_dim if recipe.decoder == "vae" else recipe.taehv.decoder_dims[-1]
    dtype = (recipe.vae if recipe.decoder == "vae" else recipe.taehv).dtype
    frames = vae.time_factor(recipe.vae) * latents
    pixels = batch * frames * recipe.video.height * recipe.video.width
    return {"float32 and less": pixels * (5 * channels * _width(dtype) + 3 * 4)}


def _encoder_work(recipe: Recipe, batch: int) -> dict[str, int]:
    """Return the temporaries of one layer: scores and weights of attention, the gated MLP."""
    config, length = recipe.umt5, recipe.text.length
    size = 4 + _width(config.dtype)
    scores = batch * config.num_heads * length * length * size
    hidden = batch * length * config.ffn_dim * 2 * size
    return {"float32 and less": batch * length * config.dim * 4 * 2 + max(scores, hidden)}
