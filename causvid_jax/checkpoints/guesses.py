"""The sizes of a network from the shapes of a file's tensors.

``NETWORK(shapes, naming, described)`` is the configuration that fits best: every size is read in several places and the
most frequent value wins, so that one bad tensor is outvoted and can be named. None of these functions fails, whatever
the shapes are. ``described`` is what stands beside the weights: a ``config.json``, or our own metadata.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from einops import EinopsError

from causvid_jax.checkpoints import clip_vision as clip_weights
from causvid_jax.checkpoints import taehv as taehv_weights
from causvid_jax.checkpoints import umt5 as umt5_weights
from causvid_jax.checkpoints import wan_transformer
from causvid_jax.config import (
    WAN_LATENT_MEAN,
    WAN_LATENT_STD,
    CLIPConfig,
    ConfigError,
    TAEHVConfig,
    TransformerConfig,
    UMT5Config,
    VAEConfig,
)

NAMINGS = ("original", "diffusers", "causvid_jax")
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Described = Mapping[str, Any]
BLOCKS = "blocks/"
"""Where our trees have their stacked layers."""
HEAD_DIM = 128  # of every published Wan transformer
CLIP_HEAD_DIM = 80  # of ViT-H/14

# Where a size can be read: field -> (path, axis in our orientation).
Places = Mapping[str, tuple[tuple[str, int], ...]]


def nothing(shape: Shape) -> np.ndarray:
    """An array of a shape that takes no memory."""
    return np.broadcast_to(np.int8(0), shape)


def own_names(naming: str) -> str:
    """What transformers' models call the naming of diffusers' folders, in which they lie."""
    return "transformers" if naming == "diffusers" else naming


def _read(
    places: Places,
    shapes: Shapes,
    naming: str,
    layers: int,
    name: Callable[[str, int | None], str],
    to_ours: Callable[[str, np.ndarray], np.ndarray],
) -> dict[str, int]:
    """Every field of ``places`` as the file tells it, 0 where it does not; ``name`` and ``to_ours`` of published
    files."""
    published = naming != "causvid_jax"
    sizes: dict[str, int] = {}
    for field, where in places.items():
        votes = []
        for path, axis in where:
            stacked = path.startswith(BLOCKS)
            for layer in range(layers) if stacked and published else (None,):
                inner = path.removeprefix(BLOCKS)
                shape = shapes.get(name(inner, layer) if published else path)
                if shape is not None and published:
                    try:
                        shape = to_ours(inner, nothing(shape)).shape
                    except (EinopsError, ValueError, IndexError):
                        continue
                elif shape is not None and stacked:
                    shape = shape[1:]
                if shape is not None and axis < len(shape):
                    votes.append(shape[axis])
        sizes[field] = _vote(votes) or 0
    return sizes


def _layers(shapes: Shapes, naming: str, pattern: str) -> int:
    """How many layers a file has: the highest number, or in our own trees what most stacked tensors say."""
    if naming == "causvid_jax":
        return _vote(shape[0] for name, shape in shapes.items() if shape and name.startswith(BLOCKS)) or 0
    numbers = [int(found.group(1)) for name in shapes if (found := re.match(pattern, name))]
    return max(numbers) + 1 if numbers else 0


# ---- the transformer ------------------------------------------------------------------------------------------------

_TRANSFORMER: Places = {
    "dim": (
        ("patch_embedding/bias", 0),
        ("text_embedding/fc2/bias", 0),
        ("time_embedding/fc2/bias", 0),
        ("head/modulation", 1),
        ("blocks/norm3/scale", 0),
        ("blocks/self_attn/q/bias", 0),
    ),
    "ffn_dim": (("blocks/ffn/fc1/bias", 0), ("blocks/ffn/fc2/kernel", 0)),
    "text_dim": (("text_embedding/fc1/kernel", 0),),
    "freq_dim": (("time_embedding/fc1/kernel", 0),),
    "head": (("head/proj/bias", 0), ("head/proj/kernel", 1)),
    "patch": (("patch_embedding/kernel", 0),),
    "image_dim": (
        ("image_embedding/norm1/scale", 0),
        ("image_embedding/fc1/bias", 0),
        ("image_embedding/fc2/kernel", 0),
    ),
}


def transformer(shapes: Shapes, naming: str, described: Described) -> TransformerConfig:
    """Of the Wan DiT; the number of heads, which shapes do not tell, is ``described`` or the width / 128."""
    published = naming != "causvid_jax"
    layers = _layers(shapes, naming, r"blocks\.(\d{1,4})\.")

    def name(path: str, layer: int | None) -> str:
        return wan_transformer.published_name(path, layer, naming)

    sizes = _read(_TRANSFORMER, shapes, naming, layers, name, wan_transformer.tensor_to_ours)
    default = TransformerConfig()
    patch = default.patch_size
    kernel = shapes.get("patch_embedding.weight", ())
    if published and len(kernel) == 5 and kernel[2] == 1:
        patch = (kernel[2], kernel[3], kernel[4])
    area = max(1, int(np.prod(patch)))
    dim = sizes["dim"] or default.dim
    heads = described.get("num_heads") or described.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        heads = max(1, dim // HEAD_DIM) if dim % HEAD_DIM == 0 else 1
    if (dim // heads) % 2 or dim // heads < 6:
        dim, heads = default.dim, default.num_heads
    freq_dim = sizes["freq_dim"] or default.freq_dim
    return TransformerConfig(
        dim=dim,
        ffn_dim=sizes["ffn_dim"] or default.ffn_dim,
        num_heads=heads,
        num_layers=layers or default.num_layers,
        in_channels=(sizes["patch"] // area) or default.in_channels,
        out_channels=(sizes["head"] // area) or default.out_channels,
        patch_size=patch,
        text_dim=sizes["text_dim"] or default.text_dim,
        text_length=_whole(described.get("text_length", described.get("text_len")), default.text_length),
        freq_dim=freq_dim if freq_dim % 2 == 0 else default.freq_dim,
        eps=_number(described.get("eps"), default.eps),
        rope_theta=_number(described.get("rope_theta"), default.rope_theta),
        image_dim=sizes["image_dim"],
        image_tokens=_whole(described.get("image_tokens"), default.image_tokens),
    )


# ---- the VAE --------------------------------------------------------------------------------------------------------

# By naming: the tensors of the width and of the latent channels, an encoder layer, its last bias, its resampling.
_VAE_NAMES = {
    "original": (
        *("encoder.conv1.bias", "conv2.bias"),
        *(r"encoder\.downsamples\.(\d+)\.", "residual.6.bias", "resample.1"),
    ),
    "diffusers": (
        *("encoder.conv_in.bias", "post_quant_conv.bias"),
        *(r"encoder\.down_blocks\.(\d+)\.", "conv2.bias", "resample.1"),
    ),
    "causvid_jax": (
        *("encoder/conv1/bias", "conv2/bias"),
        *(r"encoder/downsamples/(\d+)/", "conv2/bias", "conv/"),
    ),
}


def vae(shapes: Shapes, naming: str, described: Described) -> VAEConfig:
    """Of the VAE, with the latent statistics that are described or, at the published size, published."""
    width, latent, layer, residual, resample = _VAE_NAMES[naming]
    base, z_dim = _first(shapes.get(width)), _first(shapes.get(latent))
    default = VAEConfig()
    plan: dict[int, tuple[str, int]] = {}
    for name, shape in shapes.items():
        if found := re.match(layer, name):
            index, rest = int(found.group(1)), name[found.end() :]
            if rest == residual:
                plan[index] = ("residual", shape[0] if shape else 0)
            elif rest.startswith("time_conv"):
                plan[index] = ("resample3d", 0)
            elif rest.startswith(resample):
                plan.setdefault(index, ("resample2d", 0))
    levels: list[list[int]] = [[]]
    temporal = []
    for _, (kind, channels) in sorted(plan.items()):
        if kind == "residual":
            levels[-1].append(channels)
        else:
            temporal.append(kind == "resample3d")
            levels.append([])
    sizes: dict[str, Any] = {"base_dim": base or default.base_dim, "z_dim": z_dim or default.z_dim}
    if base and all(level and level[-1] >= base for level in levels) and len(levels) > 1:
        sizes |= {
            "dim_mult": tuple(level[-1] // base for level in levels),
            "num_res_blocks": _vote(len(level) for level in levels),
            "temporal_downsample": tuple(temporal),
        }
    mean, std = (described.get(f"latent{s}") or described.get(f"latents{s}") for s in ("_mean", "_std"))
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == sizes["z_dim"]):
        published = naming != "causvid_jax" and sizes["z_dim"] == len(WAN_LATENT_MEAN)
        mean, std = (WAN_LATENT_MEAN, WAN_LATENT_STD) if published else ((), ())
    return VAEConfig(**sizes, latent_mean=tuple(mean), latent_std=tuple(std))


# ---- the text encoder, the image encoder, the tiny codec ------------------------------------------------------------

_UMT5: Places = {
    "vocab_size": (("token_embedding", 0),),
    "dim": (("norm/scale", 0), ("token_embedding", 1), ("blocks/norm1/scale", 0), ("blocks/norm2/scale", 0)),
    "ffn_dim": (("blocks/ffn/fc1/kernel", 1), ("blocks/ffn/gate/kernel", 1), ("blocks/ffn/fc2/kernel", 0)),
    "inner": (("blocks/attn/q/kernel", 1), ("blocks/attn/k/kernel", 1), ("blocks/attn/o/kernel", 0)),
    "num_heads": (("blocks/relative_bias", 1),),
    "num_buckets": (("blocks/relative_bias", 0),),
}


def umt5(shapes: Shapes, naming: str, described: Described) -> UMT5Config:
    """Of the text encoder, which tells all but two constants."""
    layers = _layers(shapes, naming, r"blocks\.(\d{1,4})\." if naming == "original" else r"encoder\.block\.(\d{1,4})\.")

    def name(path: str, layer: int | None) -> str:
        return umt5_weights.published_name(path, layer, own_names(naming))

    sizes = _read(_UMT5, shapes, naming, layers, name, umt5_weights.tensor_to_ours)
    default = UMT5Config()
    heads, buckets = sizes["num_heads"] or default.num_heads, sizes["num_buckets"]
    buckets = buckets if buckets >= 4 and buckets % 4 == 0 else default.num_buckets
    distance = described.get("max_distance", described.get("relative_attention_max_distance"))
    return UMT5Config(
        vocab_size=sizes["vocab_size"] or default.vocab_size,
        dim=sizes["dim"] or default.dim,
        ffn_dim=sizes["ffn_dim"] or default.ffn_dim,
        num_heads=heads,
        head_dim=sizes["inner"] // heads or default.head_dim,
        num_layers=layers or default.num_layers,
        num_buckets=buckets,
        max_distance=max(_whole(distance, default.max_distance), buckets // 4 + 1),
        eps=_number(described.get("eps", described.get("layer_norm_epsilon")), default.eps),
    )


_CLIP: Places = {
    "dim": (
        ("class_embedding", 0),
        ("pre_norm/scale", 0),
        ("position_embedding", 1),
        ("blocks/norm1/scale", 0),
        ("blocks/ffn/fc2/bias", 0),
    ),
    "ffn_dim": (("blocks/ffn/fc1/bias", 0), ("blocks/ffn/fc2/kernel", 0)),
    "tokens": (("position_embedding", 0),),
    "patch": (("patch_embedding/kernel", 0),),
    "projection_dim": (("projection/kernel", 1),),
}


def clip(shapes: Shapes, naming: str, described: Described) -> CLIPConfig:
    """Of the image encoder; the number of heads, which shapes do not tell, is ``described`` or the width / 80."""
    original = naming == "original"
    pattern = r"visual\.transformer\.(\d{1,4})\." if original else r"vision_model\.encoder\.layers\.(\d{1,4})\."
    layers, named = _layers(shapes, naming, pattern), own_names(naming)

    def name(path: str, layer: int | None) -> str:
        return clip_weights.published_name(path, layer, named)

    def to_ours(path: str, value: np.ndarray) -> np.ndarray:
        return clip_weights.tensor_to_ours(path, value, named)

    sizes = _read(_CLIP, shapes, naming, layers, name, to_ours)
    default = CLIPConfig()
    dim = sizes["dim"] or default.dim
    heads = described.get("num_heads") or described.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        heads = max(1, dim // CLIP_HEAD_DIM) if dim % CLIP_HEAD_DIM == 0 else 1
    patch = math.isqrt(sizes["patch"] // 3) or default.patch_size
    side = math.isqrt(max(0, sizes["tokens"] - 1)) or default.image_size // default.patch_size
    activation = described.get("activation") or described.get("hidden_act")
    return CLIPConfig(
        image_size=side * patch,
        patch_size=patch,
        dim=dim,
        ffn_dim=sizes["ffn_dim"] or default.ffn_dim,
        num_heads=heads,
        num_layers=max(2, layers or default.num_layers),
        projection_dim=sizes["projection_dim"],
        activation=activation if activation == "quick_gelu" else default.activation,
        eps=_number(described.get("eps", described.get("layer_norm_eps")), default.eps),
    )


def taehv(shapes: Shapes, naming: str, described: Described) -> TAEHVConfig:
    """Of the tiny codec, whose number of levels and of blocks is taken to be the published one."""
    default = TAEHVConfig()
    levels = range(len(default.temporal_upsample))

    def size(path: str, axis: int) -> int:
        """``axis`` of a kernel [h, w, in, out]."""
        shape = shapes.get(path if naming == "causvid_jax" else taehv_weights.published_name(path, default), ())
        published = {2: 1, 3: 0}[axis]
        return (shape[axis] if naming == "causvid_jax" else shape[published]) if len(shape) == 4 else 0

    def doubles(path: str, wide: int, narrow: int, otherwise: bool) -> bool:
        return size(path, wide) == 2 * size(path, narrow) if size(path, narrow) else otherwise

    dims = [size(f"decoder/levels/{i}/conv/kernel", 2) or default.decoder_dims[i] for i in levels]
    down = (doubles(f"encoder/levels/{i}/pool/kernel", 2, 3, default.temporal_downsample[i]) for i in levels)
    up = (doubles(f"decoder/levels/{i}/grow/kernel", 3, 2, default.temporal_upsample[i]) for i in levels)
    try:
        return TAEHVConfig(
            z_dim=size("decoder/conv_in/kernel", 2) or default.z_dim,
            encoder_dim=size("encoder/conv_in/kernel", 3) or default.encoder_dim,
            decoder_dims=(*dims, size("decoder/conv_out/kernel", 2) or default.decoder_dims[-1]),
            temporal_downsample=tuple(down),
            temporal_upsample=tuple(up),
        )
    except ConfigError:
        return default


# ---- helpers --------------------------------------------------------------------------------------------------------


def _vote(values: Iterable[int]) -> int | None:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def _first(shape: Shape | None) -> int:
    return shape[0] if shape else 0


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else default


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default
