"""PyTorch checkpoints as lazy tensors, through PyTorch's weights-only loader and no other.

A pickle is a program; the weights-only loader knows the few calls that build tensors and refuses every other. PyTorch
is an optional extra: without it a checkpoint is refused, with what to do instead.
"""

import contextlib
import ctypes
import mmap
import pathlib
import pickle
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints.files import Tensor, reason
from causvid_jax.config import ConfigError, require

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def open_pickle(path: pathlib.Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a PyTorch checkpoint by part: ``{"generator_ema": {name: Tensor}, ...}``, "" for the top level.

    A part is a dict with tensors in it, wherever it lies; what is no tensor is left out. The file is memory-mapped.

    Raises:
        ConfigError: PyTorch is not installed, the file is none of its checkpoints, or its pickle holds code.
    """
    require(path.is_file(), f"weights file {path} does not exist")
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} is a PyTorch pickle, which only PyTorch's weights-only loader may open: install it with "
            "'pip install causvid_jax[torch]', or give a .safetensors file"
        ) from error
    mapped = True
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # Written before PyTorch 1.6: not a zip file.
            mapped, content = False, torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)|(?:function|class|type)[: ]+`?([\w.]+)", str(error))
        require(
            code is None,
            f"{path} is refused, and nothing in it was run: its pickle asks for "
            f"{(code.group(1) or code.group(2)) if code else ''}, which is code and no tensor",
        )
        raise ConfigError(f"{path} is not a readable PyTorch checkpoint: {_first(error)}") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} is not a readable PyTorch checkpoint: {_first(error)}") from error
    parts: dict[str, dict[str, Tensor]] = {}

    def walk(value: Any, part: str) -> None:
        if not isinstance(value, dict):
            return
        tensors = {str(name): leaf for name, leaf in value.items() if isinstance(leaf, torch.Tensor)}
        if tensors:
            parts[part] = {name: _lazy(leaf.detach(), mapped) for name, leaf in tensors.items()}
        for name, leaf in value.items():
            walk(leaf, f"{part}.{name}" if part else str(name))

    walk(content, "")
    require(parts, f"{path} holds no tensors")
    return parts


def _lazy(tensor: Any, mapped: bool) -> Tensor:
    array = _numpy(tensor)

    @contextlib.contextmanager
    def view() -> Iterator[np.ndarray]:
        yield array
        if mapped:
            _forget(array)

    return Tensor(array.shape, array.dtype, view)


def _numpy(tensor: Any) -> np.ndarray:
    """The tensor's own memory as a NumPy array; types that NumPy lacks pass as integers of their width."""
    import torch

    carried = {
        torch.bfloat16: (torch.uint16, jnp.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, jnp.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, jnp.float8_e5m2),
    }
    if tensor.dtype not in carried:
        return tensor.numpy()
    plain, dtype = carried[tensor.dtype]
    return tensor.view(plain).numpy().view(jnp.dtype(dtype))


def _forget(array: np.ndarray) -> None:
    """Let go of the memory that reading ``array`` took: the map of the file outlives it, its pages need not.

    Nothing but memory depends on it, so where the call does not exist nothing happens.
    """
    if sys.platform != "linux" or not array.flags["C_CONTIGUOUS"]:
        return
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (array.ctypes.data + array.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _first(error: Exception) -> str:
    """The first sentence of PyTorch's often very long ones."""
    return re.split(r"(?<=[a-z])\.\s|\n|\. This file", reason(error), maxsplit=1)[0][:200]
