"""One layer of the Wan diffusion transformer, and its inputs: text and time embedding.

:func:`block` is a plain function of a layer's parameters. ``models.transformer`` scans it over stacked parameters, or
calls it in a loop over unstacked layers (``models.unstacked``).

Source: Wan2.1, ``wan/modules/model.py``.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from causvid_jax.config import TransformerConfig
from causvid_jax.models import attention, image_branch, precision
from causvid_jax.models.kv_cache import TextCache
from causvid_jax.models.layers import Params, gelu_tanh, timestep_sinusoid
from causvid_jax.models.precision import layer_norm, linear, mlp, modulate, rms_norm
from causvid_jax.sharding import constraints
from causvid_jax.sharding.params import ParamSpec

Attend = Callable[..., Any]
TOKEN_AXES = ("batch", None, "tokens", None)  # of [B, F, n, M]
Context = tuple[jax.Array, jax.Array | None]  # text [B, S, M] and image [B, I, M] at the model width


def _heads(x: jax.Array, num_heads: int) -> jax.Array:
    return rearrange(x, "... (N D) -> ... N D", N=num_heads)


def embed_context(
    p: Params, prompt_embeds: jax.Array, image_embeds: jax.Array | None, config: TransformerConfig
) -> Context:
    """Map ``prompt_embeds [B, S, E]`` and ``image_embeds`` to the model width: ``[B, S, M]`` and ``[B, I, M]`` or None.

    The text goes through linear, GELU (tanh), linear. A zero row (padding) becomes a constant that is not zero.

    Raises:
        ConfigError: ``image_embeds`` do not fit ``config``.
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


def text_layer(cache: TextCache, layer: int) -> TextCache:
    """Return the part of ``cache`` for one layer, without the leading axis L."""
    return TextCache(*(None if x is None else x[layer] for x in (cache.k, cache.v, cache.image_k, cache.image_v)))


def block(
    p: Params,
    x: jax.Array,
    time: jax.Array,
    text: Context | TextCache,
    layer_cache: Any,
    attend: Attend,
    config: TransformerConfig,
) -> tuple[jax.Array, Any]:
    """Return the tokens after one layer and the cache of ``attend``. With m = modulation + time ``[B, F, 6, M]``::

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
        normed = functools.partial(rms_norm, config=config, rotated=True)
        q = _heads(normed(linear(sa["q"], y, config), sa["norm_q"]["scale"]), config.num_heads)
        k = _heads(normed(linear(sa["k"], y, config), sa["norm_k"]["scale"]), config.num_heads)
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
            backend=precision.text_attention_backend(config),
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


def pool_tokens(x: jax.Array, query: jax.Array, config: TransformerConfig) -> jax.Array:
    """Return the tokens ``x [B, F, n, M]`` pooled by one query q ``[M]``: ``softmax(y q / sqrt(M)) y``, ``y = LN(x)``.

    The softmax is over all tokens of a clip, and the result is ``[B, M]``.
    """
    y = layer_norm(x, config)
    full = jax.lax.Precision.HIGHEST  # by default accelerators multiply float32 in fewer bits
    scores = jnp.einsum("bfnm,m->bfn", y, query, precision=full) * y.shape[-1] ** -0.5
    return jnp.einsum("bfn,bfnm->bm", jax.nn.softmax(scores, axis=(1, 2)), y, precision=full)


def embed_time(p: Params, timestep: jax.Array, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Return timesteps ``[B, F]`` in [0, 1000] embedded for the head, ``[B, F, M]``, and for the layers.

    ``e = fc2(silu(fc1(sinusoid(t))))`` is for the head, ``W silu(e) + b``, ``[B, F, 6, M]``, for the layers.
    """
    apply, net = functools.partial(precision.time_linear, config=config), p["time_embedding"]
    e = apply(net["fc2"], nn.silu(apply(net["fc1"], timestep_sinusoid(timestep, config.freq_dim))))
    return e, rearrange(apply(p["time_projection"], nn.silu(e)), "b f (s M) -> b f s M", s=6)


def all_gather(p: Params, layer_spec: Any, config: TransformerConfig) -> Params:
    """Return one layer's parameters, not split along ``embed``, on every device: the all-gather of FSDP, per layer."""
    if not constraints.mesh_shape():
        return p

    def walk(spec: Any, value: Any) -> Any:
        if isinstance(spec, ParamSpec):
            return constraints.constrain(value, [None if axis == "embed" else axis for axis in spec.axes], config.rules)
        # The scale of an adapter is no parameter; an adapter given at run time is not in the specification.
        return {name: walk(spec[name], inner) if name in spec else inner for name, inner in value.items()}

    return walk(layer_spec, p)
