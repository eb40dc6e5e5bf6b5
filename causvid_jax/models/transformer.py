"""The Wan diffusion transformer: one network and one parameter tree with three forward modes.

| forward mode | a token attends to | used by |
|---|---|---|
| :func:`bidirectional` | every token | teacher, fake score |
| :func:`block_causal` | its block and earlier ones, or clean copies of them | student in training |
| :func:`cached` | its block and the KV cache | student in streaming and in self-rollout |

All modes predict the velocity ``noise - x0`` from noisy latents ``[B, F, h, w, C]``, a timestep per frame ``[B, F]`` in
[0, 1000] and ``prompt_embeds [B, S, E]``. With an image branch (``config.image_dim``, Wan2.1-I2V) they also take
``image_embeds [B, image_tokens, image_dim]``, and x has the condition channels of ``models.image_branch``. Linen
declares the parameters and scans the layers. The plain function :func:`block` computes one layer.

Source: Wan2.1, arXiv 2503.20314, ``wan/modules/model.py``.
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
from jaxtyping import Float

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
from causvid_jax.models.transformer_spec import block_spec, outer_spec, spec
from causvid_jax.sharding import constraints
from causvid_jax.sharding.params import (
    ParamSpec,
    abstract_tree,
    declare,
    inference_tree,
    init_tree,
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


def init(key: jax.Array, config: TransformerConfig) -> Params:
    """Return new float32 parameters."""
    return init_tree(key, spec(config))


def abstract(config: TransformerConfig) -> Params:
    """Return the ``jax.ShapeDtypeStruct`` of every parameter."""
    return abstract_tree(spec(config))


def inference(config: TransformerConfig) -> Params:
    """Return :func:`abstract` with a sampler's types: parameters that every use rounds are stored rounded."""
    return inference_tree(abstract(config), config.dtype, precision.float32_kernels(config))


# ---- one layer ------------------------------------------------------------------------------------------------------

Attend = Callable[..., Any]
TOKEN_AXES = ("batch", None, "tokens", None)  # of [B, F, n, M]
Context = tuple[jax.Array, jax.Array | None]  # text [B, S, M] and image [B, I, M] at the model width


def _heads(x: jax.Array, num_heads: int) -> jax.Array:
    return rearrange(x, "... (N D) -> ... N D", N=num_heads)


def embed_context(
    p: Params, prompt_embeds: jax.Array, image_embeds: jax.Array | None, config: TransformerConfig
) -> Context:
    """Map ``prompt_embeds [B, S, E]`` and ``image_embeds`` to the model width: ``[B, S, M]`` and ``[B, I, M]`` or None.

    A zero row of ``prompt_embeds`` (padding) becomes a constant that is not zero.
    """
    image_branch.check(image_embeds, config)
    text = mlp(p["text_embedding"], prompt_embeds, gelu_tanh, config)
    return text, None if image_embeds is None else image_branch.embed(p["image_embedding"], image_embeds, config)


def cross_keys_values(p: Params, context: Context, config: TransformerConfig) -> TextCache:
    """Return one layer's keys (RMS-normalized over the full width) and values ``[B, S, N, D]`` of the context."""

    def keys_values(x: jax.Array, suffix: str) -> tuple[jax.Array, jax.Array]:
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
    """Apply one layer, with m = modulation + time ``[B, F, 6, M]``::

        x += m2 * SelfAttention(LN(x) (1 + m1) + m0)
        x += CrossAttention(LN_affine(x), text)
        x += m5 * FFN(LN(x) (1 + m4) + m3)

    With an image branch, cross-attention is the sum of attention to the text and attention to the image, before one
    output projection.

    Args:
      p: parameters of the layer.
      x: tokens ``[B, F, n, M]``.
      time: projected timesteps ``[B, F, 6, M]``.
      text: the context at model width, or this layer's keys and values of it.
      layer_cache: passed to ``attend``.
      attend: ``(q, k, v, layer_cache) -> (output, layer_cache)``, the self-attention of the forward mode.
      config: sizes and precision.
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
        # Attend to all text tokens including padding, as in the training of the published weights.
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
    """Embed timesteps ``[B, F]`` for the head, ``[B, F, M]``, and for the layers, ``[B, F, 6, M]``."""
    apply, net = functools.partial(precision.time_linear, config=config), p["time_embedding"]
    e = apply(net["fc2"], nn.silu(apply(net["fc1"], timestep_sinusoid(timestep, config.freq_dim))))
    return e, rearrange(apply(p["time_projection"], nn.silu(e)), "b f (s M) -> b f s M", s=6)


def all_gather(p: Params, layer_spec: Any, config: TransformerConfig) -> Params:
    """Gather the parameters of one layer along ``embed`` on every device (the all-gather of FSDP, layer by layer)."""
    if not constraints.mesh_shape():
        return p

    def gather(leaf: ParamSpec, value: jax.Array) -> jax.Array:
        axes = [None if axis == "embed" else axis for axis in leaf.axes]
        return constraints.constrain(value, axes, config.rules)

    return jax.tree.map(gather, layer_spec, p, is_leaf=lambda x: isinstance(x, ParamSpec))


LAYER_INPUT = "layer_input"


def rematerialize(layer: Any, remat: str | bool) -> Any:
    """Rematerialize the linen module ``layer``; ``remat`` (:class:`TransformerConfig`) says which results are kept."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    if remat == "offload" and constraints.platform() == "cpu":
        remat = "full"  # layer inputs are in host memory already
    policy = {
        "full": policies.nothing_saveable,
        "attention": policies.save_only_these_names(attention.RESULT),
        # Select by name: JAX's policies for products do not apply inside a function with a custom derivative (matmul).
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
    """Declare one layer's parameters to linen, for :func:`flax.linen.scan`."""

    config: TransformerConfig
    attend: Attend

    @nn.compact
    def __call__(
        self, x: jax.Array, time: jax.Array, context: Context | None, layer_inputs: tuple[TextCache | None, Any]
    ) -> tuple[jax.Array, Any]:
        p = all_gather(declare(self, block_spec(self.config)), block_spec(self.config), self.config)
        text_cache, layer_cache = layer_inputs
        x = checkpoint_name(x, LAYER_INPUT)
        text = context if text_cache is None else text_cache
        assert text is not None, "cross-attention needs embeddings or cached keys and values"
        return block(p, x, time, text, layer_cache, self.attend, self.config)


class _Transformer(nn.Module):
    """Declare all parameters and run embedding, the scanned layers and the head."""

    config: TransformerConfig
    attend: Attend

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        timestep: jax.Array,
        prompt_embeds: jax.Array | None,
        image_embeds: jax.Array | None,
        text_cache: TextCache | None,
        layer_caches: Any,
        keep_frames: int,
    ) -> tuple[jax.Array, Any]:
        config = self.config
        p = all_gather(declare(self, outer_spec(config)), outer_spec(config), config)

        with jax.named_scope("embed"):
            _, patch_h, patch_w = config.patch_size
            rows, columns = x.shape[2] // patch_h, x.shape[3] // patch_w
            tokens = rearrange(x, "b f (r p) (c q) C -> b f (r c) (p q C)", p=patch_h, q=patch_w)
            tokens = linear(p["patch_embedding"], tokens, config)  # [B, F, n, M]
            tokens = constraints.constrain(tokens, TOKEN_AXES, config.rules)
            e, time = _embed_time(p, timestep, config)
            context = None if prompt_embeds is None else embed_context(p, prompt_embeds, image_embeds, config)

        scanned = nn.scan(
            rematerialize(_Layer, config.remat),
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
    params: Params,
    config: TransformerConfig,
    attend: Attend,
    x: jax.Array,
    timestep: jax.Array,
    prompt_embeds: jax.Array | None,
    image_embeds: jax.Array | None = None,
    *,
    text_cache: TextCache | None = None,
    layer_caches: Any = None,
    keep_frames: int | None = None,
) -> tuple[jax.Array, Any]:
    """Run the network with self-attention ``attend``; ``keep_frames`` limits the output to the last frames."""
    require(
        x.shape[-1] == config.in_channels,
        f"the input has {x.shape[-1]} channels; this transformer requires {config.in_channels}",
    )
    module = _Transformer(config, attend)
    return module.apply(
        {"params": params},
        x,
        timestep,
        prompt_embeds,
        image_embeds,
        text_cache,
        layer_caches,
        x.shape[1] if keep_frames is None else keep_frames,
    )


def _grid(x: jax.Array, config: TransformerConfig) -> dict[str, Any]:
    """Return the keyword arguments of :func:`rope.angles` for latents ``x``."""
    _, patch_h, patch_w = config.patch_size
    return {
        "rows": x.shape[2] // patch_h,
        "columns": x.shape[3] // patch_w,
        "head_dim": config.head_dim,
        "theta": config.rope_theta,
    }


def _attend_plan(plan: attention.Plan, angle: jax.Array, config: TransformerConfig) -> Attend:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: None) -> tuple[jax.Array, None]:
        q, k = rope.rotate(q, angle), rope.rotate(k, angle)
        out = attention.attend(
            plan, q, k, v, dtype=config.dtype, backend=precision.attention_backend(config), rules=config.rules
        )
        return out, None

    return attend


# ---- forward modes --------------------------------------------------------------------------------------------------


def bidirectional(
    params: Params,
    x: Float[jax.Array, "B F h w C"],
    timestep: Float[jax.Array, "B F"],
    prompt_embeds: Float[jax.Array, "B S E"],
    image_embeds: Float[jax.Array, "B I G"] | None = None,
    *,
    config: TransformerConfig,
) -> Float[jax.Array, "B F h w V"]:
    """Return the velocity ``[B, F, h, w, C]``; every token attends to every token (teacher and fake score).

    ``image_embeds [B, image_tokens, image_dim]`` is required if ``config`` has an image branch, and refused otherwise.
    """
    angle = rope.angles(jnp.arange(x.shape[1]), **_grid(x, config))

    attend = _attend_plan(attention.bidirectional(x.shape[1]), angle, config)
    return _apply(params, config, attend, x, timestep, prompt_embeds, image_embeds)[0]


def block_causal(
    params: Params,
    x: Float[jax.Array, "B F h w C"],
    timestep: Float[jax.Array, "B F"],
    prompt_embeds: Float[jax.Array, "B S E"],
    image_embeds: Float[jax.Array, "B I G"] | None = None,
    *,
    config: TransformerConfig,
    causal: CausalConfig,
    clean: Float[jax.Array, "B F h w C"] | None = None,
    clean_timestep: float = 0.0,
) -> Float[jax.Array, "B F h w V"]:
    """Return the velocity of all blocks in one pass; a token attends to its block and earlier ones (CausVid, eq. 5).

    All frames of a block have the same timestep; blocks may differ. With ``clean`` (teacher forcing) a block attends to
    its own noisy frames and to the *clean* copies of earlier blocks, which are conditioned on ``clean_timestep``.
    ``image_embeds`` is as in :func:`bidirectional`.
    """
    frames = x.shape[1]
    positions = jnp.arange(frames)
    plan = attention.block_causal(frames, causal)
    # In a clip of one block no token attends to the clean copy, so leave it out.
    if clean is not None and len(causal.block_sizes(frames)) > 1:
        x = jnp.concatenate([clean, x], axis=1)
        timestep = jnp.concatenate([jnp.full_like(timestep, clean_timestep), timestep], axis=1)
        positions = jnp.concatenate([positions, positions])
        plan = attention.teacher_forcing(frames, causal)
    attend = _attend_plan(plan, rope.angles(positions, **_grid(x, config)), config)
    return _apply(params, config, attend, x, timestep, prompt_embeds, image_embeds, keep_frames=frames)[0]


def encode_text(
    params: Params,
    prompt_embeds: Float[jax.Array, "B S E"],
    image_embeds: Float[jax.Array, "B I G"] | None = None,
    *,
    config: TransformerConfig,
) -> TextCache:
    """Return the cross-attention keys and values of all layers, to compute them once per prompt and not per pass.

    ``image_embeds`` is as in :func:`bidirectional`; the cache includes its keys and values.
    """
    context = embed_context(params, prompt_embeds, image_embeds, config)
    return jax.lax.map(lambda p: cross_keys_values(p, context, config), params["blocks"]["cross_attn"])


def cached(
    params: Params,
    x: Float[jax.Array, "B K h w C"],
    timestep: Float[jax.Array, "B K"],
    text_cache: TextCache,
    cache: KVCache,
    *,
    config: TransformerConfig,
    causal: CausalConfig,
    rewrites: bool = False,
) -> tuple[Float[jax.Array, "B K h w V"], KVCache]:
    """Return the velocity of one block ``x [B, K, h, w, C]`` and the cache with the block's keys and values.

    The block is written at ``cache.position``, which does not change: the denoising steps of a block overwrite each
    other, and :func:`advance` finishes the block. Without a window the caller must not exceed the cache's capacity; the
    sampler checks this before it starts. Set ``rewrites`` (static) if the cache may hold frames later than the block,
    because its position has been moved back.
    """
    frames = x.shape[1]
    slots = block_slots(cache.position, frames, causal)
    slot_frames = cache.frame.at[slots].set(cache.position + jnp.arange(frames, dtype=jnp.int32))
    mask = visible_slots(slot_frames, cache.position, frames, causal)
    grid = _grid(x, config)
    # RoPE attention depends on relative positions only, but rounding the rotated values depends on absolute ones, so
    # ``wan`` and ``causvid`` need the true origin.
    origin = 0 if config.precision == "default" else cache.position
    query_angle = rope.angles(origin + jnp.arange(frames), **grid)
    key_angle = rope.angles(origin + read_positions(slot_frames, cache.position, frames, causal), **grid)
    tokens = query_angle.shape[1]
    mask = jnp.repeat(mask, tokens)  # [S n]
    in_use = tokens * jnp.minimum(cache.position + frames, slot_frames.shape[0])

    def kernel(
        q: jax.Array, k: jax.Array, v: jax.Array, layer_cache: Any, *replicated: jax.Array
    ) -> tuple[jax.Array, Any]:
        slots, mask, in_use, query_angle, key_angle = replicated
        keys, values = (
            old.at[:, slots].set(new.astype(old.dtype)) for old, new in zip(layer_cache, (k, v), strict=True)
        )
        q, rotated = rope.rotate(q, query_angle), rope.rotate(keys, key_angle)
        flat = [attention.flatten_frames(z) for z in (q, rotated, values)]
        backend, used = precision.attention_backend(config), None if rewrites else in_use
        out = attention.dense(*flat, dtype=config.dtype, backend=backend, mask=mask, used=used)
        return out.reshape(q.shape), (keys, values)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer_cache: Any) -> tuple[jax.Array, Any]:
        replicated = (slots, mask, in_use, query_angle, key_angle)
        return attention.attend_cache(kernel, q, k, v, layer_cache, *replicated, rules=config.rules)

    layer_caches = (cache.k, cache.v)
    velocity, (k, v) = _apply(
        params, config, attend, x, timestep, None, text_cache=text_cache, layer_caches=layer_caches
    )
    return velocity, dataclasses.replace(cache, k=k, v=v, frame=slot_frames)
