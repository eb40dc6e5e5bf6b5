"""The UMT5 encoder between its published checkpoints and our parameter tree.

Two namings exist: Wan2.1's own file (``models_t5_umt5-xxl-enc-bf16.pth``: ``blocks.0.attn.q.weight``) and transformers'
``UMT5EncoderModel`` (``encoder.block.0.layer.0.SelfAttention.q.weight``). Both store linear weights as [out, in]; ours
are [in, out], the layers stacked on a leading axis. A state maps names to numpy arrays; types are kept as they are.

At full size a tree is 11 GB in bfloat16, so stacked arrays are filled in place and a state can be consumed on the way.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import jax
import numpy as np

from causvid_jax.checkpoints import store
from causvid_jax.config import UMT5Config, require
from causvid_jax.models import umt5

State = Mapping[str, np.ndarray]

NAMINGS = ("original", "transformers")

# Our path -> (original, transformers).
_OUTER = {
    "token_embedding": ("token_embedding.weight", "shared.weight"),
    "norm/scale": ("norm.weight", "encoder.final_layer_norm.weight"),
}
_LAYER_PREFIX = ("blocks.{}.", "encoder.block.{}.")
_LAYER = {
    "norm1/scale": ("norm1.weight", "layer.0.layer_norm.weight"),
    "attn/q/kernel": ("attn.q.weight", "layer.0.SelfAttention.q.weight"),
    "attn/k/kernel": ("attn.k.weight", "layer.0.SelfAttention.k.weight"),
    "attn/v/kernel": ("attn.v.weight", "layer.0.SelfAttention.v.weight"),
    "attn/o/kernel": ("attn.o.weight", "layer.0.SelfAttention.o.weight"),
    "relative_bias": ("pos_embedding.embedding.weight", "layer.0.SelfAttention.relative_attention_bias.weight"),
    "norm2/scale": ("norm2.weight", "layer.1.layer_norm.weight"),
    "ffn/gate/kernel": ("ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
    "ffn/fc1/kernel": ("ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    "ffn/fc2/kernel": ("ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
}
# transformers ties the encoder's embedding to the shared one: a state dict holds both names, a file only the first.
_EMBEDDING, _TIED = _OUTER["token_embedding"][1], "encoder.embed_tokens.weight"
TWINS = {_TIED: _EMBEDDING}
"""A tensor that a file may hold instead of, or beside, the other."""


def published_name(path: str, layer: int | None, naming: str) -> str:
    """The published name of the parameter at ``path`` of our tree (``blocks/`` left out, ``layer`` given there)."""
    require(naming in NAMINGS, f"naming is {naming!r}; accepted: {', '.join(NAMINGS)}")
    column = NAMINGS.index(naming)
    return _OUTER[path][column] if layer is None else _LAYER_PREFIX[column].format(layer) + _LAYER[path][column]


def tensor_to_ours(path: str, value: np.ndarray) -> np.ndarray:
    """One published tensor in our layout, a view."""
    return value.T if _is_kernel(path) else value


def tensor_to_published(path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of :func:`tensor_to_ours`."""
    return value.T if _is_kernel(path) else value


def published_shapes(config: UMT5Config, naming: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint of ``config``'s size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in store.flatten(umt5.abstract(config)).items():
        inner = path.removeprefix("blocks/")
        if inner == path:
            shapes[published_name(path, None, naming)] = leaf.shape
        else:
            shape = leaf.shape[:0:-1] if _is_kernel(path) else leaf.shape[1:]
            shapes |= {published_name(inner, layer, naming): shape for layer in range(config.num_layers)}
    return shapes


def from_published(
    state: State, config: UMT5Config, naming: str = "original", *, consume: bool = False
) -> dict[str, Any]:
    """Our parameter tree (numpy) from a published state dict.

    Args:
        state: names to arrays. It may read lazily: one tensor is held at a time.
        config: the sizes it must have.
        naming: ``"original"`` or ``"transformers"``.
        consume: take each tensor out of ``state`` once it is copied, so that the peak is one tree and one stacked array
            instead of two trees; ``state`` (then mutable) is empty afterwards.

    Raises:
        ConfigError: missing, unexpected or misshapen tensors, named; layers of different types; two token embeddings
            that differ.
    """
    expected = {n: jax.ShapeDtypeStruct(shape, np.float32) for n, shape in published_shapes(config, naming).items()}
    require(
        not consume or isinstance(state, MutableMapping),
        f"consume needs a state that tensors can be taken out of, not a {type(state).__name__}",
    )
    have = {name: jax.ShapeDtypeStruct(state[name].shape, np.float32) for name in state}
    tied = naming == "transformers" and _TIED in have
    if tied:
        _check_tied(state)
        have[_EMBEDDING] = have.pop(_TIED)
    store.check_tree(have, expected, f"{naming} UMT5 weights")

    def take(path: str, layer: int | None) -> np.ndarray:
        name = published_name(path, layer, naming)
        name = _TIED if tied and name == _EMBEDDING else name
        return np.asarray(state.pop(name) if consume and isinstance(state, MutableMapping) else state[name])

    flat = {}
    for path, leaf in store.flatten(umt5.abstract(config)).items():
        inner = path.removeprefix("blocks/")
        if inner == path:
            flat[path] = take(path, None)
        else:
            flat[path] = _stack(path, (take(inner, layer) for layer in range(config.num_layers)), leaf.shape)
    if consume and isinstance(state, MutableMapping):
        state.clear()
    return store.unflatten(flat)


def named_tensors(
    params: Mapping[str, Any], config: UMT5Config, naming: str = "original"
) -> Iterator[tuple[str, np.ndarray]]:
    """(published name, contiguous array) of every parameter of our tree, made one at a time."""
    for path, value in store.flatten(params).items():
        inner, value = path.removeprefix("blocks/"), np.asarray(value)
        if inner == path:
            yield published_name(path, None, naming), np.ascontiguousarray(value)
        else:
            for layer in range(config.num_layers):
                tensor = value[layer].T if _is_kernel(path) else value[layer]
                yield published_name(inner, layer, naming), np.ascontiguousarray(tensor)


def to_published(params: Mapping[str, Any], config: UMT5Config, naming: str = "original") -> dict[str, np.ndarray]:
    """A published state dict from our tree (a second copy of it); :func:`from_published` inverts it bit for bit."""
    return dict(named_tensors(params, config, naming))


def _is_kernel(path: str) -> bool:
    return path.endswith("/kernel")


def _check_tied(state: State) -> None:
    """Refuse a state whose two token embeddings differ: one of them was never loaded."""
    require(
        _EMBEDDING not in state or np.array_equal(state[_EMBEDDING], state[_TIED]),
        f"transformers UMT5 weights hold two different token embeddings, {_EMBEDDING} and {_TIED}; they must be equal",
    )


def _stack(path: str, layers: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The layers' tensors, kernels transposed, written one by one into one array."""
    out = None
    for index, value in enumerate(layers):
        out = np.empty(shape, value.dtype) if out is None else out
        require(
            value.dtype == out.dtype,
            f"UMT5 weights mix types: {path} is {out.dtype} in layer 0 and {value.dtype} in layer {index}",
        )
        out[index] = value.T if _is_kernel(path) else value
    assert out is not None
    return out
