"""The Wan DiT: one network, one parameter tree, three readings.

| reading | a token sees | used by |
|---|---|---|
| :func:`bidirectional` | every token | teacher, fake score |
| :func:`block_causal` | its block and earlier ones, or clean copies of them | student in training |
| :func:`cached` | its block and the KV cache | student in streaming and in its own rollout |

All three predict the velocity ``noise - x0`` from noisy latents ``[B, F, h, w, C]``, a timestep per frame ``[B, F]`` in
[0, 1000] and text rows ``[B, S, E]``. With an image branch (``config.image_dim``, Wan2.1-I2V) they read image rows
``[B, image_tokens, image_dim]`` too, and x has the condition of ``models.image_branch`` in its channels. Linen
declares the parameters and scans the layers; what a layer computes is the plain function :func:`block`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from causvid_jax.config import CausalConfig, TransformerConfig, require
from causvid_jax.models import attention, image_branch, precision, rope
from causvid_jax.models.kv_cache import (
    KVCache,
    TextCache,
    advance,
    block_slots,
    init_cache,
    overwritten,
    read_positions,
    undo,
    visible_slots,
)
from causvid_jax.models.layers import PRODUCT, Params, gelu_tanh, timestep_sinusoid
from causvid_jax.models.precision import layer_norm, linear, mlp, modulate, rms_norm
from causvid_jax.sharding import constraints
from causvid_jax.sharding.params import (
    ParamSpec,
    abstract_tree,
    declare,
    inference_tree,
    init_tree,
    linear_spec,
    stack_spec,
)

__all__ = [
    "KVCache",
    "TextCache",
    "abstract",
    "advance",
    "bidirectional",
    "block_causal",
    "cached",
    "encode_text",
    "inference",
    "init",
    "init_cache",
    "overwritten",
    "spec",
    "undo",
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


def _image_attention_spec(dim: int) -> dict[str, Any]:
    return {
        "k_img": linear_spec(dim, dim, ("embed", "heads")),
        "v_img": linear_spec(dim, dim, ("embed", "heads")),
        "norm_k_img": {"scale": ParamSpec((dim,), ("embed",), nn.initializers.ones)},
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
        "cross_attn": _attention_spec(dim) | (_image_attention_spec(dim) if config.image_dim else {}),
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
        **({"image_embedding": image_branch.spec(config)} if config.image_dim else {}),
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


def inference(config: TransformerConfig) -> Params:
    """:func:`abstract` in the types that a sampler holds: what is rounded wherever it is used, is rounded for good."""
    return inference_tree(abstract(config), config.dtype, precision.float32_kernels(config))


# ---- one layer ------------------------------------------------------------------------------------------------------

Attend = Callable[..., Any]
TOKEN_AXES = ("batch", None, "tokens", None)  # of [B, F, n, M]
Context = tuple[jax.Array, jax.Array | None]  # embedded text [B, S, M] and image [B, I, M]


def _heads(x: jax.Array, num_heads: int) -> jax.Array:
    return rearrange(x, "... (N D) -> ... N D", N=num_heads)


def embed_context(p: Params, text: jax.Array, image: jax.Array | None, config: TransformerConfig) -> Context:
    """Text rows ``[B, S, E]`` and, with an image branch, image rows at the model width: ``[B, S, M]``, ``[B, I, M]``.

    Zero text rows become a constant, not zero.
    """
    image_branch.check(image, config)
    embedded = mlp(p["text_embedding"], text, gelu_tanh, config)
    return embedded, None if image is None else image_branch.embed(p["image_embedding"], image, config)


def cross_keys_values(p: Params, context: Context, config: TransformerConfig) -> TextCache:
    """Keys (RMS-normalised over the full width) and values ``[B, S, N, D]`` of one layer from embedded context."""

    def keys_values(x, suffix):
        k = rms_norm(linear(p[f"k{suffix}"], x, config), p[f"norm_k{suffix}"]["scale"], config)
        v = linear(p[f"v{suffix}"], x, config)
        return _heads(k, config.num_heads), _heads(v, config.num_heads)

    text, image = context
    return TextCache(*keys_values(text, ""), *(() if image is None else keys_values(image, "_img")))


def block(
    p: Params,
    x: jax.Array,
    time: jax.Array,
    text: Context | TextCache,
    layer_cache: Any,
    attend: Attend,
    config: TransformerConfig,
) -> tuple[jax.Array, Any]:
    """One DiT layer, with m = modulation + time ``[B, F, 6, M]``::

        x += m2 * SelfAttention(LN(x) (1 + m1) + m0)
        x += CrossAttention(LN_affine(x), text)
        x += m5 * FFN(LN(x) (1 + m4) + m3)

    With an image branch, cross-attention is the sum of an attention to the text and one to the image, under one output
    projection. ``x [B, F, n, M]``; ``text`` is the embedded context or this layer's ready keys and values;
    ``attend(q, k, v, layer_cache) -> (output, layer_cache)`` decides what a token sees.
    """
    parts = jnp.moveaxis(precision.modulation(p["modulation"], time, config), -2, 0)
    shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = parts

    with jax.named_scope("self_attention"):
        sa, y = p["self_attn"], modulate(layer_norm(x, config), shift_sa, scale_sa, config)
        q = _heads(rms_norm(linear(sa["q"], y, config), sa["norm_q"]["scale"], config), config.num_heads)
        k = _heads(rms_norm(linear(sa["k"], y, config), sa["norm_k"]["scale"], config), config.num_heads)
        v = _heads(linear(sa["v"], y, config), config.num_heads)  # [B, F, n, N, D]
        out, layer_cache = attend(q, k, v, layer_cache)
        out = linear(sa["o"], rearrange(out, "b f n N D -> b f n (N D)"), config)
        x = precision.add(x, out, config, gate_sa)

    with jax.named_scope("cross_attention"):
        ca, y = p["cross_attn"], layer_norm(x, config, p["norm3"])
        q = _heads(rms_norm(linear(ca["q"], y, config), ca["norm_q"]["scale"], config), config.num_heads)
        text = text if isinstance(text, TextCache) else cross_keys_values(ca, text, config)
        # All text slots are attended, padding included: that is what the published weights were trained with.
        attend_text = functools.partial(
            attention.attend_text,
            q,
            dtype=config.dtype,
            backend=precision.attention_backend(config),
            rules=config.rules,
        )
        out = attend_text(text.k, text.v)
        if text.image_k is not None and text.image_v is not None:
            out += attend_text(text.image_k, text.image_v)
        x = precision.add(x, linear(ca["o"], rearrange(out, "b f n N D -> b f n (N D)"), config), config)

    with jax.named_scope("ffn"):
        y = modulate(layer_norm(x, config), shift_ffn, scale_ffn, config)
        x = precision.add(x, mlp(p["ffn"], y, gelu_tanh, config), config, gate_ffn)
    return constraints.constrain(x, TOKEN_AXES, config.rules), layer_cache


def _embed_time(p: Params, timestep: jax.Array, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Timesteps ``[B, F]`` as the head reads them, ``[B, F, M]``, and as the layers do, ``[B, F, 6, M]``."""
    island, net = functools.partial(precision.island_linear, config=config), p["time_embedding"]
    e = island(net["fc2"], nn.silu(island(net["fc1"], timestep_sinusoid(timestep, config.freq_dim))))
    return e, rearrange(island(p["time_projection"], nn.silu(e)), "b f (s M) -> b f s M", s=6)


def gather(p: Params, layer_spec: Any, config: TransformerConfig) -> Params:
    """The parameters of one layer, whole along ``embed`` on every device: FSDP's all-gather, one layer at a time."""
    if not constraints.mesh_shape():
        return p

    def whole(leaf: ParamSpec, value: jax.Array) -> jax.Array:
        axes = [None if axis == "embed" else axis for axis in leaf.axes]
        return constraints.constrain(value, axes, config.rules)

    return jax.tree.map(whole, layer_spec, p, is_leaf=lambda x: isinstance(x, ParamSpec))


LAYER_INPUT = "layer_input"


def rematerialised(layer: Any, remat: str | bool) -> Any:
    """The linen module ``layer``, whose backward pass finds what ``remat`` (:class:`TransformerConfig`) says kept."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    if remat == "offload" and constraints.platform() == "cpu":
        remat = "full"  # the layers' inputs lie in the host's memory already
    policy = {
        "full": policies.nothing_saveable,
        "attention": policies.save_only_these_names(attention.RESULT),
        # By name: jax's own policies for products do not see into a function with a derivative of its own (matmul).
        "dots": policies.save_only_these_names(attention.RESULT, PRODUCT),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[str(remat)]
    return nn.remat(layer, prevent_cse=False, policy=policy)


class _Layer(nn.Module):
    """Declares one layer's parameters to linen, for :func:`flax.linen.scan`."""

    config: TransformerConfig
    attend: Attend

    @nn.compact
    def __call__(self, x, time, context, layer_inputs):
        p = gather(declare(self, _block_spec(self.config)), _block_spec(self.config), self.config)
        text, layer_cache = layer_inputs
        x = checkpoint_name(x, LAYER_INPUT)
        return block(p, x, time, context if text is None else text, layer_cache, self.attend, self.config)


class _Transformer(nn.Module):
    """Declares all parameters and runs embedding, the scanned layers and the head."""

    config: TransformerConfig
    attend: Attend

    @nn.compact
    def __call__(self, x, timestep, text, image, text_cache, layer_caches, keep_frames: int):
        config = self.config
        p = gather(declare(self, _outer_spec(config)), _outer_spec(config), config)

        with jax.named_scope("embed"):
            _, patch_h, patch_w = config.patch_size
            rows, columns = x.shape[2] // patch_h, x.shape[3] // patch_w
            tokens = rearrange(x, "b f (r p) (c q) C -> b f (r c) (p q C)", p=patch_h, q=patch_w)
            tokens = linear(p["patch_embedding"], tokens, config)  # [B, F, n, M]
            tokens = constraints.constrain(tokens, TOKEN_AXES, config.rules)
            e, time = _embed_time(p, timestep, config)
            context = None if text is None else embed_context(p, text, image, config)

        scanned = nn.scan(
            rematerialised(_Layer, config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=config.num_layers,
        )
        layers = scanned(config, self.attend, name="blocks")
        tokens, layer_caches = layers(tokens, time, context, (text_cache, layer_caches))

        with jax.named_scope("head"):
            tokens, e = tokens[:, -keep_frames:], e[:, -keep_frames:]
            parts = precision.modulation(p["head"]["modulation"], e[:, :, None], config)
            shift, scale = jnp.moveaxis(parts, -2, 0)
            y = modulate(layer_norm(tokens, config), shift, scale, config)
            out = precision.head_linear(p["head"]["proj"], y, config)
            out = rearrange(out, "b f (r c) (p q C) -> b f (r p) (c q) C", r=rows, c=columns, p=patch_h, q=patch_w)
        return out, layer_caches


def _apply(
    params, config, attend, x, timestep, text, image=None, *, text_cache=None, layer_caches=None, keep_frames=None
):
    require(
        x.shape[-1] == config.in_channels,
        f"the input has {x.shape[-1]} channels; this transformer reads {config.in_channels}",
    )
    module = _Transformer(config, attend)
    return module.apply(
        {"params": params},
        x,
        timestep,
        text,
        image,
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
        out = attention.attend(
            plan, q, k, v, dtype=config.dtype, backend=precision.attention_backend(config), rules=config.rules
        )
        return out, None

    return attend


# ---- three readings -------------------------------------------------------------------------------------------------


def bidirectional(
    params: Params,
    x: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
    image: jax.Array | None = None,
    *,
    config: TransformerConfig,
) -> jax.Array:
    """Velocity ``[B, F, h, w, C]``; every token sees every token (teacher and fake score).

    ``image``: rows ``[B, image_tokens, image_dim]``, exactly where ``config`` has an image branch.
    """
    angle = rope.angles(jnp.arange(x.shape[1]), **_grid(x, config))

    attend = _attend_plan(attention.everything(x.shape[1]), angle, config)
    return _apply(params, config, attend, x, timestep, text, image)[0]


def block_causal(
    params: Params,
    x: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
    image: jax.Array | None = None,
    *,
    config: TransformerConfig,
    causal: CausalConfig,
    clean: jax.Array | None = None,
    clean_timestep: float = 0.0,
) -> jax.Array:
    """Velocity of all blocks in one pass; a token sees its block and earlier ones (paper, eq. 5).

    ``timestep [B, F]`` is equal inside a block and free across blocks. With ``clean [B, F, h, w, C]`` (teacher
    forcing) a block sees itself and the *clean* copies of earlier blocks, which are told ``clean_timestep``.
    ``image`` as in :func:`bidirectional`.
    """
    frames = x.shape[1]
    positions = jnp.arange(frames)
    plan = attention.block_causal(frames, causal)
    # A clip of one block has no past: its clean copy would cost as much as itself and be seen by nobody.
    if clean is not None and len(causal.block_sizes(frames)) > 1:
        x = jnp.concatenate([clean, x], axis=1)
        timestep = jnp.concatenate([jnp.full_like(timestep, clean_timestep), timestep], axis=1)
        positions = jnp.concatenate([positions, positions])
        plan = attention.teacher_forcing(frames, causal)
    attend = _attend_plan(plan, rope.angles(positions, **_grid(x, config)), config)
    return _apply(params, config, attend, x, timestep, text, image, keep_frames=frames)[0]


def encode_text(
    params: Params, text: jax.Array, image: jax.Array | None = None, *, config: TransformerConfig
) -> TextCache:
    """Cross-attention keys and values of every layer for text rows ``[B, S, E]``: once per prompt, not per pass.

    ``image`` as in :func:`bidirectional`; its keys and values are part of the cache.
    """
    context = embed_context(params, text, image, config)
    return jax.lax.map(lambda p: cross_keys_values(p, context, config), params["blocks"]["cross_attn"])


def cached(
    params: Params,
    x: jax.Array,
    timestep: jax.Array,
    text_cache: TextCache,
    cache: KVCache,
    *,
    config: TransformerConfig,
    causal: CausalConfig,
    rewrites: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Velocity of one block ``x [B, K, h, w, C]`` given the cache, and the cache with the block's keys and values.

    The block is written at ``cache.position`` and the position does not move, so denoising steps of one block
    overwrite each other; :func:`advance` ends the block. Without a window, a block beyond the cache's capacity is the
    caller's error (the sampler refuses it before it starts). ``rewrites``, static, allows for a cache that holds later
    frames than the block, because its position has been moved back.
    """
    frames = x.shape[1]
    slots = block_slots(cache.position, frames, causal)
    held = cache.frame.at[slots].set(cache.position + jnp.arange(frames, dtype=jnp.int32))
    mask = visible_slots(held, cache.position, frames, causal)
    grid = _grid(x, config)
    # Attention knows differences of positions only; the published code's rounding knows absolute ones.
    origin = 0 if config.precision == "default" else cache.position
    query_angle = rope.angles(origin + jnp.arange(frames), **grid)
    key_angle = rope.angles(origin + read_positions(held, cache.position, frames, causal), **grid)
    tokens = query_angle.shape[1]
    mask = jnp.repeat(mask, tokens)  # [S n]
    in_use = tokens * jnp.minimum(cache.position + frames, held.shape[0])

    def kernel(q, k, v, layer_cache, slots, mask, in_use, query_angle, key_angle):
        keys, values = (
            old.at[:, slots].set(new.astype(old.dtype)) for old, new in zip(layer_cache, (k, v), strict=True)
        )
        q, rotated = rope.rotate(q, query_angle), rope.rotate(keys, key_angle)
        flat = [attention.flatten_frames(z) for z in (q, rotated, values)]
        backend, used = precision.attention_backend(config), None if rewrites else in_use
        out = attention.dense(*flat, dtype=config.dtype, backend=backend, mask=mask, used=used)
        return out.reshape(q.shape), (keys, values)

    def attend(q, k, v, layer_cache):
        whole = (slots, mask, in_use, query_angle, key_angle)
        return attention.attend_cache(kernel, q, k, v, layer_cache, *whole, rules=config.rules)

    layer_caches = (cache.k, cache.v)
    velocity, (k, v) = _apply(
        params, config, attend, x, timestep, None, text_cache=text_cache, layer_caches=layer_caches
    )
    return velocity, dataclasses.replace(cache, k=k, v=v, frame=held)
