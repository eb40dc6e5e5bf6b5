"""Which checkpoint is this: the known layouts, the sizes a file's shapes tell, and what does not fit.

A *network* is one of ours; a *naming* is how a file calls and lays out its tensors: ``original`` (Wan2.1 and what was
distilled from it), ``diffusers``, or ``causvid_jax`` (ours, layers stacked). A *piece* is what all namings agree on:
one parameter of one layer, in our orientation.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from causvid_jax.checkpoints import clip_vision as clip_weights
from causvid_jax.checkpoints import guesses, sources, store, wan_transformer, wan_vae
from causvid_jax.checkpoints import taehv as taehv_weights
from causvid_jax.checkpoints import umt5 as umt5_weights
from causvid_jax.checkpoints.guesses import NAMINGS, Shape, Shapes, nothing
from causvid_jax.config import (
    CLIPConfig,
    ConfigError,
    TAEHVConfig,
    TransformerConfig,
    UMT5Config,
    VAEConfig,
    require,
)
from causvid_jax.models import clip_vision, taehv, transformer, umt5, vae

Config = TransformerConfig | VAEConfig | UMT5Config | TAEHVConfig | CLIPConfig


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter: its path in our tree (``blocks/ffn/fc1/kernel``) and, if it is stacked there, its layer."""

    path: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """What a conversion needs to know of one of our networks; ``path`` is one of our tree.

    ``to_ours(path, value, naming)`` and ``to_published(path, value, config, naming)`` move one tensor between layouts.
    ``guess(shapes, naming, described)`` is the configuration that fits a file's shapes best
    (``causvid_jax.checkpoints.guesses``). ``unread(name)`` says which tensors of a published file are no part of the
    network, ``twins`` which are copies of others. Where one published tensor holds several of ours, along its first
    axis, ``place(path)`` orders them.
    """

    component: str
    config: type
    abstract: Callable[[Any], Any]
    name: Callable[[Piece, str, Any], str]
    to_ours: Callable[[str, np.ndarray, str], np.ndarray]
    to_published: Callable[[str, np.ndarray, Any, str], np.ndarray]
    guess: Callable[[Shapes, str, Mapping[str, Any]], Any]
    describe: Callable[[Any], str]
    stacked: str | None = None
    namings: tuple[str, ...] = NAMINGS
    unread: Callable[[str], bool] = lambda name: False
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    place: Callable[[str], int] = lambda path: 0

    def pieces(self, config: Config) -> Mapping[Piece, Shape]:
        """Every piece and its shape in our orientation."""
        return _tables(self, config, NAMINGS[-1])[0]

    def names(self, config: Config, naming: str) -> Mapping[Piece, str]:
        """The tensor that holds each piece."""
        return _tables(self, config, naming)[1]

    def shapes(self, config: Config, naming: str) -> Mapping[str, Shape]:
        """Name and shape of every tensor of a checkpoint."""
        return _tables(self, config, naming)[2]

    def tree(self, state: Mapping[str, np.ndarray], config: Config, naming: str) -> dict[str, Any]:
        """Our parameter tree (numpy) from a published state dict in memory; ConfigError if it does not fit."""
        problems = store.misfit({name: value.shape for name, value in state.items()}, self.shapes(config, naming))
        require(not problems, f"{naming} weights do not fit the configuration ({problems})")
        flat: dict[str, Any] = {}
        for piece, name in self.names(config, naming).items():
            value = self.to_ours(piece.path, state[name], naming)
            if piece.layer is None:
                flat[piece.path] = np.array(value)
            else:
                flat.setdefault(piece.path, []).append(value)
        return store.unflatten({path: np.stack(v) if isinstance(v, list) else v for path, v in flat.items()})


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
        shape = tuple(leaf.shape) if ours else network.to_published(path, nothing(inner), config, naming).shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            piece = Piece(path, layer)
            pieces[piece], names[piece] = inner, path if ours else network.name(piece, naming, config)
            before = 0 if ours or names[piece] not in shapes else shapes[names[piece]][0]
            shapes[names[piece]] = (before + shape[0], *shape[1:]) if before else shape
    return types.MappingProxyType(pieces), types.MappingProxyType(names), types.MappingProxyType(shapes)


@dataclasses.dataclass(frozen=True)
class Match:
    """A file read as one layout: the network, the naming, the sizes, and what does not fit ("" if all does).

    ``source`` is the file as that network reads it (:func:`adapted`).
    """

    network: Network
    naming: str
    config: Any
    misfit: str
    source: sources.Source

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.network.pieces(self.config).values())

    def __str__(self) -> str:
        return f"{describe(self.config)}, {self.naming} names"


def describe(config: Config) -> str:
    """The sizes of a network in a few words."""
    return network_of(config).describe(config)


def adapted(source: sources.Source, network: Network) -> sources.Source:
    """``source`` without what ``network`` does not read, and with every tensor under its first name."""
    tensors = {name: tensor for name, tensor in source.tensors.items() if not network.unread(name)}
    twins = {}
    for copy, name in network.twins.items():
        if copy in tensors:
            tensor = tensors.pop(copy)
            if name in tensors:
                twins[name] = tensor
            else:
                tensors[name] = tensor
    unread = sum(map(network.unread, source.tensors))
    return dataclasses.replace(source, tensors=tensors, twins=twins, unread=unread)


def match(source: sources.Source, network: Network, naming: str, config: Config | None = None) -> Match:
    """``source`` read as a ``naming`` checkpoint of ``network``, of the given sizes or those its shapes tell."""
    source = adapted(source, network)
    if config is None:
        config = network.guess(source.shapes, naming, _described(source))
    misfit = store.misfit(source.shapes, network.shapes(config, naming), most=5)
    return Match(network, naming, config, misfit, source)


def detect(source: sources.Source, config: Config | None = None, num_heads: int = 0) -> Match:
    """The layout that ``source`` has, of the sizes of ``config`` if given.

    ``num_heads`` is for a transformer whose width does not tell them.

    Raises:
        ConfigError: none fits; the sentence names the closest and what is missing, unexpected or misshapen.
    """
    networks = [n for n in NETWORKS if config is None or isinstance(config, n.config)]
    matches = [match(source, network, naming, config) for network in networks for naming in network.namings]

    def alike(candidate: Match) -> int:
        shapes, have = candidate.network.shapes(candidate.config, candidate.naming), candidate.source.shapes
        return sum(2 if shapes[name] == shape else 1 for name, shape in have.items() if name in shapes)

    best = max(matches, key=alike)
    if best.misfit:
        foreign = next((what for mark, what in FOREIGN.items() if any(mark in name for name in source.tensors)), "")
        where = f"{source.path}{f' (part {source.part})' if source.part else ''}"
        needed = "is no checkpoint that can be read" if config is None else "does not fit the configuration"
        closest = f"the closest layout is {best}: " if alike(best) else "no tensor of it is known: "
        raise ConfigError(f"{where} {needed}{foreign and f', but {foreign}'}; {closest}{best.misfit}")
    if config is None and isinstance(best.config, (TransformerConfig, CLIPConfig)):
        described, transforms = _described(source), isinstance(best.config, TransformerConfig)
        width = guesses.HEAD_DIM if transforms else guesses.CLIP_HEAD_DIM
        told = described.get("num_heads") or described.get("num_attention_heads") or best.config.dim % width == 0
        require(
            (num_heads and transforms) or told,
            f"the width {best.config.dim} of {source.path} does not tell the number of heads (published ones have "
            f"{width} each); give {'--num_heads' if transforms else 'it in a config.json beside the file'}",
        )
        if num_heads and transforms:
            best = dataclasses.replace(best, config=dataclasses.replace(best.config, num_heads=num_heads))
    return best


# What known files of others have in their names, and what those files are.
FOREIGN = {
    "img_emb.emb_pos": "a transformer between a first and a last frame, which this version does not have",
    "image_embedder.pos_embed": "a transformer between a first and a last frame, which this version does not have",
    "vace_": "a VACE transformer, which this version does not have",
    "lora_A": "a LoRA, which is given with --lora beside the transformer it changes",
    "lora_down": "a LoRA, which is given with --lora beside the transformer it changes",
    "scale_weight": "weights quantised to 8 bits with scales; give the unquantised file",
}


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


def _inner(path: str) -> str:
    return path.removeprefix(guesses.BLOCKS)


def _vae_name(piece: Piece, naming: str, config: VAEConfig) -> str:
    name = wan_vae.original_name if naming == "original" else wan_vae.diffusers_name
    return name(tuple(piece.path.split("/")), config)


# ---- the networks ---------------------------------------------------------------------------------------------------

TRANSFORMER = Network(
    component="transformer",
    config=TransformerConfig,
    abstract=transformer.abstract,
    name=lambda piece, naming, _: wan_transformer.published_name(_inner(piece.path), piece.layer, naming),
    to_ours=lambda path, value, _: wan_transformer.tensor_to_ours(_inner(path), value),
    to_published=lambda path, value, config, _: wan_transformer.tensor_to_published(_inner(path), value, config),
    guess=guesses.transformer,
    describe=lambda config: (
        f"transformer of {config.num_layers} layers, width {config.dim}, {config.num_heads} heads, "
        f"{config.in_channels} channels{', image branch' if config.image_dim else ''}"
    ),
    stacked=guesses.BLOCKS,
    unread=wan_transformer.unread,
)
VAE = Network(
    component="vae",
    config=VAEConfig,
    abstract=vae.abstract,
    name=_vae_name,
    to_ours=lambda path, value, _: wan_vae.tensor_to_ours(tuple(path.split("/")), value),
    to_published=lambda path, value, *_: wan_vae.tensor_to_published(tuple(path.split("/")), value),
    guess=guesses.vae,
    describe=lambda config: f"VAE of width {config.base_dim} x {config.dim_mult}, {config.z_dim} latent channels",
)
UMT5 = Network(
    component="text_encoder",
    config=UMT5Config,
    abstract=umt5.abstract,
    name=lambda piece, naming, _: umt5_weights.published_name(
        _inner(piece.path), piece.layer, guesses.own_names(naming)
    ),
    to_ours=lambda path, value, _: umt5_weights.tensor_to_ours(path, value),
    to_published=lambda path, value, *_: umt5_weights.tensor_to_published(path, value),
    guess=guesses.umt5,
    describe=lambda config: (
        f"umT5 text encoder of {config.num_layers} layers, width {config.dim}, {config.vocab_size} tokens"
    ),
    stacked=guesses.BLOCKS,
    twins=umt5_weights.TWINS,
)
CLIP = Network(
    component="image_encoder",
    config=CLIPConfig,
    abstract=clip_vision.abstract,
    name=lambda piece, naming, _: clip_weights.published_name(
        _inner(piece.path), piece.layer, guesses.own_names(naming)
    ),
    to_ours=lambda path, value, naming: clip_weights.tensor_to_ours(_inner(path), value, guesses.own_names(naming)),
    to_published=lambda path, value, config, naming: clip_weights.tensor_to_published(
        _inner(path), value, config, guesses.own_names(naming)
    ),
    guess=guesses.clip,
    describe=lambda config: (
        f"CLIP image encoder of {config.num_layers} layers, width {config.dim}, {config.num_heads} heads"
    ),
    stacked=guesses.BLOCKS,
    unread=clip_weights.unread,
    place=lambda path: clip_weights.place(_inner(path)),
)
TAEHV = Network(
    component="taehv",
    config=TAEHVConfig,
    abstract=taehv.abstract,
    name=lambda piece, _, config: taehv_weights.published_name(piece.path, config),
    to_ours=lambda path, value, _: taehv_weights.tensor_to_ours(path, value),
    to_published=lambda path, value, *_: taehv_weights.tensor_to_published(path, value),
    guess=guesses.taehv,
    describe=lambda config: (
        f"TAEHV of widths {config.encoder_dim} and {config.decoder_dims}, {config.z_dim} latent channels"
    ),
    namings=("original", "causvid_jax"),
)
NETWORKS: tuple[Network, ...] = (TRANSFORMER, VAE, UMT5, CLIP, TAEHV)
"""The networks that files are compared with."""


def network_of(config: Config) -> Network:
    """The network whose sizes ``config`` is."""
    found = next((network for network in NETWORKS if isinstance(config, network.config)), None)
    require(found is not None, f"{type(config).__name__} is the configuration of no network with weights")
    assert found is not None
    return found
