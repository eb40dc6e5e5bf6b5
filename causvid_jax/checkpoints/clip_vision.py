"""CLIP's image encoder between its published checkpoints and our parameter tree.

Two namings exist: Wan2.1's own file (``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``:
``visual.transformer.0.attn.to_qkv.weight``), which holds queries, keys and values of a layer as one matrix and CLIP's
text half beside the image encoder, and transformers' ``CLIPVisionModelWithProjection`` of diffusers' folders
(``vision_model.encoder.layers.0.self_attn.q_proj.weight``). Both store linear weights as [out, in] and the patch
embedding as a convolution [out, in, p, p]; ours are [in, out], the layers stacked on a leading axis.
"""

import re

import numpy as np
from einops import rearrange

from causvid_jax.config import CLIPConfig, require

NAMINGS = ("original", "transformers")

# Our module -> (original, transformers); leaves below.
_OUTER = {
    "patch_embedding": ("visual.patch_embedding", "vision_model.embeddings.patch_embedding"),
    "pre_norm": ("visual.pre_norm", "vision_model.pre_layrnorm"),  # so spelt there
    "post_norm": ("visual.post_norm", "vision_model.post_layernorm"),
}
# Parameters of their own, and one that is so in the original file only.
_WHOLE = {
    "class_embedding": ("visual.cls_embedding", "vision_model.embeddings.class_embedding"),
    "position_embedding": ("visual.pos_embedding", "vision_model.embeddings.position_embedding.weight"),
    "projection/kernel": ("visual.head", "visual_projection.weight"),
}
_LAYER_PREFIX = ("visual.transformer.{}.", "vision_model.encoder.layers.{}.")
_LAYER = {
    "norm1": ("norm1", "layer_norm1"),
    "attn/q": ("attn.to_qkv", "self_attn.q_proj"),
    "attn/k": ("attn.to_qkv", "self_attn.k_proj"),
    "attn/v": ("attn.to_qkv", "self_attn.v_proj"),
    "attn/o": ("attn.proj", "self_attn.out_proj"),
    "norm2": ("norm2", "layer_norm2"),
    "ffn/fc1": ("mlp.0", "mlp.fc1"),
    "ffn/fc2": ("mlp.2", "mlp.fc2"),
}
_LEAF = {"kernel": "weight", "bias": "bias", "scale": "weight"}
_FUSED = ("attn/q", "attn/k", "attn/v")
_UNREAD = re.compile(
    r"textual\.|log_scale$|text_model\.|text_projection\.|logit_scale$|vision_model\.embeddings\.position_ids$"
)


def published_name(path: str, layer: int | None, naming: str) -> str:
    """The published name of the parameter at ``path`` of our tree (``blocks/`` left out, ``layer`` given there).

    In the original file ``attn/q``, ``attn/k`` and ``attn/v`` have one name: they are its thirds, in that order.
    """
    require(naming in NAMINGS, f"naming is {naming!r}; accepted: {', '.join(NAMINGS)}")
    column = NAMINGS.index(naming)
    if path in _WHOLE:
        return _WHOLE[path][column]
    module, _, leaf = path.rpartition("/")
    table, prefix = (_OUTER, "") if layer is None else (_LAYER, _LAYER_PREFIX[column].format(layer))
    return f"{prefix}{table[module][column]}.{_LEAF[leaf]}"


def unread(name: str) -> bool:
    """Whether a tensor of a published file is no part of the image encoder: CLIP's text half, its temperature, a
    buffer."""
    return _UNREAD.match(name) is not None


def place(path: str) -> int:
    """Where the parameter at ``path`` stands in the tensor that it shares with others."""
    module = path.rpartition("/")[0]
    return _FUSED.index(module) if module in _FUSED else 0


def tensor_to_ours(path: str, value: np.ndarray, naming: str) -> np.ndarray:
    """One parameter in our layout of the published tensor that holds it, a view where the elements need not move."""
    if path == "projection/kernel":
        return value if naming == "original" else value.T
    if path == "patch_embedding/kernel":
        return rearrange(value, "o c p q -> (p q c) o")
    if naming == "original" and path in _WHOLE:
        return value.reshape(value.shape[1:] if path == "position_embedding" else value.shape[2:])
    if naming == "original" and path.rpartition("/")[0] in _FUSED:
        value = value[place(path) * (len(value) // 3) :][: len(value) // 3]
    return value.T if path.endswith("/kernel") else value


def tensor_to_published(path: str, value: np.ndarray, config: CLIPConfig, naming: str) -> np.ndarray:
    """The inverse of :func:`tensor_to_ours`; of a tensor that holds several parameters, this one's rows."""
    if path == "projection/kernel":
        return value if naming == "original" else value.T
    if path == "patch_embedding/kernel":
        return rearrange(value, "(p q c) o -> o c p q", p=config.patch_size, q=config.patch_size)
    if naming == "original" and path in _WHOLE:
        return value[None] if path == "position_embedding" else value[None, None]
    return value.T if path.endswith("/kernel") else value
