"""Self-attention of the transformer's forward modes: rotate queries and keys, write the cache, call the kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.config import CausalConfig, TransformerConfig
from causvid_jax.models import attention, precision, rope
from causvid_jax.models.kv_cache import (
    HEAD_MAJOR_AXES,
    head_major,
    read_positions,
    stores_rotated,
    visible_slots,
    write_slots,
)
from causvid_jax.models.layers import Params
from causvid_jax.models.quantization import readable, stored
from causvid_jax.models.transformer_layer import Attend
from causvid_jax.models.unstacked import is_unstacked


def _grid(x: jax.Array, config: TransformerConfig) -> dict[str, Any]:
    """Return the keyword arguments of :func:`rope.rotation` for latents ``x``."""
    _, patch_h, patch_w = config.patch_size
    return {
        "rows": x.shape[2] // patch_h,
        "columns": x.shape[3] // patch_w,
        "head_dim": config.head_dim,
        "theta": config.rope_theta,
    }


def attend_plan(
    plan: attention.Plan, positions: jax.Array, x: jax.Array, params: Params, config: TransformerConfig
) -> Attend:
    """Return the self-attention of ``plan`` for latents ``x`` at the time positions ``[F]``."""
    rotation = rope.rotation(positions, **_grid(x, config))
    rotate = functools.partial(rope.rotate, rotation=rotation, halves=is_unstacked(params))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: None) -> tuple[jax.Array, None]:
        q, k = rotate(q), rotate(k)
        out = attention.attend(
            plan, q, k, v, dtype=config.dtype, backend=precision.attention_backend(config), rules=config.rules
        )
        return out, None

    return attend


def attend_cached(
    position: jax.Array,
    slots: jax.Array,
    slot_frames: jax.Array,
    x: jax.Array,
    unstacked: bool,
    rewrites: bool,
    config: TransformerConfig,
    causal: CausalConfig,
) -> Attend:
    """Return the self-attention of :func:`causvid_jax.models.transformer.cached`, for the block ``x`` in ``slots``.

    If layers are unstacked, it returns a layer's cache with the block written in place. In a scan it returns only the
    block's keys and values, because a scan would copy the whole cache, and its backward pass would keep every copy.
    """
    frames, grid = x.shape[1], _grid(x, config)
    rotations: tuple[rope.Rotation, ...]
    if stores_rotated(causal):
        rotations = (rope.stream_rotation(position + jnp.arange(frames, dtype=jnp.int32), **grid),)
    else:
        # RoPE attention depends on relative positions only, but rounding the rotated values depends on absolute ones,
        # so ``wan`` and ``causvid`` need the true origin.
        origin = position if precision.rounds_results(config) else 0
        rotations = (
            rope.rotation(origin + jnp.arange(frames), **grid),
            rope.rotation(origin + read_positions(slot_frames, position, frames, causal), **grid),
        )
    tokens = rotations[0].cos.shape[1]
    mask = jnp.repeat(visible_slots(slot_frames, position, frames, causal), tokens)  # [S n]
    in_use = tokens * jnp.minimum(position + frames, slot_frames.shape[0])

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, layer_cache: Any, *replicated: Any) -> tuple[jax.Array, Any]:
        slots, mask, in_use, own_rotation, *key_rotation = replicated
        by_head = layer_cache[0].ndim == len(HEAD_MAJOR_AXES)
        rotate = functools.partial(rope.rotate, halves=unstacked, exchange=by_head)
        q, k = rotate(q, own_rotation), k if key_rotation else rotate(k, own_rotation)
        block = stored(k, v, layer_cache)
        block, axis = (tuple(map(head_major, block)), 2) if by_head else (block, 1)
        written = tuple(write_slots(old, new, slots, axis=axis) for old, new in zip(layer_cache, block, strict=True))
        if by_head:
            return _by_splash(q, written[0], written[1], mask), written
        keys, values = readable(written, config.dtype)
        if len(written) > 2:  # Attention reads the block itself without 8-bit rounding.
            own = (k.astype(keys.dtype), v.astype(values.dtype))
            keys, values = (write_slots(old, new, slots, axis=1) for old, new in zip((keys, values), own, strict=True))
        visible = rotate(keys, key_rotation[0]) if key_rotation else keys
        flat = [attention.flatten_frames(z) for z in (q, visible, values)]
        backend, used = precision.attention_backend(config), None if rewrites else in_use
        out = attention.dense(*flat, dtype=config.dtype, backend=backend, mask=mask, used=used)
        return out.reshape(q.shape), written if unstacked else block

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer_cache: Any) -> tuple[jax.Array, Any]:
        replicated = (slots, mask, in_use, *rotations)
        return attention.attend_cache(kernel, q, k, v, layer_cache, *replicated, dtype=config.dtype, rules=config.rules)

    return attend


def _by_splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the attention of ``q [B, K, n, N, D]`` to head-major ``k, v [B, N, T, D]`` where ``mask [S n]`` is true.

    The keys after the S n tokens complete the last block of the kernel and are hidden.
    """
    from causvid_jax.models import splash  # here, because it imports Pallas

    mask = jnp.pad(mask, (0, k.shape[2] - len(mask)))
    return splash.head_major_attention(attention.flatten_frames(q).astype(k.dtype), k, v, mask).reshape(q.shape)
