"""Which checkpoint is this: the known layouts, the sizes a file's shapes tell, and what does not fit.

A *network* is one of ours; a *naming* is how a file calls and lays out its tensors: ``original`` (Wan2.1 and what was
distilled from it), ``diffusers``, or ``causvid_jax`` (ours, layers stacked). A *piece* is what all namings agree on:
one parameter of one layer, in our orientation.
"""

import dataclasses
import functools
import json
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from einops import EinopsError

from causvid_jax.config import ConfigError, TransformerConfig, VAEConfig, require
from causvid_jax.models import transformer, vae
from causvid_jax.weights import sources, store, wan_transformer, wan_vae

NAMINGS = ("original", "diffusers", "causvid_jax")
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Config = TransformerConfig | VAEConfig
HEAD_DIM = 128  # of every published Wan transformer


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter: its path in our tree (``blocks/ffn/fc1/kernel``) and, if it is stacked there, its layer."""

    path: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """What a conversion needs to know of one of our networks; ``path`` is one of our tree.

    ``guess(shapes, naming, described)`` is the configuration that fits a file's shapes best and never fails;
    ``described`` is what stands beside the weights: a ``config.json``, or our own metadata.
    """

    component: str
    config: type
    abstract: Callable[[Any], Any]
    name: Callable[[Piece, str, Any], str]
    to_ours: Callable[[str, np.ndarray], np.ndarray]
    to_published: Callable[[str, np.ndarray, Any], np.ndarray]
    guess: Callable[[Shapes, str, Mapping[str, Any]], Any]
    stacked: str | None = None

    def pieces(self, config: Config) -> Mapping[Piece, Shape]:
        """Every piece and its shape in our orientation."""
        return _tables(self, config, NAMINGS[-1])[0]

    def names(self, config: Config, naming: str) -> Mapping[Piece, str]:
        """The tensor that holds each piece."""
        return _tables(self, config, naming)[1]

    def shapes(self, config: Config, naming: str) -> Mapping[str, Shape]:
        """Name and shape of every tensor of a checkpoint."""
        return _tables(self, config, naming)[2]


@functools.lru_cache(maxsize=64)
def _tables(
    network: Network, config: Config, naming: str
) -> tuple[Mapping[Piece, Shape], Mapping[Piece, str], Mapping[str, Shape]]:
    """Pieces with their shapes, their tensors' names, and those tensors' shapes; not to be changed."""
    pieces: dict[Piece, Shape] = {}
    names: dict[Piece, str] = {}
    shapes: dict[str, Shape] = {}
    for path, leaf in store.flatten(network.abstract(config)).items():
        stacked = bool(network.stacked) and path.startswith(str(network.stacked))
        inner = tuple(leaf.shape[1:] if stacked else leaf.shape)
        ours = naming == "causvid_jax"
        shape = tuple(leaf.shape) if ours else network.to_published(path, _nothing(inner), config).shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            piece = Piece(path, layer)
            pieces[piece], names[piece] = inner, path if ours else network.name(piece, naming, config)
            shapes[names[piece]] = shape
    return types.MappingProxyType(pieces), types.MappingProxyType(names), types.MappingProxyType(shapes)


@dataclasses.dataclass(frozen=True)
class Match:
    """A file read as one layout: the network, the naming, the sizes, and what does not fit ("" if all does)."""

    network: Network
    naming: str
    config: Any
    misfit: str

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.network.pieces(self.config).values())

    def __str__(self) -> str:
        return f"{describe(self.config)}, {self.naming} names"


def describe(config: Config) -> str:
    """The sizes of a network in a few words."""
    if isinstance(config, TransformerConfig):
        return (
            f"transformer of {config.num_layers} layers, width {config.dim}, {config.num_heads} heads, "
            f"{config.in_channels} channels"
        )
    return f"VAE of width {config.base_dim} x {config.dim_mult}, {config.z_dim} latent channels"


def match(source: sources.Source, network: Network, naming: str, config: Config | None = None) -> Match:
    """``source`` read as a ``naming`` checkpoint of ``network``, of the given sizes or those its shapes tell."""
    if config is None:
        config = network.guess(source.shapes, naming, _described(source))
    return Match(network, naming, config, store.misfit(source.shapes, network.shapes(config, naming), most=5))


def detect(source: sources.Source, config: Config | None = None, num_heads: int = 0) -> Match:
    """The layout that ``source`` has, of the sizes of ``config`` if given.

    ``num_heads`` is for a transformer whose width does not tell them.

    Raises:
        ConfigError: none fits; the sentence names the closest and what is missing, unexpected or misshapen.
    """
    networks = [n for n in NETWORKS if config is None or isinstance(config, n.config)]
    matches = [match(source, network, naming, config) for network in networks for naming in NAMINGS]

    def alike(candidate: Match) -> int:
        shapes = candidate.network.shapes(candidate.config, candidate.naming)
        return sum(2 if shapes[name] == shape else 1 for name, shape in source.shapes.items() if name in shapes)

    best = max(matches, key=alike)
    if best.misfit:
        foreign = next((what for mark, what in FOREIGN.items() if any(mark in name for name in source.tensors)), "")
        where = f"{source.path}{f' (part {source.part})' if source.part else ''}"
        needed = "is no checkpoint that can be read" if config is None else "does not fit the configuration"
        closest = f"the closest layout is {best}: " if alike(best) else "no tensor of it is known: "
        raise ConfigError(f"{where} {needed}{foreign and f', but {foreign}'}; {closest}{best.misfit}")
    if config is None and isinstance(best.config, TransformerConfig):
        described = _described(source)
        told = described.get("num_heads") or described.get("num_attention_heads") or best.config.dim % HEAD_DIM == 0
        require(
            num_heads or told,
            f"the width {best.config.dim} of {source.path} does not tell the number of heads (published ones have "
            f"{HEAD_DIM} each); give --num_heads",
        )
        if num_heads:
            best = dataclasses.replace(best, config=dataclasses.replace(best.config, num_heads=num_heads))
    return best


# What known files of others have in their names, and what those files are.
FOREIGN = {
    "img_emb.": "an image-to-video transformer, which this version does not have",
    "image_embedder.": "an image-to-video transformer, which this version does not have",
    "vace_": "a VACE transformer, which this version does not have",
    "lora_A": "a LoRA, which is given with --lora beside the transformer it changes",
    "lora_down": "a LoRA, which is given with --lora beside the transformer it changes",
    "scale_weight": "weights quantised to 8 bits with scales; give the unquantised file",
    "pos_embedding.embedding": "a umT5 text encoder, which this version does not convert",
    "relative_attention_bias": "a umT5 text encoder, which this version does not convert",
}


# ---- the transformer ------------------------------------------------------------------------------------------------

_BLOCKS = "blocks/"

# Where a size can be read: field -> (path, axis in our orientation). Several, so that one bad tensor is outvoted.
_SIZES = {
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
}


def _guess_transformer(shapes: Shapes, naming: str, described: Mapping[str, Any]) -> TransformerConfig:
    published = naming != "causvid_jax"
    layers = (
        _count_layers(shapes) if published else _vote(s[0] for n, s in shapes.items() if s and n.startswith(_BLOCKS))
    )
    sizes: dict[str, int] = {}
    for field, places in _SIZES.items():
        votes = []
        for path, axis in places:
            stacked = path.startswith(_BLOCKS)
            for layer in range(layers or 0) if stacked and published else (None,):
                name = _transformer_name(Piece(path, layer), naming) if published else path
                shape = _ours(path, shapes.get(name), published, stacked)
                if shape is not None and axis < len(shape):
                    votes.append(shape[axis])
        sizes[field] = _vote(votes) or 0
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
    )


def _count_layers(shapes: Shapes) -> int:
    numbers = [int(found.group(1)) for name in shapes if (found := re.match(r"blocks\.(\d{1,4})\.", name))]
    return max(numbers) + 1 if numbers else 0


def _ours(path: str, shape: Shape | None, published: bool, stacked: bool) -> Shape | None:
    """A stored tensor's shape in our orientation, without the layers' axis; None if it cannot be such a tensor."""
    if shape is None:
        return None
    if not published:
        return shape[1:] if stacked else shape
    try:
        return wan_transformer.tensor_to_ours(path.removeprefix(_BLOCKS), _nothing(shape)).shape
    except (EinopsError, ValueError, IndexError):
        return None


def _transformer_name(piece: Piece, naming: str, config: Config | None = None) -> str:
    return wan_transformer.published_name(piece.path.removeprefix(_BLOCKS), piece.layer, naming)


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


def _guess_vae(shapes: Shapes, naming: str, described: Mapping[str, Any]) -> VAEConfig:
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
        published = naming != "causvid_jax" and sizes["z_dim"] == len(vae.WAN_LATENT_MEAN)
        mean, std = (vae.WAN_LATENT_MEAN, vae.WAN_LATENT_STD) if published else ((), ())
    return VAEConfig(**sizes, latent_mean=tuple(mean), latent_std=tuple(std))


def _vae_name(piece: Piece, naming: str, config: VAEConfig) -> str:
    name = wan_vae.original_name if naming == "original" else wan_vae.diffusers_name
    return name(tuple(piece.path.split("/")), config)


# ---- helpers --------------------------------------------------------------------------------------------------------


def _described(source: sources.Source) -> dict[str, Any]:
    """What a file says of itself: ``config.json``, or our metadata (from a training the recipe, else the network)."""
    described = dict(source.config)
    for key in ("network", "latent_mean", "latent_std", "config"):
        try:
            content = json.loads(source.metadata[key])
        except (KeyError, ValueError):
            continue
        if key == "config" and isinstance(content, dict):
            role = "teacher" if source.metadata.get("stage") == "teacher" else "student"
            content = content.get(role, {})
        described |= content if isinstance(content, dict) else {key: content}
    return described


def _nothing(shape: Shape) -> np.ndarray:
    """An array of a shape that takes no memory."""
    return np.broadcast_to(np.int8(0), shape)


def _vote(values: Iterable[int]) -> int | None:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def _first(shape: Shape | None) -> int:
    return shape[0] if shape else 0


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else default


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default


TRANSFORMER = Network(
    component="transformer",
    config=TransformerConfig,
    abstract=transformer.abstract,
    name=_transformer_name,
    to_ours=lambda path, value: wan_transformer.tensor_to_ours(path.removeprefix(_BLOCKS), value),
    to_published=lambda path, value, config: wan_transformer.tensor_to_published(
        path.removeprefix(_BLOCKS), value, config
    ),
    guess=_guess_transformer,
    stacked=_BLOCKS,
)
VAE = Network(
    component="vae",
    config=VAEConfig,
    abstract=vae.abstract,
    name=_vae_name,
    to_ours=lambda path, value: wan_vae.tensor_to_ours(tuple(path.split("/")), value),
    to_published=lambda path, value, _: wan_vae.tensor_to_published(tuple(path.split("/")), value),
    guess=_guess_vae,
)
NETWORKS: tuple[Network, ...] = (TRANSFORMER, VAE)
"""The networks that files are compared with; a text encoder joins here."""


def network_of(config: Config) -> Network:
    """The network whose sizes ``config`` is."""
    found = next((network for network in NETWORKS if isinstance(config, network.config)), None)
    require(found is not None, f"{type(config).__name__} is the configuration of no network with weights")
    assert found is not None
    return found
