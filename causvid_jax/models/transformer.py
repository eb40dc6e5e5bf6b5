"""The Wan diffusion transformer: one network and one parameter tree with three forward modes.

| forward mode | a token attends to | used by |
|---|---|---|
| :func:`bidirectional` | every token | teacher, fake score |
| :func:`block_causal` | its block and earlier ones, or clean copies of them | student in training |
| :func:`cached` | its block and the KV cache | student in streaming and in self-rollout |

All modes predict the velocity ``noise - x0`` from noisy latents ``[B, F, h, w, C]``, a timestep per frame ``[B, F]`` in
[0, 1000] and ``prompt_embeds [B, S, E]``. With an image branch (``config.image_dim``, Wan2.1-I2V) they also take
``image_embeds [B, image_tokens, image_dim]``, and x has the condition channels of ``models.image_branch``. Linen
declares the parameters and scans the layers. The plain function ``transformer_layer.block`` computes one layer. For
streaming, ``models.unstacked`` gives every layer its own arrays, and the layers run in a loop.

Source: Wan2.1, arXiv 2503.20314, ``wan/modules/model.py``.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from causvid_jax.config import CausalConfig, TransformerConfig, require
from causvid_jax.models import adapters, attention, int8_linear, precision, self_attention
from causvid_jax.models.int8_linear import round_parameter, round_params
from causvid_jax.models.kv_cache import (
    KVCache,
    TextCache,
    advance,
    block_slots,
    init_cache,
    write_slots,
)
from causvid_jax.models.layers import Params
from causvid_jax.models.precision import layer_norm, linear, modulate
from causvid_jax.models.remat import LAYER_INPUT, rematerialize
from causvid_jax.models.transformer_layer import (
    TOKEN_AXES,
    Attend,
    Context,
    all_gather,
    block,
    cross_keys_values,
    embed_context,
    embed_time,
    pool_tokens,
    text_layer,
)
from causvid_jax.models.transformer_spec import block_spec, inference_spec, outer_spec, spec
from causvid_jax.models.unstacked import is_unstacked, unstack
from causvid_jax.sharding import constraints
from causvid_jax.sharding.params import abstract_tree, declare, inference_tree, init_tree

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
    "inference_spec",
    "init",
    "init_cache",
    "pooled_features",
    "read_shapes",
    "round_parameter",
    "round_params",
    "spec",
    "unstack",
]


# ---- parameters -----------------------------------------------------------------------------------------------------


def init(key: jax.Array, config: TransformerConfig) -> Params:
    """Return new float32 parameters, with Wan's initializers (:func:`spec`)."""
    return init_tree(key, spec(config))


def abstract(config: TransformerConfig) -> Params:
    """Return the ``jax.ShapeDtypeStruct`` of every parameter."""
    return abstract_tree(spec(config))


def inference(config: TransformerConfig, *, unstacked: bool = False) -> Params:
    """Return shapes and types of the parameters of a sampler. Kernels that are rounded in every use are stored rounded.

    With ``unstacked`` the parameters have the form of ``models.unstacked``.
    """
    shapes = abstract_tree(inference_spec(config))
    stacked = inference_tree(shapes, config.dtype, precision.float32_kernels(config))
    return jax.eval_shape(functools.partial(unstack, config=config), stacked) if unstacked else stacked


def read_shapes(config: TransformerConfig) -> Params:
    """Return shapes and types in which a sampler reads parameters from a file, before :func:`round_parameter`."""
    return inference(dataclasses.replace(config, linear="dtype"))


# ---- layers ---------------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """Declare one layer's parameters to linen, for :func:`flax.linen.scan`."""

    config: TransformerConfig
    attend: Attend
    pooled: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, time: jax.Array, context: Context | None, layer_inputs: tuple[TextCache | None, Any]
    ) -> tuple[jax.Array, Any]:
        p = all_gather(declare(self, block_spec(self.config)), block_spec(self.config), self.config)
        text_cache, layer_cache = layer_inputs
        x = checkpoint_name(x, LAYER_INPUT)
        text = context if text_cache is None else text_cache
        assert text is not None, "cross-attention needs embeddings or cached keys and values"
        if self.pooled:
            x, _ = block(p, x, time, text, None, self.attend, self.config)
            return x, pool_tokens(x, layer_cache, self.config)
        return block(p, x, time, text, layer_cache, self.attend, self.config)


class _Transformer(nn.Module):
    """Declare all parameters and run embedding, the scanned layers and the head."""

    config: TransformerConfig
    attend: Attend
    pooled: bool = False

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
        unstacked: Sequence[Params] | None = None,
    ) -> tuple[jax.Array, Any]:
        config = self.config
        p = all_gather(declare(self, outer_spec(config)), outer_spec(config), config)

        with jax.named_scope("embed"):
            _, patch_h, patch_w = config.patch_size
            rows, columns = x.shape[2] // patch_h, x.shape[3] // patch_w
            tokens = rearrange(x, "b f (r p) (c q) C -> b f (r c) (p q C)", p=patch_h, q=patch_w)
            tokens = linear(p["patch_embedding"], tokens, config)  # [B, F, n, M]
            tokens = constraints.constrain(tokens, TOKEN_AXES, config.rules)
            e, time = embed_time(p, timestep, config)
            context = None if prompt_embeds is None else embed_context(p, prompt_embeds, image_embeds, config)

        if unstacked is None:
            tokens, layer_caches = self._scan(tokens, time, context, (text_cache, layer_caches))
        else:
            tokens, layer_caches = self._loop(unstacked, tokens, time, context, text_cache, layer_caches)

        with jax.named_scope("head"):
            tokens, e = tokens[:, -keep_frames:], e[:, -keep_frames:]
            parts = precision.modulation(p["head"]["modulation"], e[:, :, None], config)
            shift, scale = jnp.moveaxis(parts, -2, 0)
            y = modulate(layer_norm(tokens, config), shift, scale, config)
            out = precision.head_linear(p["head"]["proj"], y, config)
            out = rearrange(out, "b f (r c) (p q C) -> b f (r p) (c q) C", r=rows, c=columns, p=patch_h, q=patch_w)
        return out, layer_caches

    def _scan(
        self, tokens: jax.Array, time: jax.Array, context: Context | None, layer_inputs: tuple[TextCache | None, Any]
    ) -> tuple[jax.Array, Any]:
        """Run the stacked layers, each on its slice of ``layer_inputs``."""
        scanned = nn.scan(
            rematerialize(_Layer, self.config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=self.config.num_layers,
        )
        return scanned(self.config, self.attend, self.pooled, name="blocks")(tokens, time, context, layer_inputs)

    def _loop(
        self,
        layers: Sequence[Params],
        tokens: jax.Array,
        time: jax.Array,
        context: Context | None,
        text_cache: TextCache | None,
        layer_caches: Sequence[Any] | None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Run unstacked layers one after the other. A layer is traced and lowered once; XLA inlines its calls."""

        @jax.jit
        def layer(p: Params, tokens: jax.Array, time: jax.Array, text: Any, layer_cache: Any) -> tuple[jax.Array, Any]:
            p = all_gather(p, block_spec(self.config), self.config)
            return block(p, tokens, time, text, layer_cache, self.attend, self.config)

        new = []
        for i, p in enumerate(layers):
            text = context if text_cache is None else text_layer(text_cache, i)
            assert text is not None, "cross-attention needs embeddings or cached keys and values"
            layer_cache = None if layer_caches is None else layer_caches[i]
            tokens, layer_cache = layer(p, tokens, time, text, layer_cache)
            new.append(layer_cache)
        return tokens, tuple(new)


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
    pooled: bool = False,
) -> tuple[jax.Array, Any]:
    """Run the network with self-attention ``attend``; ``keep_frames`` limits the output to the last frames.

    If ``pooled``, ``layer_caches [L, M]`` are queries, and their pooled features are returned instead of caches.
    """
    require(
        x.shape[-1] == config.in_channels,
        f"the input has {x.shape[-1]} channels; this transformer requires {config.in_channels}",
    )
    int8_linear.check(params, config)
    adapters.check(params, config)
    module = _Transformer(config, attend, pooled)
    unstacked = params["blocks"] if is_unstacked(params) else None
    declared = {name: value for name, value in params.items() if name != "blocks"} if unstacked else params
    return module.apply(
        {"params": declared},
        x,
        timestep,
        prompt_embeds,
        image_embeds,
        text_cache,
        layer_caches,
        x.shape[1] if keep_frames is None else keep_frames,
        unstacked,
    )


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
    """Return the velocity, float32 ``[B, F, h, w, C]``; every token attends to every token (teacher and fake score).

    Args:
        params: of :func:`spec`, stacked or unstacked.
        x: noisy latents, ``[B, F, h, w, C]``.
        timestep: ``[B, F]``, in [0, 1000].
        prompt_embeds: ``[B, S, E]``; padding rows are zero and are attended to.
        image_embeds: ``[B, image_tokens, image_dim]`` for a network with an image branch, else None.
        config: sizes, precision, kernels.

    Raises:
        ConfigError: the channels of x, ``image_embeds`` or the form of the kernels do not fit ``config``.
    """
    attend = self_attention.attend_plan(attention.bidirectional(x.shape[1]), jnp.arange(x.shape[1]), x, params, config)
    return _apply(params, config, attend, x, timestep, prompt_embeds, image_embeds)[0]


def pooled_features(
    params: Params,
    x: Float[jax.Array, "B F h w C"],
    timestep: Float[jax.Array, "B F"],
    prompt_embeds: Float[jax.Array, "B S E"],
    queries: Float[jax.Array, "L M"],
    *,
    config: TransformerConfig,
) -> Float[jax.Array, "L B M"]:
    """Return the features after every layer of :func:`bidirectional`, pooled by one query per layer: ``[L, B, M]``.

    ``queries`` are ``[L, M]``; the pooling is :func:`causvid_jax.models.transformer_layer.pool_tokens`. A discriminator
    reads the features (``distill.gan``). The tokens of the layers are not kept.
    """
    attend = self_attention.attend_plan(attention.bidirectional(x.shape[1]), jnp.arange(x.shape[1]), x, params, config)
    return _apply(params, config, attend, x, timestep, prompt_embeds, layer_caches=queries, pooled=True)[1]


def block_causal(
    params: Params,
    x: Float[jax.Array, "B F h w C"],
    timestep: Float[jax.Array, "B F"],
    prompt_embeds: Float[jax.Array, "B S E"],
    image_embeds: Float[jax.Array, "B I G"] | None = None,
    *,
    config: TransformerConfig,
    causal: CausalConfig,
    clean: Float[jax.Array, "B P h w C"] | None = None,
    clean_timestep: float = 0.0,
) -> Float[jax.Array, "B F h w V"]:
    """Return the velocity of all blocks in one pass; a token attends to its block and earlier ones (CausVid, eq. 5).

    All frames of a block have the same timestep; blocks may differ. With ``clean`` (teacher forcing) a block attends to
    its own noisy frames and to *clean* copies of earlier blocks at ``clean_timestep`` in [0, 1000]. ``clean`` may have
    earlier whole blocks, a past that ``x`` continues. Other arguments are those of :func:`bidirectional`.

    Raises:
        ConfigError: as :func:`bidirectional`, the frames are not a whole number of blocks, or the clean copies are
            fewer than the frames of x or do not begin with whole blocks.
    """
    frames = x.shape[1]
    positions = jnp.arange(frames)
    plan = attention.block_causal(frames, causal)
    if clean is not None:
        require(
            clean.shape[1] >= frames,
            f"the clean copies have {clean.shape[1]} latent frames, fewer than the {frames} noisy ones; they must "
            "include a copy of each",
        )
    # In a clip of one block no token attends to the clean copy, so leave it out.
    if clean is not None and len(causal.block_sizes(clean.shape[1])) > 1:
        copies, past = clean.shape[1], clean.shape[1] - frames
        x = jnp.concatenate([clean, x], axis=1)
        at_clean = jnp.full((timestep.shape[0], copies), clean_timestep, timestep.dtype)
        timestep = jnp.concatenate([at_clean, timestep], axis=1)
        positions = jnp.concatenate([jnp.arange(copies), past + positions])
        plan = attention.teacher_forcing(copies, causal, past)
    attend = self_attention.attend_plan(plan, positions, x, params, config)
    return _apply(params, config, attend, x, timestep, prompt_embeds, image_embeds, keep_frames=frames)[0]


def encode_text(
    params: Params,
    prompt_embeds: Float[jax.Array, "B S E"],
    image_embeds: Float[jax.Array, "B I G"] | None = None,
    *,
    config: TransformerConfig,
) -> TextCache:
    """Return the cross-attention keys and values of all layers, which are computed once per prompt, not per pass.

    Arguments and errors are those of :func:`bidirectional`. The cache includes keys and values of ``image_embeds``.
    """
    int8_linear.check(params, config)
    context = embed_context(params, prompt_embeds, image_embeds, config)
    if is_unstacked(params):
        layers = [cross_keys_values(p["cross_attn"], context, config) for p in params["blocks"]]
        return jax.tree.map(lambda *parts: tuple(parts), *layers)
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
    sampler checks this before it starts. ``params`` and ``cache`` have one form, stacked or unstacked. Set ``rewrites``
    (static) if the cache may hold frames later than the block, because its position has been moved back.
    ``timestep [B, K]`` is in [0, 1000]. Source: CausVid, section 4.4.

    Raises:
        ConfigError: x or the kernels do not fit ``config``, or tensor x context does not divide the heads.
    """
    unstacked = is_unstacked(params)
    frames = x.shape[1]
    slots = block_slots(cache.position, frames, causal)
    slot_frames = cache.frame.at[slots].set(cache.position + jnp.arange(frames, dtype=jnp.int32))
    attend = self_attention.attend_cached(cache.position, slots, slot_frames, x, unstacked, rewrites, config, causal)
    velocity, new = _apply(
        params,
        config,
        attend,
        x,
        timestep,
        None,
        text_cache=text_cache,
        layer_caches=tuple(zip(*cache.arrays, strict=True)) if unstacked else cache.arrays,
    )
    if unstacked:
        arrays: tuple[Any, ...] = tuple(zip(*new, strict=True))
    else:
        arrays = tuple(write_slots(old, block, slots, axis=2) for old, block in zip(cache.arrays, new, strict=True))
    named: dict[str, Any] = dict(zip(("k", "v", "k_scale", "v_scale"), arrays, strict=False))
    return velocity, dataclasses.replace(cache, frame=slot_frames, **named)
