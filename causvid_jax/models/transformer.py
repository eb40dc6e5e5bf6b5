"""The Wan DiT: one network, one parameter tree, three readings.

| reading | a token sees | used by |
|---|---|---|
| :func:`bidirectional` | every token | teacher, fake score |
| :func:`block_causal` | its block and earlier ones, or clean copies of them | student in training |
| :func:`cached` | its block and the KV cache | student in streaming and in its own rollout |

All three predict the velocity ``noise - x0`` from noisy latents ``[B, F, h, w, C]``, a timestep per frame ``[B, F]`` in
[0, 1000] and text rows ``[B, S, E]``. Linen declares the parameters and scans the layers; what a layer computes is the
plain function :func:`block`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec

from causvid_jax.config import CausalConfig, TransformerConfig
from causvid_jax.models import attention, partition, rope
from causvid_jax.models.cache import (
    KVCache,
    TextCache,
    advance,
    block_slots,
    init_cache,
    read_positions,
    visible_slots,
)
from causvid_jax.models.layers import (
    Params,
    gelu_tanh,
    layer_norm,
    linear,
    mlp,
    modulate,
    rms_norm,
    timestep_sinusoid,
)
from causvid_jax.models.params import ParamSpec, abstract_tree, declare, init_tree, linear_spec, stack_spec

__all__ = [
    "KVCache",
    "TextCache",
    "abstract",
    "advance",
    "bidirectional",
    "block_causal",
    "cached",
    "encode_text",
    "init",
    "init_cache",
    "spec",
]


# ---- parameters -----------------------------------------------------------------------------------------------------


def _attention_spec(dim: int) -> dict[str, Any]:
    ones = ParamSpec((dim,), ("embed",), nn.initializers.ones)
    return {
        "q": linear_spec(dim, dim, ("embed", "heads")),
        "k": linear_spec(dim, dim, ("embed", "heads")),
        "v": linear_spec(dim, dim, ("embed", "heads")),
        "o": linear_spec(dim, dim, ("heads", "embed")),
        "norm_q": {"scale": ones},
        "norm_k": {"scale": ones},
    }


def _block_spec(config: TransformerConfig) -> dict[str, Any]:
    dim = config.dim
    return {
        "modulation": ParamSpec((6, dim), (None, None), nn.initializers.normal(dim**-0.5)),
        "self_attn": _attention_spec(dim),
        "norm3": {
            "scale": ParamSpec((dim,), ("embed",), nn.initializers.ones),
            "bias": ParamSpec((dim,), ("embed",), nn.initializers.zeros),
        },
        "cross_attn": _attention_spec(dim),
        "ffn": {
            "fc1": linear_spec(dim, config.ffn_dim, ("embed", "mlp")),
            "fc2": linear_spec(config.ffn_dim, dim, ("mlp", "embed")),
        },
    }


def _outer_spec(config: TransformerConfig) -> dict[str, Any]:
    """Everything but the layers. Inits are Wan's: N(0, 0.02) in the embeddings, a zero head."""
    dim, small = config.dim, nn.initializers.normal(0.02)
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    return {
        "patch_embedding": linear_spec(patch * config.in_channels, dim, (None, "embed")),
        "text_embedding": {
            "fc1": linear_spec(config.text_dim, dim, (None, "embed"), small),
            "fc2": linear_spec(dim, dim, ("embed", None), small),
        },
        "time_embedding": {
            "fc1": linear_spec(config.freq_dim, dim, (None, "embed"), small),
            "fc2": linear_spec(dim, dim, ("embed", None), small),
        },
        "time_projection": linear_spec(dim, 6 * dim, ("embed", None)),
        "head": {
            "modulation": ParamSpec((2, dim), (None, None), nn.initializers.normal(dim**-0.5)),
            "proj": linear_spec(dim, patch * config.out_channels, ("embed", None), nn.initializers.zeros),
        },
    }


def spec(config: TransformerConfig) -> dict[str, Any]:
    """Shape, logical axes and initialiser of every parameter; layers are stacked on a leading axis under ``blocks``."""
    return {**_outer_spec(config), "blocks": stack_spec(_block_spec(config), config.num_layers)}


def init(key: jax.Array, config: TransformerConfig) -> Params:
    """Fresh float32 parameters."""
    return init_tree(key, spec(config))


def abstract(config: TransformerConfig) -> Params:
    """``jax.ShapeDtypeStruct`` of every parameter."""
    return abstract_tree(spec(config))


# ---- one layer ------------------------------------------------------------------------------------------------------

Attend = Callable[..., Any]
TOKEN_AXES = ("batch", None, "tokens", None)  # of [B, F, n, M]


def _heads(x: jax.Array, num_heads: int) -> jax.Array:
    return rearrange(x, "... (N D) -> ... N D", N=num_heads)


def cross_keys_values(p: Params, context: jax.Array, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Keys (RMS-normalised over the full width) and values ``[B, S, N, D]`` of one layer from embedded text."""
    k = rms_norm(linear(p["k"], context, config.dtype), p["norm_k"]["scale"], config.eps)
    v = linear(p["v"], context, config.dtype)
    return _heads(k, config.num_heads), _heads(v, config.num_heads)


def block(
    p: Params,
    x: jax.Array,
    time: jax.Array,
    text: jax.Array | tuple[jax.Array, jax.Array],
    layer_cache: Any,
    attend: Attend,
    config: TransformerConfig,
) -> tuple[jax.Array, Any]:
    """One DiT layer, with m = modulation + time ``[B, F, 6, M]``::

        x += m2 * SelfAttention(LN(x) (1 + m1) + m0)
        x += CrossAttention(LN_affine(x), text)
        x += m5 * FFN(LN(x) (1 + m4) + m3)

    ``x [B, F, n, M]``; ``text`` is embedded text ``[B, S, M]`` or this layer's ready keys and values;
    ``attend(q, k, v, layer_cache) -> (output, layer_cache)`` decides what a token sees.
    """
    dtype, eps = config.dtype, config.eps
    shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = jnp.moveaxis(p["modulation"] + time, -2, 0)

    with jax.named_scope("self_attention"):
        sa, y = p["self_attn"], modulate(layer_norm(x, eps), shift_sa, scale_sa)
        q = _heads(rms_norm(linear(sa["q"], y, dtype), sa["norm_q"]["scale"], eps), config.num_heads)
        k = _heads(rms_norm(linear(sa["k"], y, dtype), sa["norm_k"]["scale"], eps), config.num_heads)
        v = _heads(linear(sa["v"], y, dtype), config.num_heads)  # [B, F, n, N, D]
        out, layer_cache = attend(q, k, v, layer_cache)
        out = linear(sa["o"], rearrange(out, "b f n N D -> b f n (N D)"), dtype)
        x = x + out * gate_sa[:, :, None]

    with jax.named_scope("cross_attention"):
        ca, y = p["cross_attn"], layer_norm(x, eps, p["norm3"])
        q = _heads(rms_norm(linear(ca["q"], y, dtype), ca["norm_q"]["scale"], eps), config.num_heads)
        k, v = text if isinstance(text, tuple) else cross_keys_values(ca, text, config)
        # All text slots are attended, padding included: that is what the published weights were trained with.
        out = attention.attend_text(q, k, v, dtype=dtype, backend=config.attention, rules=config.rules)
        x = x + linear(ca["o"], rearrange(out, "b f n N D -> b f n (N D)"), dtype)

    with jax.named_scope("ffn"):
        y = modulate(layer_norm(x, eps), shift_ffn, scale_ffn)
        x = x + mlp(p["ffn"], y, gelu_tanh, dtype) * gate_ffn[:, :, None]
    return partition.constrain(x, TOKEN_AXES, config.rules), layer_cache


def gather(p: Params, layer_spec: Any, config: TransformerConfig) -> Params:
    """The parameters of one layer, whole along ``embed`` on every device: FSDP's all-gather, one layer at a time."""
    if not partition.mesh_shape():
        return p

    def whole(leaf: ParamSpec, value: jax.Array) -> jax.Array:
        axes = [None if axis == "embed" else axis for axis in leaf.axes]
        return partition.constrain(value, axes, config.rules)

    return jax.tree.map(whole, layer_spec, p, is_leaf=lambda x: isinstance(x, ParamSpec))


class _Layer(nn.Module):
    """Declares one layer's parameters to linen, for :func:`flax.linen.scan`."""

    config: TransformerConfig
    attend: Attend

    @nn.compact
    def __call__(self, x, time, text, layer_inputs):
        p = gather(declare(self, _block_spec(self.config)), _block_spec(self.config), self.config)
        text_layer, layer_cache = layer_inputs
        return block(p, x, time, text if text_layer is None else text_layer, layer_cache, self.attend, self.config)


class _Transformer(nn.Module):
    """Declares all parameters and runs embedding, the scanned layers and the head."""

    config: TransformerConfig
    attend: Attend

    @nn.compact
    def __call__(self, x, timestep, text, text_cache, layer_caches, keep_frames: int):
        config, dtype = self.config, self.config.dtype
        p = gather(declare(self, _outer_spec(config)), _outer_spec(config), config)

        with jax.named_scope("embed"):
            _, patch_h, patch_w = config.patch_size
            rows, columns = x.shape[2] // patch_h, x.shape[3] // patch_w
            tokens = rearrange(x, "b f (r p) (c q) C -> b f (r c) (p q C)", p=patch_h, q=patch_w)
            tokens = linear(p["patch_embedding"], tokens, dtype)  # [B, F, n, M]
            tokens = partition.constrain(tokens, TOKEN_AXES, config.rules)
            # Time embedding is a float32 island: bfloat16 would round timesteps near 1000 together.
            sinusoid = timestep_sinusoid(timestep, config.freq_dim)
            e = mlp(p["time_embedding"], sinusoid, nn.silu, "float32")  # [B, F, M]
            time = rearrange(linear(p["time_projection"], nn.silu(e)), "b f (s M) -> b f s M", s=6)
            context = None if text is None else embed_text(p["text_embedding"], text, config)

        layer = nn.remat(_Layer, prevent_cse=False) if config.remat else _Layer
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=config.num_layers,
        )
        texts = None if text_cache is None else (text_cache.k, text_cache.v)
        layers = scanned(config, self.attend, name="blocks")
        tokens, layer_caches = layers(tokens, time, context, (texts, layer_caches))

        with jax.named_scope("head"):
            tokens, e = tokens[:, -keep_frames:], e[:, -keep_frames:]
            shift, scale = jnp.moveaxis(p["head"]["modulation"] + e[:, :, None], -2, 0)
            out = linear(p["head"]["proj"], modulate(layer_norm(tokens, config.eps), shift, scale), dtype)
            out = rearrange(out, "b f (r c) (p q C) -> b f (r p) (c q) C", r=rows, c=columns, p=patch_h, q=patch_w)
        return out, layer_caches


def embed_text(p: Params, text: jax.Array, config: TransformerConfig) -> jax.Array:
    """Text rows ``[B, S, E]`` to the model width ``[B, S, M]``; zero rows become a constant, not zero."""
    return mlp(p, text, gelu_tanh, config.dtype)


def _apply(params, config, attend, x, timestep, text, text_cache=None, layer_caches=None, keep_frames=None):
    module = _Transformer(config, attend)
    return module.apply(
        {"params": params},
        x,
        timestep,
        text,
        text_cache,
        layer_caches,
        x.shape[1] if keep_frames is None else keep_frames,
    )


def _grid(x: jax.Array, config: TransformerConfig) -> dict[str, Any]:
    """Keyword arguments of :func:`rope.angles` for latents ``x``."""
    _, patch_h, patch_w = config.patch_size
    return {
        "rows": x.shape[2] // patch_h,
        "columns": x.shape[3] // patch_w,
        "head_dim": config.head_dim,
        "theta": config.rope_theta,
    }


def _attend_plan(plan: attention.Plan, angle: jax.Array, config: TransformerConfig) -> Attend:
    def attend(q, k, v, _):
        q, k = rope.rotate(q, angle), rope.rotate(k, angle)
        out = attention.attend(plan, q, k, v, dtype=config.dtype, backend=config.attention, rules=config.rules)
        return out, None

    return attend


# ---- three readings -------------------------------------------------------------------------------------------------


def bidirectional(
    params: Params, x: jax.Array, timestep: jax.Array, text: jax.Array, *, config: TransformerConfig
) -> jax.Array:
    """Velocity ``[B, F, h, w, C]``; every token sees every token (teacher and fake score)."""
    angle = rope.angles(jnp.arange(x.shape[1]), **_grid(x, config))

    attend = _attend_plan(attention.everything(x.shape[1]), angle, config)
    return _apply(params, config, attend, x, timestep, text)[0]


def block_causal(
    params: Params,
    x: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
    *,
    config: TransformerConfig,
    causal: CausalConfig,
    clean: jax.Array | None = None,
    clean_timestep: float = 0.0,
) -> jax.Array:
    """Velocity of all blocks in one pass; a token sees its block and earlier ones (paper, eq. 5).

    ``timestep [B, F]`` is equal inside a block and free across blocks. With ``clean [B, F, h, w, C]`` (teacher
    forcing) a block sees itself and the *clean* copies of earlier blocks, which are told ``clean_timestep``.
    """
    frames = x.shape[1]
    positions = jnp.arange(frames)
    plan = attention.block_causal(frames, causal)
    if clean is not None:
        x = jnp.concatenate([clean, x], axis=1)
        timestep = jnp.concatenate([jnp.full_like(timestep, clean_timestep), timestep], axis=1)
        positions = jnp.concatenate([positions, positions])
        plan = attention.teacher_forcing(frames, causal)
    attend = _attend_plan(plan, rope.angles(positions, **_grid(x, config)), config)
    return _apply(params, config, attend, x, timestep, text, keep_frames=frames)[0]


def cache_spec(config: TransformerConfig, batch: int, mesh: Mesh) -> PartitionSpec:
    """How the keys and values ``[L, B, S, n, N, D]`` of a :class:`KVCache` lie on ``mesh``: split by heads."""
    axes = (None, "batch", None, None, "attention_heads", None)
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    return partition.spec_for(axes, (1, batch, 1, 1, config.num_heads, 1), sizes, config.rules)


def encode_text(params: Params, text: jax.Array, *, config: TransformerConfig) -> TextCache:
    """Cross-attention keys and values of every layer for text rows ``[B, S, E]``: once per prompt, not per pass."""
    context = embed_text(params["text_embedding"], text, config)
    k, v = jax.lax.map(lambda p: cross_keys_values(p, context, config), params["blocks"]["cross_attn"])
    return TextCache(k=k, v=v)


def cached(
    params: Params,
    x: jax.Array,
    timestep: jax.Array,
    text_cache: TextCache,
    cache: KVCache,
    *,
    config: TransformerConfig,
    causal: CausalConfig,
) -> tuple[jax.Array, KVCache]:
    """Velocity of one block ``x [B, K, h, w, C]`` given the cache, and the cache with the block's keys and values.

    The block is written at ``cache.position`` and the position does not move, so denoising steps of one block
    overwrite each other; :func:`advance` ends the block. Without a window, a block beyond the cache's capacity is the
    caller's error (the sampler refuses it before it starts).
    """
    frames = x.shape[1]
    slots = block_slots(cache.position, frames, causal)
    held = cache.frame.at[slots].set(cache.position + jnp.arange(frames, dtype=jnp.int32))
    mask = visible_slots(held, cache.position, frames, causal)
    grid = _grid(x, config)
    query_angle = rope.angles(jnp.arange(frames), **grid)
    key_angle = rope.angles(read_positions(held, cache.position, frames, causal), **grid)
    mask = jnp.repeat(mask, query_angle.shape[1])  # [S n]

    def kernel(q, k, v, layer_cache, slots, mask, query_angle, key_angle):
        keys, values = (
            old.at[:, slots].set(new.astype(old.dtype)) for old, new in zip(layer_cache, (k, v), strict=True)
        )
        q, rotated = rope.rotate(q, query_angle), rope.rotate(keys, key_angle)
        flat = [attention.flatten_frames(z) for z in (q, rotated, values)]
        out = attention.dense(*flat, dtype=config.dtype, backend=config.attention, mask=mask)
        return out.reshape(q.shape), (keys, values)

    def attend(q, k, v, layer_cache):
        whole = (slots, mask, query_angle, key_angle)
        return attention.attend_cache(kernel, q, k, v, layer_cache, *whole, rules=config.rules)

    velocity, (k, v) = _apply(params, config, attend, x, timestep, None, text_cache, (cache.k, cache.v))
    return velocity, dataclasses.replace(cache, k=k, v=v, frame=held)
