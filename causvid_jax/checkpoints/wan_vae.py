"""The VAEs of Wan2.1 and Wan2.2-TI2V-5B: their keys in published checkpoints, presets and ``config.json``.

Original keys (``encoder.downsamples.0.residual.2.weight``) are those of ``Wan2.1_VAE.pth``; diffusers'
``AutoencoderKLWan`` (``encoder.down_blocks.0.conv1.weight``) groups the decoder's layers by level. Wan2.2 groups the
layers of encoder and decoder by level (``encoder.downsamples.0.downsamples.1.residual.2.weight``). The kind of a
numbered layer depends on the configuration (``models.vae.encoder_layers``).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from causvid_jax.checkpoints.table import (
    CONVOLUTION,
    LEAVES,
    OURS,
    SAME,
    Network,
    Row,
    Shapes,
    Sizes,
    Transform,
    build,
    trailing,
)
from causvid_jax.config import (
    WAN22_LATENT_MEAN,
    WAN22_LATENT_STD,
    WAN22_VAE,
    WAN_LATENT_MEAN,
    WAN_LATENT_STD,
    VAEConfig,
)
from causvid_jax.models import vae

STATISTICS = ("latent_mean", "latent_std")

# Our module -> (original, diffusers). A layer's prefix and its own modules are renamed one after the other.
TABLE: Mapping[str, tuple[str, str]] = {
    "conv1": ("conv1", "quant_conv"),
    "conv2": ("conv2", "post_quant_conv"),
    **{
        f"{net}/{ours}": (f"{net}.{original}", f"{net}.{diffusers}")
        for net in ("encoder", "decoder")
        for ours, original, diffusers in (
            ("conv1", "conv1", "conv_in"),
            ("head/norm", "head.0", "norm_out"),
            ("head/conv", "head.2", "conv_out"),
            ("middle/0", "middle.0", "mid_block.resnets.0"),
            ("middle/1", "middle.1", "mid_block.attentions.0"),
            ("middle/2", "middle.2", "mid_block.resnets.1"),
        )
    },
}
# By kind of layer: our module -> (original, diffusers).
_RESIDUAL = {
    "norm1": ("residual.0", "norm1"),
    "conv1": ("residual.2", "conv1"),
    "norm2": ("residual.3", "norm2"),
    "conv2": ("residual.6", "conv2"),
    "shortcut": ("shortcut", "conv_shortcut"),
}
_RESAMPLE = {"conv": ("resample.1", "resample.1")}
_ALIASES = {"temperal_downsample": "temporal_downsample", "latents_mean": "latent_mean", "latents_std": "latent_std"}


def _layer_prefix(net: str, stack: str, index: str, config: VAEConfig, column: int) -> tuple[str, str]:
    """Return the key prefix of a numbered layer and its kind."""
    if stack == "middle":
        return TABLE[f"{net}/middle/{index}"][column], "attention" if index == "1" else "residual"
    layers = vae.encoder_layers(config) if net == "encoder" else vae.decoder_layers(config)
    kind = layers[int(index)][0]
    if config.is_residual:
        level, place = divmod(int(index), config.num_res_blocks + (1 if net == "encoder" else 2))
        if column == 0:
            return f"{net}.{stack}.{level}.{stack}.{place}", kind
        way = "down" if net == "encoder" else "up"
        inner = f"resnets.{place}" if kind == "residual" else f"{way}sampler"
        return f"{net}.{way}_blocks.{level}.{inner}", kind
    if column == 0:
        return f"{net}.{stack}.{index}", kind
    if net == "encoder":
        return f"encoder.down_blocks.{index}", kind
    block, layer = divmod(int(index), config.num_res_blocks + 2)
    inner = f"resnets.{layer}" if layer <= config.num_res_blocks else "upsamplers.0"
    return f"decoder.up_blocks.{block}.{inner}", kind


def _published(config: VAEConfig, form: str, shapes: Shapes) -> Iterator[Row]:
    column = int(form == "diffusers")
    for path in shapes:
        module, _, leaf = path.rpartition("/")
        if module in TABLE:
            key = TABLE[module][column]
        else:
            net, stack, index, inner = module.split("/")
            prefix, kind = _layer_prefix(net, stack, index, config, column)
            names = _RESIDUAL if kind == "residual" else _RESAMPLE if kind.startswith("resample") else {}
            key = f"{prefix}.{names[inner][column] if inner in names else inner}"
        yield Row(path, None, f"{key}.{LEAVES[leaf]}", _transform(path))


def _transform(path: str) -> Transform:
    if path.endswith("/kernel"):
        return CONVOLUTION
    # The norm of the attention acts on images, the others on video.
    return trailing(2 if "/middle/1/" in path else 3) if path.endswith("/gamma") else SAME


# By format: keys of the encoder's layers, and within a layer the last residual bias and the spatial resampling.
_LAYERS = {
    "original": (r"encoder\.downsamples\.(\d+)\.(.+)", "residual.6.bias", "resample.1.bias", "time_conv.bias"),
    "diffusers": (r"encoder\.down_blocks\.(\d+)\.(.+)", "conv2.bias", "resample.1.bias", "time_conv.bias"),
    OURS: (r"encoder/downsamples/(\d+)/(.+)", "conv2/bias", "conv/bias", "time_conv/bias"),
}


def _infer(size: Sizes, known: Mapping[str, Any]) -> VAEConfig | None:
    """Infer the levels from the sequence of residual and resampling layers of the encoder."""
    base = size("encoder/conv1/bias", 0)
    pattern, residual, spatial, temporal = _LAYERS[size.form]
    kinds: dict[int, dict[str, int]] = {}
    for key, shape in size.shapes.items():
        if (match := re.match(pattern, key)) and len(shape) == 1:
            kinds.setdefault(int(match.group(1)), {})[match.group(2)] = shape[0]
    widths: list[list[int]] = [[]]
    in_time = []
    for _, layer in sorted(kinds.items()):
        if residual in layer:
            widths[-1].append(layer[residual])
        elif spatial in layer:
            in_time.append(temporal in layer)
            widths.append([])
    if not base or not all(widths):
        return None
    return build(
        VAEConfig,
        base_dim=base,
        z_dim=size("conv2/bias", 0),
        dim_mult=tuple(level[-1] // base for level in widths),
        num_res_blocks=len(widths[0]),
        temporal_downsample=tuple(in_time),
    )


def statistics(config: VAEConfig, known: Mapping[str, Any], form: str) -> VAEConfig:
    """Return ``config`` with the latent statistics of the file; a published file without them has the published ones.

    Args:
        config: of the VAE.
        known: metadata or ``config.json`` of the file, with ``latent_mean`` and ``latent_std``.
        form: format of the file.
    """
    values = [known.get(name) for name in STATISTICS]
    if all(isinstance(value, list) and len(value) == config.z_dim for value in values):
        mean, std = (tuple(map(float, value)) for value in values if value is not None)
    elif form != OURS and config.z_dim == len(WAN_LATENT_MEAN):
        mean, std = WAN_LATENT_MEAN, WAN_LATENT_STD
    elif form != OURS and config.z_dim == len(WAN22_LATENT_MEAN):
        mean, std = WAN22_LATENT_MEAN, WAN22_LATENT_STD
    else:
        return config
    return build(VAEConfig, **{**vars(config), "latent_mean": mean, "latent_std": std}) or config


def metadata(config: VAEConfig) -> dict[str, str]:
    """Return the latent statistics of ``config`` as a file's metadata."""
    return {name: json.dumps(getattr(config, name)) for name in STATISTICS}


def _to_json(config: VAEConfig, form: str) -> dict[str, Any] | None:
    """Return the constructor's arguments of diffusers' class; the original format has no ``config.json``."""
    if form == "original":
        return None
    content = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.base_dim,
        "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        # The spelling of the published class.
        "temperal_downsample": list(config.temporal_downsample),
        "dropout": 0.0,
    }
    if config.is_residual:
        content |= {
            "decoder_base_dim": config.decoder_base_dim,
            "patch_size": config.patch_size,
            "is_residual": True,
            "in_channels": 3 * config.patch_size**2,
            "out_channels": 3 * config.patch_size**2,
            "scale_factor_spatial": config.space_factor,
        }
    if config.latent_mean:
        content |= {"latents_mean": list(config.latent_mean), "latents_std": list(config.latent_std)}
    return content


NETWORK = Network(
    component="vae",
    config=VAEConfig,
    abstract=vae.abstract,
    published=_published,
    template=VAEConfig(),
    presets=(VAEConfig(), WAN22_VAE),
    infer=_infer,
    aliases=_ALIASES,
    describe=lambda config: f"VAE of width {config.base_dim} x {config.dim_mult}, {config.z_dim} latent channels",
    to_json=_to_json,
)
