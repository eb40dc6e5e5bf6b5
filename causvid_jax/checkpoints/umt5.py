"""The UMT5 encoder: its keys in published checkpoints, its preset and its ``config.json``.

Original keys (``blocks.0.attn.q.weight``) are those of Wan2.1's own file; diffusers' folders hold transformers'
``UMT5EncoderModel`` (``encoder.block.0.layer.0.SelfAttention.q.weight``), which may name the token embedding twice.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from causvid_jax.checkpoints.table import Network, Row, Shapes, Sizes, build, linear_transform, rows_of
from causvid_jax.config import UMT5Config
from causvid_jax.models import umt5

# Our module (or parameter) -> (original, transformers); {n} is the layer.
TABLE: Mapping[str, tuple[str, str]] = {
    "token_embedding": ("token_embedding.weight", "shared.weight"),
    "norm": ("norm", "encoder.final_layer_norm"),
    "blocks/norm1": ("blocks.{n}.norm1", "encoder.block.{n}.layer.0.layer_norm"),
    "blocks/attn/q": ("blocks.{n}.attn.q", "encoder.block.{n}.layer.0.SelfAttention.q"),
    "blocks/attn/k": ("blocks.{n}.attn.k", "encoder.block.{n}.layer.0.SelfAttention.k"),
    "blocks/attn/v": ("blocks.{n}.attn.v", "encoder.block.{n}.layer.0.SelfAttention.v"),
    "blocks/attn/o": ("blocks.{n}.attn.o", "encoder.block.{n}.layer.0.SelfAttention.o"),
    "blocks/relative_bias": (
        "blocks.{n}.pos_embedding.embedding.weight",
        "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "blocks/norm2": ("blocks.{n}.norm2", "encoder.block.{n}.layer.1.layer_norm"),
    "blocks/ffn/gate": ("blocks.{n}.ffn.gate.0", "encoder.block.{n}.layer.1.DenseReluDense.wi_0"),
    "blocks/ffn/fc1": ("blocks.{n}.ffn.fc1", "encoder.block.{n}.layer.1.DenseReluDense.wi_1"),
    "blocks/ffn/fc2": ("blocks.{n}.ffn.fc2", "encoder.block.{n}.layer.1.DenseReluDense.wo"),
}
_ALIASES = {
    "d_model": "dim",
    "d_ff": "ffn_dim",
    "d_kv": "head_dim",
    "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
}


def _published(config: UMT5Config, form: str, shapes: Shapes) -> Iterator[Row]:
    return rows_of(TABLE, form, shapes, linear_transform)


def _infer(size: Sizes, known: Mapping[str, Any]) -> UMT5Config | None:
    heads = size("blocks/relative_bias", 1)
    return build(
        UMT5Config,
        vocab_size=size("token_embedding", 0),
        dim=size("token_embedding", 1),
        ffn_dim=size("blocks/ffn/fc1/kernel", 1),
        num_heads=heads,
        head_dim=size("blocks/attn/q/kernel", 1) // heads if heads else 0,
        num_layers=size.layers(),
        num_buckets=size("blocks/relative_bias", 0),
        **{k: known[k] for k in ("max_distance", "eps") if k in known},
    )


def _to_json(config: UMT5Config, form: str) -> dict[str, Any] | None:
    """Return the configuration of transformers' ``UMT5EncoderModel``; the original file has none."""
    if form == "original":
        return None
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        **{theirs: getattr(config, ours) for theirs, ours in _ALIASES.items()},
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


NETWORK = Network(
    component="text_encoder",
    config=UMT5Config,
    abstract=umt5.abstract,
    published=_published,
    template=UMT5Config(),
    presets=(UMT5Config(),),
    infer=_infer,
    aliases=_ALIASES,
    describe=lambda config: (
        f"umT5 text encoder of {config.num_layers} layers, width {config.dim}, {config.vocab_size} tokens"
    ),
    to_json=_to_json,
    # ComfyUI's files carry the tokenizer as a tensor.
    ignored=lambda key: key == "spiece_model",
    tied={"encoder.embed_tokens.weight": "shared.weight"},
)
