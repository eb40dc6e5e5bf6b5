"""Open PyTorch checkpoints as lazy tensors, with PyTorch's weights-only loader only.

A pickle is a program. The weights-only loader allows only the few calls that build tensors. PyTorch is an optional
extra; without it a checkpoint is refused, and the message names the extra.
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

from causvid_jax.checkpoints.safetensors_io import Tensor
from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import reason

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_DEEPEST = 8


def open_pickle(path: pathlib.Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a PyTorch checkpoint by part: ``{"generator_ema": {name: Tensor}, ...}``.

    A part is the dotted path of a nested dict; "" is the top level. Values other than tensors are ignored. The file is
    memory-mapped.

    Raises:
        ConfigError: PyTorch is not installed, or the file does not exist, is no checkpoint of PyTorch, holds code or
            has no tensors.
    """
    require(path.is_file(), f"weights file {path} does not exist")
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} is a PyTorch pickle, which only PyTorch's weights-only loader may open: install it with "
            "'pip install causvid_jax[torch]', or give a .safetensors file"
        ) from error
    try:
        content, mapped = _unpickle(path, torch)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)|(?:function|class|type)[: ]+`?([\w.]+)", str(error))
        require(
            code is None,
            f"{path} is refused, and nothing in it was run: its pickle asks for "
            f"{(code.group(1) or code.group(2)) if code else ''}, which is code and no tensor",
        )
        raise ConfigError(f"{path} is not a readable PyTorch checkpoint: {_first(error)}") from error
    except Exception as error:  # A damaged pickle makes PyTorch raise errors of any type.
        raise ConfigError(f"{path} is not a readable PyTorch checkpoint: {_first(error)}") from error
    parts: dict[str, dict[str, Tensor]] = {}

    def walk(value: Any, part: str, depth: int) -> None:
        if not isinstance(value, dict) or depth > _DEEPEST:
            return
        tensors = {str(name): leaf for name, leaf in value.items() if isinstance(leaf, torch.Tensor)}
        if tensors:
            parts[part] = {name: _lazy(leaf, mapped) for name, leaf in tensors.items()}
        for name, leaf in value.items():
            walk(leaf, f"{part}.{name}" if part else str(name), depth + 1)

    try:
        walk(content, "", 0)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} holds a tensor that cannot be read: {_first(error)}") from error
    require(parts, f"{path} holds no tensors")
    return parts


def _unpickle(path: pathlib.Path, torch: Any) -> tuple[Any, bool]:
    """Return the content of a checkpoint and whether it is memory-mapped."""
    # Training checkpoints keep losses as NumPy numbers, which are data as tensors are.
    scalar = np.float64(0).__reduce__()[0]
    names = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype]
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]
    with torch.serialization.safe_globals([*names, *kinds]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
        # Written before PyTorch 1.6: not a zip file.
        return torch.load(path, map_location="cpu", weights_only=True), False


def as_array(tensor: Any) -> np.ndarray:
    """Return a PyTorch, JAX or NumPy array as a NumPy array; bfloat16 and float8 become the types of ``ml_dtypes``."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    carried = {
        torch.bfloat16: (torch.uint16, jnp.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, jnp.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, jnp.float8_e5m2),
    }
    tensor = tensor.detach().cpu()
    if tensor.dtype not in carried:
        return tensor.numpy()
    plain, dtype = carried[tensor.dtype]
    return tensor.view(plain).numpy().view(jnp.dtype(dtype))


def _lazy(tensor: Any, mapped: bool) -> Tensor:
    array = as_array(tensor)

    @contextlib.contextmanager
    def view() -> Iterator[np.ndarray]:
        yield array
        if mapped:
            _forget(array)

    return Tensor(array.shape, array.dtype, view)


def _forget(array: np.ndarray) -> None:
    """Drop the pages that reading ``array`` brought into memory; the map of the file outlives the view."""
    if sys.platform != "linux" or not array.flags["C_CONTIGUOUS"]:
        return
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (array.ctypes.data + array.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _first(error: Exception) -> str:
    """Return the first sentence of PyTorch's message, which is often very long."""
    return re.split(r"(?<=[a-z])\.\s|\n|\. This file", reason(error), maxsplit=1)[0][:200]
