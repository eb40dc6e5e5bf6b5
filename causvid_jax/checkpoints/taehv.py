"""TAEHV between its published checkpoints (``taew2_1``) and our parameter tree.

The published networks are flat sequences, named by position: ``decoder.3.conv.0.weight`` is the first convolution of
the first memory block. Their kernels are [out, in, kh, kw], ours [kh, kw, in, out]. A state is a dict of numpy arrays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from causvid_jax.checkpoints import store
from causvid_jax.config import TAEHVConfig, require
from causvid_jax.models import taehv

State = Mapping[str, np.ndarray]

PUBLISHED = TAEHVConfig()

_BLOCK_CONV = {"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}
_LEAF = {"kernel": "weight", "bias": "bias"}


def published_name(path: str, config: TAEHVConfig) -> str:
    """The published name of the parameter at ``path`` of our tree, ``"decoder/levels/0/blocks/1/conv2/kernel"``.

    Positions count what has no parameters too. Encoder: input convolution, ReLU; by level pooling, convolution, memory
    blocks; output convolution. Decoder: latent clamp, input convolution, ReLU; by level memory blocks, upsampling,
    growing, convolution; ReLU, output convolution.
    """
    net, *module, leaf = path.split("/")
    levels, blocks = len(config.temporal_upsample), config.blocks
    encodes = net == "encoder"
    if module[0] == "conv_in":
        place = "0" if encodes else "1"
    elif module[0] == "conv_out":
        place = str(2 + levels * (blocks + 2)) if encodes else str(3 + levels * (blocks + 3) + 1)
    else:
        level, kind, *inner = module[1:]
        start = 2 + int(level) * (blocks + 2) if encodes else 3 + int(level) * (blocks + 3)
        if kind == "blocks":
            index, convolution = inner
            place = f"{start + 2 * encodes + int(index)}.{_BLOCK_CONV[convolution]}"
        elif kind == "conv":
            place = str(start + (1 if encodes else blocks + 2))
        else:  # pool and grow
            place = f"{start if encodes else start + blocks + 1}.conv"
    return f"{net}.{place}.{_LEAF[leaf]}"


def tensor_to_ours(path: str, value: np.ndarray) -> np.ndarray:
    """One published tensor in our layout, a view."""
    return rearrange(value, "o i h w -> h w i o") if path.endswith("/kernel") else value


def tensor_to_published(path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of :func:`tensor_to_ours`."""
    return rearrange(value, "h w i o -> o i h w") if path.endswith("/kernel") else value


def published_shapes(config: TAEHVConfig = PUBLISHED) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint of ``config``'s size."""
    return {
        published_name(path, config): _stored_shape(leaf.shape)
        for path, leaf in store.flatten(taehv.abstract(config)).items()
    }


def from_published(state: State, config: TAEHVConfig = PUBLISHED) -> dict[str, Any]:
    """Our parameter tree (float32 numpy) from a published state dict.

    Raises:
        ConfigError: missing, unexpected or misshapen tensors, named.
    """
    expected = published_shapes(config)
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {shape}"
            for name, shape in sorted(expected.items())
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    for problem, names in problems.items():
        require(
            not names,
            f"TAEHV weights do not fit the configuration: {len(names)} tensor(s) {problem}, "
            f"first {', '.join(names[:3])}",
        )
    flat = {}
    for path in store.flatten(taehv.abstract(config)):
        value = np.asarray(state[published_name(path, config)], np.float32)
        flat[path] = np.ascontiguousarray(tensor_to_ours(path, value))
    return store.unflatten(flat)


def to_published(params: Mapping[str, Any], config: TAEHVConfig = PUBLISHED) -> State:
    """A published state dict from our parameter tree; :func:`from_published` of it is ``params`` bit for bit."""
    state = {}
    for path, leaf in store.flatten(params).items():
        state[published_name(path, config)] = np.ascontiguousarray(tensor_to_published(path, np.asarray(leaf)))
    return state


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if len(shape) == 4 else tuple(shape)
