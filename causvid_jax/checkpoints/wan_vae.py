"""The Wan2.1 VAE between its published checkpoints and our parameter tree.

Two namings exist: the original file (``Wan2.1_VAE.pth``: ``encoder.downsamples.0.residual.2.weight``) and diffusers'
``AutoencoderKLWan`` (``encoder.down_blocks.0.conv1.weight``). Both store kernels as [out, in, (kt,) kh, kw] and gammas
as [C, 1, 1(, 1)]; ours are [(kt,) kh, kw, in, out] and [C]. A state is a dict of numpy arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from causvid_jax.config import VAEConfig, require
from causvid_jax.models import vae

State = Mapping[str, np.ndarray]
Path = tuple[str, ...]

PUBLISHED = VAEConfig()

_LEAF = {"kernel": "weight", "bias": "bias", "gamma": "gamma"}
_ORIGINAL_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
_ORIGINAL_HEAD = {"norm": "0", "conv": "2"}
_DIFFUSERS_TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_DIFFUSERS_NET = {"conv1": "conv_in", "head/norm": "norm_out", "head/conv": "conv_out"}
_DIFFUSERS_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def original_name(path: Path, config: VAEConfig) -> str:
    """The name in the original checkpoint of the parameter at ``path`` of our tree, ("encoder", "conv1", "kernel")."""
    *module, leaf = path
    if len(module) == 1 or module[1] == "conv1":
        renamed = module
    elif module[1] == "head":
        renamed = [*module[:2], _ORIGINAL_HEAD[module[2]]]
    elif _kind(path, config) == "residual":
        renamed = [*module[:3], _ORIGINAL_RESIDUAL.get(module[3], module[3])]
    else:
        renamed = [*module[:3], "resample.1" if module[3] == "conv" else module[3]]
    return ".".join([*renamed, _LEAF[leaf]])


def diffusers_name(path: Path, config: VAEConfig) -> str:
    """The name in a diffusers checkpoint of the parameter at ``path`` of our tree."""
    *module, leaf = path
    if len(module) == 1:
        renamed = [_DIFFUSERS_TOP[module[0]]]
    elif module[1] in ("conv1", "head"):
        renamed = [module[0], _DIFFUSERS_NET["/".join(module[1:])]]
    else:
        inner = {"shortcut": "conv_shortcut"}.get(module[3], module[3])
        if _kind(path, config) in ("resample2d", "resample3d") and inner == "conv":
            inner = "resample.1"
        renamed = [module[0], _diffusers_layer(module[1], module[2], config), inner]
    return ".".join([*renamed, _LEAF[leaf]])


def from_original(state: State, config: VAEConfig = PUBLISHED) -> dict[str, Any]:
    """Our parameter tree (float32 numpy) from the original checkpoint's state dict; ConfigError if it does not fit."""
    return _import(state, config, original_name)


def from_diffusers(state: State, config: VAEConfig = PUBLISHED) -> dict[str, Any]:
    """Our parameter tree (float32 numpy) from a diffusers state dict; ConfigError if it does not fit ``config``."""
    return _import(state, config, diffusers_name)


def to_original(params: dict[str, Any], config: VAEConfig = PUBLISHED) -> dict[str, np.ndarray]:
    """The original checkpoint's state dict of our parameter tree: the inverse of :func:`from_original`."""
    return _export(params, config, original_name)


def to_diffusers(params: dict[str, Any], config: VAEConfig = PUBLISHED) -> dict[str, np.ndarray]:
    """The diffusers state dict of our parameter tree: the inverse of :func:`from_diffusers`."""
    return _export(params, config, diffusers_name)


def tensor_to_ours(path: Path, value: np.ndarray) -> np.ndarray:
    """One published tensor in our layout, a view; ``path`` as in :func:`original_name`."""
    if path[-1] == "kernel":
        return np.moveaxis(value, (1, 0), (-2, -1))
    return value.reshape(value.shape[:1])


def tensor_to_published(path: Path, value: np.ndarray) -> np.ndarray:
    """The inverse of :func:`tensor_to_ours`."""
    if path[-1] == "kernel":
        return np.moveaxis(value, (-2, -1), (1, 0))
    return value.reshape(_stored_shape(path, value.shape))


def _kind(path: Path, config: VAEConfig) -> str:
    net, stack, index = path[:3]
    if stack == "middle":
        return "attention" if index == "1" else "residual"
    plan = vae.encoder_layers(config) if net == "encoder" else vae.decoder_layers(config)
    return plan[int(index)][0]


def _diffusers_layer(stack: str, index: str, config: VAEConfig) -> str:
    if stack == "middle":
        return f"mid_block.{_DIFFUSERS_MIDDLE[index]}"
    if stack == "downsamples":
        return f"down_blocks.{index}"
    # The decoder groups each level: its residual blocks, then the resampling.
    block, layer = divmod(int(index), config.num_res_blocks + 2)
    return f"up_blocks.{block}." + (f"resnets.{layer}" if layer <= config.num_res_blocks else "upsamplers.0")


def _path(keys: tuple) -> Path:
    return tuple(key.key for key in keys)


def _stored_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] == "kernel":
        return (shape[-1], shape[-2], *shape[:-2])
    if path[-1] == "gamma":
        # The norm of the attention acts on images, the others on video.
        return (*shape, 1, 1) if path[1:3] == ("middle", "1") else (*shape, 1, 1, 1)
    return shape


def _import(state: State, config: VAEConfig, name_of: Callable[[Path, VAEConfig], str]) -> dict[str, Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(vae.abstract(config))
    names = [name_of(_path(keys), config) for keys, _ in leaves]
    missing, unknown = sorted(set(names) - set(state)), sorted(set(state) - set(names))
    require(not missing, f"{len(missing)} VAE weights are missing, the first is {missing[:1]}; expected {len(names)}")
    require(not unknown, f"{len(unknown)} weights are not of this VAE, the first is {unknown[:1]}")
    out = []
    for name, (keys, leaf) in zip(names, leaves, strict=True):
        value, expected = np.asarray(state[name], np.float32), _stored_shape(_path(keys), leaf.shape)
        require(value.shape == expected, f"weight {name} has shape {value.shape}; this VAE config needs {expected}")
        out.append(np.ascontiguousarray(tensor_to_ours(_path(keys), value)))
    return jax.tree_util.tree_unflatten(structure, out)


def _export(params: dict[str, Any], config: VAEConfig, name_of: Callable[[Path, VAEConfig], str]) -> dict:
    state = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = _path(keys)
        state[name_of(path, config)] = np.ascontiguousarray(tensor_to_published(path, np.asarray(leaf)))
    return state
