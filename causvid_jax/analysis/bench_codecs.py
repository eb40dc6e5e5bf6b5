"""The decoders that a stream can show its frames through, each as the recipe that names it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.analysis import jaxpr_flops, sampling_memory
from causvid_jax.config import Recipe, require
from causvid_jax.models import decoder

NAMES = ("wan", "taehv")


@dataclasses.dataclass(frozen=True)
class Codec:
    """A decoder of latent blocks: the one that ``recipe`` names, for ``streams`` videos side by side."""

    recipe: Recipe
    streams: int

    @property
    def title(self) -> str:
        """What a table calls it."""
        if self.recipe.decoder == "taehv":
            return f"TAEHV, {self.recipe.taehv.dtype}"
        whose = "Wan" if self.recipe.vae.base_dim == 96 else self.recipe.name
        return f"{whose} VAE, {self.recipe.vae.dtype}"

    def shapes(self) -> Any:
        """Shapes and types of its weights."""
        return sampling_memory.codec_shapes(self.recipe, encodes=False)

    def programs(self) -> tuple[Any, Any]:
        """Jitted ``start() -> cache`` and ``decode(params, latents, cache) -> (frames, cache)``, the cache donated."""
        height, width = self.recipe.latent_size
        size = {"batch": self.streams, "height": height, "width": width}
        start = functools.partial(decoder.init_decode_cache, self.recipe, **size)
        return jax.jit(start), jax.jit(functools.partial(decoder.decode_chunk, config=self.recipe), donate_argnums=2)

    def flops(self, frames: int) -> float:
        """FLOPs of decoding ``frames`` latent frames of every stream."""
        start, decode = self.programs()
        shape = (self.streams, frames, *self.recipe.latent_size, self.recipe.vae.z_dim)
        return jaxpr_flops.traced(
            decode, self.shapes(), jax.ShapeDtypeStruct(shape, jnp.float32), jax.eval_shape(start)
        )


def make(name: str, recipe: Recipe, streams: int = 1) -> Codec:
    """The codec ``name`` for the latents of ``recipe``; TAEHV in the compute type of the recipe's VAE.

    Raises:
        ConfigError: an unknown name, or a codec that does not fit the recipe's latents.
    """
    require(name in NAMES, f"--codecs names {name!r}; accepted: {', '.join(NAMES)}")
    if name == "wan":
        return Codec(dataclasses.replace(recipe, decoder="vae"), streams)
    tiny = dataclasses.replace(recipe.taehv, z_dim=recipe.vae.z_dim, dtype=recipe.vae.dtype)
    return Codec(dataclasses.replace(recipe, decoder="taehv", taehv=tiny), streams)
