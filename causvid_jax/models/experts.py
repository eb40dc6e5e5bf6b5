"""A teacher of two networks of one size, chosen by the timestep (Wan2.2-A14B).

``v(x, t) = v_high(x, t) if t >= boundary else v_low(x, t)``, where t is the timestep that the network reads, after the
shift. The parameters are two trees, ``{"high_noise": ..., "low_noise": ...}``, each sharded like those of one network.

Source: Wan2.2, ``wan/text2video.py`` (``_prepare_model_for_timestep``); ``boundary_ratio`` of diffusers'
``WanPipeline``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from causvid_jax.config import ExpertsConfig, TransformerConfig
from causvid_jax.models import transformer

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"
NAMES = (HIGH_NOISE, LOW_NOISE)
"""Names of the two parameter trees, and of their folders in a working directory."""


def per_expert(value: Any, experts: ExpertsConfig) -> Any:
    """Return ``value`` (a specification, shapes) for each expert by name, or ``value`` for a teacher of one network."""
    return dict.fromkeys(NAMES, value) if experts.boundary else value


def bidirectional(
    params: Any,
    x: Float[jax.Array, "B F h w C"],
    timestep: Float[jax.Array, "B F"],
    prompt_embeds: Float[jax.Array, "B S E"],
    *image_embeds: Float[jax.Array, "B I G"],
    config: TransformerConfig,
    experts: ExpertsConfig,
) -> Float[jax.Array, "B F h w V"]:
    """Return the teacher's velocity ``[B, F, h, w, V]``: that of the expert for each clip's timestep.

    Arguments are those of :func:`transformer.bidirectional`; ``params`` holds both trees, or one tree without a
    boundary. All frames of a clip have the same timestep. An expert runs only if a clip of the batch needs it. If all
    timesteps are on one side of the boundary, as in sampling, this is one pass; otherwise both experts run on the whole
    batch.
    """
    if not experts.boundary:
        return transformer.bidirectional(params, x, timestep, prompt_embeds, *image_embeds, config=config)
    high = timestep >= experts.boundary

    def run(p: Any) -> jax.Array:
        return transformer.bidirectional(p, x, timestep, prompt_embeds, *image_embeds, config=config)

    shape = jax.eval_shape(run, params[HIGH_NOISE])

    def velocity(name: str, needed: jax.Array) -> jax.Array:
        return jax.lax.cond(needed, run, lambda _: jnp.zeros(shape.shape, shape.dtype), params[name])

    by_high, by_low = velocity(HIGH_NOISE, jnp.any(high)), velocity(LOW_NOISE, jnp.any(~high))
    return jnp.where(high[..., None, None, None], by_high, by_low)
