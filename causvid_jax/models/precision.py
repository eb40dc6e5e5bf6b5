"""Precision policies: where the transformer rounds to ``config.dtype``.

``TransformerConfig.precision`` selects a column. ``default`` rounds matmul operands only; ``fast`` also rounds the
products that linear layers write to memory; ``wan`` and ``causvid`` round where the published code does. With ``dtype``
float32 all columns are equal.

| value | ``default`` | ``fast`` | ``wan`` (Wan2.1) | ``causvid`` (CausVid, Self-Forcing) |
|---|---|---|---|---|
| product of a linear layer, before its bias | float32 | rounded | float32 | float32 |
| result and bias of a linear layer | float32 | float32 | rounded | rounded |
| q and k, normalised, before their scale | float32 | float32 | rounded | rounded |
| q and k after their scale | float32 | float32 | float32 | rounded |
| time embedding, modulation, LayerNorm, residual stream | float32 | float32 | float32 | rounded after every operation |
| head | operands rounded | operands rounded | float32 | rounded |
| division by the softmax's sum, without a kernel | before the last product | the same | after it | after it |

``default`` is the most precise. ``fast`` halves the bytes that a linear layer writes; docs/performance.md has its
error. Use ``wan`` or ``causvid`` to compare frames with the published code. Two differences remain. Rotary angles are
float32 here and float64 in the published code (at most 4e-6 rad). Flash attention rescales its partial sums between
blocks of keys.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from causvid_jax.config import Recipe, TransformerConfig
from causvid_jax.models import adapters, attention, int8_linear, layers
from causvid_jax.models.layers import Params


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """Return ``x`` rounded to the precision of ``dtype`` but stored in float32.

    XLA may remove a pair of casts, so this uses ``reduce_precision``.
    """
    info = jnp.finfo(dtype)
    return x if dtype == "float32" else jax.lax.reduce_precision(x, info.nexp, info.nmant)


def round_all(x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Round ``x`` if the policy rounds every intermediate result (``causvid``)."""
    return rounded(x, config.dtype) if config.precision == "causvid" else x


def rounds_results(config: TransformerConfig) -> bool:
    """Return whether the policy is one of the published code, which rounds results as well as operands."""
    return config.precision in ("wan", "causvid")


def linear(p: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Return ``x W + b``, float32 ``[..., out]``, with operands rounded to ``config.dtype``.

    ``fast`` also rounds the product, ``wan`` and ``causvid`` the result. An adapter adds ``scale (x A) B``
    (``models.adapters``) before the result is rounded. A kernel in 8 bits is multiplied by ``models.int8_linear``.
    """
    result = _product_and_bias(p, x, config)
    if adapters.KEY in p:
        result = result + adapters.product(p[adapters.KEY], x, config)
    return rounded(result, config.dtype) if rounds_results(config) else result


def _product_and_bias(p: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Return :func:`linear` without an adapter, before its result is rounded."""
    eight_bits = isinstance(p["kernel"], Mapping)
    if not rounds_results(config):
        result = config.dtype if config.precision == "fast" else "float32"
        if eight_bits:
            return int8_linear.product(x, p["kernel"]).astype(result) + p["bias"]
        return layers.linear(p, x, config.dtype, result)
    product = int8_linear.product(x, p["kernel"]) if eight_bits else layers.matmul(x, p["kernel"], config.dtype)
    return product + rounded(p["bias"].astype(jnp.float32), config.dtype)


def mlp(p: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array], config: TransformerConfig) -> jax.Array:
    """Return ``fc2(activation(fc1(x)))``, float32 ``[..., out]``."""
    return linear(p["fc2"], activation(linear(p["fc1"], x, config)), config)


def time_linear(p: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Apply a linear layer of the time embedding, in float32 unless the policy rounds every result."""
    return linear(p, x, config) if config.precision == "causvid" else layers.linear(p, x)


def head_linear(p: Params, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Apply the last linear layer, in float32 under ``wan``."""
    return layers.linear(p, x) if config.precision == "wan" else linear(p, x, config)


def float32_kernels(config: TransformerConfig) -> tuple[str, ...]:
    """Return the top-level names of the parameters whose kernels stay in float32."""
    return ("time_embedding", "time_projection", *(("head",) if config.precision == "wan" else ()))


def attention_backend(config: TransformerConfig) -> str:
    """Return the kernel of self-attention: ``config.attention``, or ``"late"`` instead of XLA's if results are rounded.

    ``"late"`` rounds as flash attention does, which the published code uses (``wan``, ``causvid``).
    """
    keep = not rounds_results(config) or attention.resolve(config.attention, config.dtype) != "xla"
    return config.attention if keep else "late"


def text_attention_backend(config: TransformerConfig) -> str:
    """Return the kernel of cross-attention: ``"auto"`` instead of ``"int8"``, which gains little for few keys."""
    return "auto" if config.attention == "int8" else attention_backend(config)


def rms_norm(x: jax.Array, scale: jax.Array, config: TransformerConfig, *, rotated: bool = False) -> jax.Array:
    """Return ``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, float32, rounded by the policy.

    ``rotated``: the result is rotated next (``layers.rms_norm``).
    """
    if not rounds_results(config):
        return layers.rms_norm(x, scale, config.eps, rotated=rotated)
    unscaled = rounded(layers.rms_norm(x, jnp.ones((), jnp.float32), config.eps), config.dtype)
    return round_all(unscaled * round_all(scale, config), config)


def layer_norm(x: jax.Array, config: TransformerConfig, p: Params | None = None) -> jax.Array:
    """Return ``(x - mean) / sqrt(var + eps)`` over the last axis; with ``p``, times ``scale`` plus ``bias``."""
    if p is not None:
        p = {name: round_all(value, config) for name, value in p.items()}
    return round_all(layers.layer_norm(x, config.eps, p), config)


def modulation(table: jax.Array, time: jax.Array, config: TransformerConfig) -> jax.Array:
    """Return the learned table ``[s, M]`` plus the embedded time ``[B, F, s or 1, M]``: ``[B, F, s, M]``."""
    return round_all(round_all(table, config) + time, config)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, config: TransformerConfig) -> jax.Array:
    """Return ``x (1 + scale) + shift`` for ``x [B, F, n, M]`` and a shift and scale per frame, ``[B, F, M]``."""
    if config.precision != "causvid":
        return layers.modulate(x, shift, scale)
    scaled = round_all(x * round_all(1.0 + scale[:, :, None], config), config)
    return round_all(scaled + shift[:, :, None], config)


def add(x: jax.Array, y: jax.Array, config: TransformerConfig, gate: jax.Array | None = None) -> jax.Array:
    """Return the residual stream ``x + y [B, F, n, M]``, or ``x + y gate`` with ``gate [B, F, M]``."""
    return round_all(x + (y if gate is None else round_all(y * gate[:, :, None], config)), config)


def exact(recipe: Recipe, teacher: bool) -> Recipe:
    """Return ``recipe`` with the precision of the published code: ``wan`` for the teacher, ``causvid`` for the student.

    With ``teacher``, the VAE runs in float32. The samplers then also follow the published code elsewhere: the student
    rounds latents between its steps and takes its noise levels from ``flow.table_sigma``; the teacher's UniPC
    conditions the network on integer timesteps.
    """
    return dataclasses.replace(
        recipe,
        teacher=dataclasses.replace(recipe.teacher, precision="wan"),
        student=dataclasses.replace(recipe.student, precision="causvid"),
        vae=dataclasses.replace(recipe.vae, dtype="float32") if teacher else recipe.vae,
    )
