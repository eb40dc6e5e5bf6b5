"""CLIP's image encoder: its keys in published checkpoints, its preset and its ``config.json``.

Wan2.1's own file (``visual.transformer.0.attn.to_qkv.weight``) stores queries, keys and values of a layer as one tensor
and also contains CLIP's text encoder, which is ignored. Diffusers' folders contain transformers'
``CLIPVisionModelWithProjection`` (``vision_model.encoder.layers.0.self_attn.q_proj.weight``).
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from causvid_jax.checkpoints.table import (
    SAME,
    Network,
    Row,
    Shapes,
    Sizes,
    Transform,
    build,
    leading,
    linear_transform,
    patches,
    rows_of,
    third,
)
from causvid_jax.config import CLIPConfig
from causvid_jax.models import clip_vision

HEAD_DIM = 80
"""Head size of ViT-H/14."""

_FUSED = ("blocks/attn/q", "blocks/attn/k", "blocks/attn/v")
# Our module (or parameter) -> (original, transformers); {n} is the layer. "pre_layrnorm" is the published spelling.
TABLE: Mapping[str, tuple[str, str]] = {
    "class_embedding": ("visual.cls_embedding", "vision_model.embeddings.class_embedding"),
    "position_embedding": ("visual.pos_embedding", "vision_model.embeddings.position_embedding.weight"),
    "projection/kernel": ("visual.head", "visual_projection.weight"),
    "patch_embedding": ("visual.patch_embedding", "vision_model.embeddings.patch_embedding"),
    "pre_norm": ("visual.pre_norm", "vision_model.pre_layrnorm"),
    "post_norm": ("visual.post_norm", "vision_model.post_layernorm"),
    "blocks/norm1": ("visual.transformer.{n}.norm1", "vision_model.encoder.layers.{n}.layer_norm1"),
    "blocks/attn/q": ("visual.transformer.{n}.attn.to_qkv", "vision_model.encoder.layers.{n}.self_attn.q_proj"),
    "blocks/attn/k": ("visual.transformer.{n}.attn.to_qkv", "vision_model.encoder.layers.{n}.self_attn.k_proj"),
    "blocks/attn/v": ("visual.transformer.{n}.attn.to_qkv", "vision_model.encoder.layers.{n}.self_attn.v_proj"),
    "blocks/attn/o": ("visual.transformer.{n}.attn.proj", "vision_model.encoder.layers.{n}.self_attn.out_proj"),
    "blocks/norm2": ("visual.transformer.{n}.norm2", "vision_model.encoder.layers.{n}.layer_norm2"),
    "blocks/ffn/fc1": ("visual.transformer.{n}.mlp.0", "vision_model.encoder.layers.{n}.mlp.fc1"),
    "blocks/ffn/fc2": ("visual.transformer.{n}.mlp.2", "vision_model.encoder.layers.{n}.mlp.fc2"),
}
# CLIP's text half, its temperature, and a buffer.
_IGNORED = re.compile(
    r"textual\.|log_scale$|text_model\.|text_projection\.|logit_scale$|vision_model\.embeddings\.position_ids$"
)
_ALIASES = {
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
}


def _published(config: CLIPConfig, form: str, shapes: Shapes) -> Iterator[Row]:
    original = form == "original"

    def transform(path: str) -> Transform:
        module = path.rpartition("/")[0]
        if path == "patch_embedding/kernel":
            return patches(config.patch_size, config.patch_size)
        if original and path == "projection/kernel":
            return SAME
        if original and path in ("class_embedding", "position_embedding"):
            return leading(2 if path == "class_embedding" else 1)
        if original and module in _FUSED:
            return third(_FUSED.index(module), linear_transform(path))
        return linear_transform(path)

    return rows_of(TABLE, form, shapes, transform)


def _infer(size: Sizes, known: Mapping[str, Any]) -> CLIPConfig | None:
    dim, default = size("pre_norm/scale", 0), CLIPConfig()
    patch = math.isqrt(size("patch_embedding/kernel", 0) // 3) or default.patch_size
    side = math.isqrt(max(0, size("position_embedding", 0) - 1))
    activation = known.get("activation")
    return build(
        CLIPConfig,
        image_size=side * patch,
        patch_size=patch,
        dim=dim,
        ffn_dim=size("blocks/ffn/fc1/bias", 0),
        num_heads=known.get("num_heads") or (dim // HEAD_DIM if dim % HEAD_DIM == 0 else 1),
        num_layers=size.layers(),
        projection_dim=size("projection/kernel", 1),
        activation=activation if activation == "quick_gelu" else default.activation,
        eps=known.get("eps", default.eps),
    )


def _to_json(config: CLIPConfig, form: str) -> dict[str, Any] | None:
    """Return the configuration of transformers' class; the original file has none."""
    if form == "original":
        return None
    return {
        "architectures": ["CLIPVisionModelWithProjection" if config.projection_dim else "CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "projection_dim": config.projection_dim or config.dim,
        **{theirs: getattr(config, ours) for theirs, ours in _ALIASES.items()},
    }


NETWORK = Network(
    component="image_encoder",
    config=CLIPConfig,
    abstract=clip_vision.abstract,
    published=_published,
    template=CLIPConfig(),
    presets=(CLIPConfig(),),
    infer=_infer,
    aliases=_ALIASES,
    describe=lambda config: (
        f"CLIP image encoder of {config.num_layers} layers, width {config.dim}, {config.num_heads} heads"
    ),
    to_json=_to_json,
    ignored=lambda key: _IGNORED.match(key) is not None,
)
