"""The Wan2.1 DiT: its keys in published checkpoints, its presets and its ``config.json``.

Original keys (``blocks.0.self_attn.q.weight``) are those of Wan2.1, CausVid and Self-Forcing; diffusers'
``WanTransformer3DModel`` (``blocks.0.attn1.to_q.weight``) also swaps norm2 and norm3. Image-to-video models
also have the keys of the image branch.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from causvid_jax.checkpoints.safetensors_io import Tensor
from causvid_jax.checkpoints.table import (
    OURS,
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
)
from causvid_jax.config import TransformerConfig
from causvid_jax.models import transformer

HEAD_DIM = 128
"""Head size of every published Wan transformer."""

# Our module (or parameter) -> (original, diffusers); {n} is the layer.
TABLE: Mapping[str, tuple[str, str]] = {
    "patch_embedding": ("patch_embedding", "patch_embedding"),
    "text_embedding/fc1": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text_embedding/fc2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time_embedding/fc1": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time_embedding/fc2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "time_projection": ("time_projection.1", "condition_embedder.time_proj"),
    "head/modulation": ("head.modulation", "scale_shift_table"),
    "head/proj": ("head.head", "proj_out"),
    "image_embedding/norm1": ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    "image_embedding/fc1": ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    "image_embedding/fc2": ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    "image_embedding/norm2": ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    "blocks/modulation": ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
    "blocks/self_attn/q": ("blocks.{n}.self_attn.q", "blocks.{n}.attn1.to_q"),
    "blocks/self_attn/k": ("blocks.{n}.self_attn.k", "blocks.{n}.attn1.to_k"),
    "blocks/self_attn/v": ("blocks.{n}.self_attn.v", "blocks.{n}.attn1.to_v"),
    "blocks/self_attn/o": ("blocks.{n}.self_attn.o", "blocks.{n}.attn1.to_out.0"),
    "blocks/self_attn/norm_q": ("blocks.{n}.self_attn.norm_q", "blocks.{n}.attn1.norm_q"),
    "blocks/self_attn/norm_k": ("blocks.{n}.self_attn.norm_k", "blocks.{n}.attn1.norm_k"),
    "blocks/norm3": ("blocks.{n}.norm3", "blocks.{n}.norm2"),
    "blocks/cross_attn/q": ("blocks.{n}.cross_attn.q", "blocks.{n}.attn2.to_q"),
    "blocks/cross_attn/k": ("blocks.{n}.cross_attn.k", "blocks.{n}.attn2.to_k"),
    "blocks/cross_attn/v": ("blocks.{n}.cross_attn.v", "blocks.{n}.attn2.to_v"),
    "blocks/cross_attn/o": ("blocks.{n}.cross_attn.o", "blocks.{n}.attn2.to_out.0"),
    "blocks/cross_attn/norm_q": ("blocks.{n}.cross_attn.norm_q", "blocks.{n}.attn2.norm_q"),
    "blocks/cross_attn/norm_k": ("blocks.{n}.cross_attn.norm_k", "blocks.{n}.attn2.norm_k"),
    "blocks/cross_attn/k_img": ("blocks.{n}.cross_attn.k_img", "blocks.{n}.attn2.add_k_proj"),
    "blocks/cross_attn/v_img": ("blocks.{n}.cross_attn.v_img", "blocks.{n}.attn2.add_v_proj"),
    "blocks/cross_attn/norm_k_img": ("blocks.{n}.cross_attn.norm_k_img", "blocks.{n}.attn2.norm_added_k"),
    "blocks/ffn/fc1": ("blocks.{n}.ffn.0", "blocks.{n}.ffn.net.0.proj"),
    "blocks/ffn/fc2": ("blocks.{n}.ffn.2", "blocks.{n}.ffn.net.2"),
}
# Files of image-to-video models of diffusers may hold a query norm that no network reads; those of rCM hold counters.
_IGNORED = "attn2.norm_added_q.weight"
_COUNTERS = "accum_"
_WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_I2V_14B = dataclasses.replace(_WAN_14B, in_channels=36, image_dim=1280)
_ALIASES = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "text_len": "text_length",
    "num_attention_heads": "num_heads",
}


def _published(config: TransformerConfig, form: str, shapes: Shapes) -> Iterator[Row]:
    def transform(path: str) -> Transform:
        if path.endswith("modulation"):
            return leading(1)
        return patches(*config.patch_size) if path == "patch_embedding/kernel" else linear_transform(path)

    return rows_of(TABLE, form, shapes, transform)


def _adapt(key: str, tensor: Tensor) -> Tensor:
    """Return rCM's patch embedding, a matrix [out, (in 1 2 2)], as the convolution [out, in, 1, 2, 2] that it is."""
    if key != "patch_embedding.weight" or len(tensor.shape) != 2 or tensor.shape[1] % 4:
        return tensor
    return tensor.reshape((tensor.shape[0], tensor.shape[1] // 4, 1, 2, 2))


def _infer(size: Sizes, known: Mapping[str, Any]) -> TransformerConfig | None:
    kernel = size.key_shape("patch_embedding/kernel")
    patch = tuple(kernel[2:]) if size.form != OURS and len(kernel) == 5 else TransformerConfig().patch_size
    area = max(1, patch[0] * patch[1] * patch[2])
    dim = known.get("dim") or size("patch_embedding/bias", 0)
    heads = known.get("num_heads") or (dim // HEAD_DIM if dim % HEAD_DIM == 0 else 1)
    constants = {k: known[k] for k in ("text_length", "eps", "rope_theta", "image_tokens") if k in known}
    return build(
        TransformerConfig,
        dim=dim,
        ffn_dim=size("blocks/ffn/fc1/bias", 0),
        num_heads=heads,
        num_layers=size.layers(),
        in_channels=size("patch_embedding/kernel", 0) // area,
        out_channels=size("head/proj/bias", 0) // area,
        patch_size=patch,
        text_dim=size("text_embedding/fc1/kernel", 0),
        freq_dim=size("time_embedding/fc1/kernel", 0),
        image_dim=size("image_embedding/norm1/scale", 0),
        **constants,
    )


def _describe(config: TransformerConfig) -> str:
    branch = ", image branch" if config.image_dim else ""
    return (
        f"transformer of {config.num_layers} layers, width {config.dim}, {config.num_heads} heads, "
        f"{config.in_channels} channels{branch}"
    )


def _to_json(config: TransformerConfig, form: str) -> dict[str, Any]:
    """Return the constructor's arguments of Wan2.1's ``WanModel`` or of diffusers' ``WanTransformer3DModel``."""
    shared = {
        "patch_size": list(config.patch_size),
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "eps": config.eps,
    }
    if form == "original":
        return shared | {
            "_class_name": "WanModel",
            "model_type": "i2v" if config.image_dim else "t2v",
            "text_len": config.text_length,
            "in_dim": config.in_channels,
            "out_dim": config.out_channels,
            "dim": config.dim,
            "num_heads": config.num_heads,
        }
    return shared | {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": config.image_dim or None,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "rope_max_seq_len": 1024,
    }


NETWORK = Network(
    component="transformer",
    config=TransformerConfig,
    abstract=transformer.abstract,
    published=_published,
    template=_I2V_14B,
    presets=(
        TransformerConfig(),
        _WAN_14B,
        _I2V_14B,
        dataclasses.replace(_WAN_14B, in_channels=36),
        TransformerConfig(dim=3072, ffn_dim=14336, num_heads=24, in_channels=48, out_channels=48),  # Wan2.2-TI2V-5B
    ),
    infer=_infer,
    aliases=_ALIASES,
    describe=_describe,
    to_json=_to_json,
    ignored=lambda key: key.endswith(_IGNORED) or key.startswith(_COUNTERS),
    adapt=_adapt,
)
