"""What a transformer rounds on its way: nothing but the operands of matmuls (ours), or what published code rounds.

``TransformerConfig.precision`` picks a column; "rounded" is to ``config.dtype``, so in float32 all columns are one.

| value | ``own`` | ``wan`` (Wan2.1) | ``causvid`` (CausVid, Self-Forcing) |
|---|---|---|---|
| result and bias of a linear layer | float32 | rounded | rounded |
| q and k, normalised, before their scale | float32 | rounded | rounded |
| q and k after their scale | float32 | float32 | rounded |
| time embedding, modulation, LayerNorm, residual stream | float32 | float32 | rounded after every operation |
| head | operands rounded | float32 | rounded |
| rotary positions in a stream | relative to the block | absolute | absolute |
| division by the softmax's sum, without a kernel | before the last product | after it | after it |

Ours keeps more than either. The published weights have only ever seen the roundings of their own code, so whoever wants
to compare frames with that code takes its column. What stays different: rotary angles are float32 here and float64
there (4e-6 rad at worst), and flash attention rescales its sums from one stretch of keys to the next.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from causvid_jax.config import Recipe, TransformerConfig
from causvid_jax.models import attention, layers
from causvid_jax.models.layers import Params


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """``x`` as the nearest values of ``dtype``, still float32. A cast there and back may be left out by a compiler."""
    kind = jnp.finfo(dtype)
    return x if dtype == "float32" else jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def everywhere(x: jax.Array, config: TransformerConfig) -> jax.Array:
    """``x``, rounded where every result is."""
    return rounded(x, config.dtype) if config.precision == "causvid" else x


def linear(p: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """``x W + b``, operands rounded."""
    if config.precision == "default":
        return layers.linear(p, x, config.dtype)
    product = layers.matmul(x, p["kernel"], config.dtype)
    return rounded(product + rounded(p["bias"].astype(jnp.float32), config.dtype), config.dtype)


def mlp(p: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array], config: TransformerConfig) -> jax.Array:
    """``fc2(activation(fc1(x)))``."""
    return linear(p["fc2"], activation(linear(p["fc1"], x, config)), config)


def island_linear(p: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """A linear layer of the time embedding: float32 but where every result is rounded. Bfloat16 would round timesteps
    near 1000 together, were it not for the sinusoid before it."""
    return linear(p, x, config) if config.precision == "causvid" else layers.linear(p, x)


def head_linear(p: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """The last linear layer."""
    return layers.linear(p, x) if config.precision == "wan" else linear(p, x, config)


def float32_kernels(config: TransformerConfig) -> tuple[str, ...]:
    """Top-level names of the parameters whose kernels are used unrounded."""
    return ("time_embedding", "time_projection", *(("head",) if config.precision == "wan" else ()))


def attention_backend(config: TransformerConfig) -> str:
    """``config.attention``; where that is XLA's own, the variant that rounds as flash attention does."""
    plain = config.precision == "default" or attention.resolve(config.attention, config.dtype) != "xla"
    return config.attention if plain else "late"


def rms_norm(x: jax.Array, scale: jax.Array, config: TransformerConfig) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * scale``."""
    if config.precision == "default":
        return layers.rms_norm(x, scale, config.eps)
    unscaled = rounded(layers.rms_norm(x, jnp.ones((), jnp.float32), config.eps), config.dtype)
    return everywhere(unscaled * everywhere(scale, config), config)


def layer_norm(x: jax.Array, config: TransformerConfig, p: Params | None = None) -> jax.Array:
    """``(x - mean) / sqrt(var + eps)``, times scale plus bias if ``p`` is given."""
    if p is not None:
        p = {name: everywhere(value, config) for name, value in p.items()}
    return everywhere(layers.layer_norm(x, config.eps, p), config)


def modulation(table: jax.Array, time: jax.Array, config: TransformerConfig) -> jax.Array:
    """The learned table plus the embedded time."""
    return everywhere(everywhere(table, config) + time, config)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, config: TransformerConfig) -> jax.Array:
    """``x (1 + scale) + shift``; ``x [B, F, n, M]``, shift and scale per frame ``[B, F, M]``."""
    if config.precision != "causvid":
        return layers.modulate(x, shift, scale)
    scaled = everywhere(x * everywhere(1.0 + scale[:, :, None], config), config)
    return everywhere(scaled + shift[:, :, None], config)


def add(x: jax.Array, y: jax.Array, config: TransformerConfig, gate: jax.Array | None = None) -> jax.Array:
    """The residual stream: ``x + y``, or ``x + y gate`` with ``gate [B, F, M]``."""
    return everywhere(x + (y if gate is None else everywhere(y * gate[:, :, None], config)), config)


def exact(recipe: Recipe, teacher: bool) -> Recipe:
    """``recipe`` with the numerics of the published code: of Wan2.1 for the teacher, whose VAE then runs in float32, of
    CausVid for the student.

    Beside the roundings above, the student's latents are rounded between its steps and its noise levels come from the
    published table (``flow.table_sigma``), and the teacher's UniPC is told whole timesteps.
    """
    return dataclasses.replace(
        recipe,
        teacher=dataclasses.replace(recipe.teacher, precision="wan"),
        student=dataclasses.replace(recipe.student, precision="causvid"),
        vae=dataclasses.replace(recipe.vae, dtype="float32") if teacher else recipe.vae,
    )
