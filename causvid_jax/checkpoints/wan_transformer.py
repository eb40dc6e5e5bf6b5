"""The Wan2.1 DiT between its published checkpoints and our parameter tree.

Two namings exist: the original one (``blocks.0.self_attn.q.weight``, as in Wan2.1, CausVid and Self-Forcing files)
and diffusers' ``WanTransformer3DModel`` (``blocks.0.attn1.to_q.weight``), which also swaps norm2 and norm3. Both store
linear weights as [out, in] and the patch embedding as a convolution [out, in, 1, ph, pw]; ours are [in, out], the
layers stacked on a leading axis. The image branch of the image-to-video model is converted where the configuration has
one. A state is a dict of numpy arrays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from causvid_jax.checkpoints import store
from causvid_jax.config import ConfigError, TransformerConfig, require
from causvid_jax.models import transformer

State = Mapping[str, np.ndarray]

# Our module path -> (original, diffusers); leaves below.
_OUTER = {
    "patch_embedding": ("patch_embedding", "patch_embedding"),
    "text_embedding/fc1": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text_embedding/fc2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time_embedding/fc1": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time_embedding/fc2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "time_projection": ("time_projection.1", "condition_embedder.time_proj"),
    "head/modulation": ("head.modulation", "scale_shift_table"),
    "head/proj": ("head.head", "proj_out"),
    **{
        f"image_embedding/{ours}": (f"img_emb.proj.{place}", f"condition_embedder.image_embedder.{theirs}")
        for ours, place, theirs in (
            ("norm1", 0, "norm1"),
            ("fc1", 1, "ff.net.0.proj"),
            ("fc2", 3, "ff.net.2"),
            ("norm2", 4, "norm2"),
        )
    },
}
_LAYER = {
    "modulation": ("modulation", "scale_shift_table"),
    "norm3": ("norm3", "norm2"),
    "ffn/fc1": ("ffn.0", "ffn.net.0.proj"),
    "ffn/fc2": ("ffn.2", "ffn.net.2"),
    **{
        f"{ours}/{part}": (f"{ours}.{part}", f"{theirs}.{published}")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, published in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "cross_attn/k_img": ("cross_attn.k_img", "attn2.add_k_proj"),
    "cross_attn/v_img": ("cross_attn.v_img", "attn2.add_v_proj"),
    "cross_attn/norm_k_img": ("cross_attn.norm_k_img", "attn2.norm_added_k"),
}
# diffusers files of the image-to-video model may hold a query norm that no network reads.
_UNREAD = "attn2.norm_added_q.weight"
_LEAF = {"kernel": ".weight", "bias": ".bias", "scale": ".weight"}
NAMINGS = ("original", "diffusers")


def _split(path: str) -> tuple[str, str]:
    """A path of our tree as (module, leaf); the modulation tables are their own module."""
    module, _, leaf = path.rpartition("/")
    return (path, "") if leaf == "modulation" else (module, leaf)


def unread(name: str) -> bool:
    """Whether a tensor of a published file is read by no network."""
    return name.endswith(_UNREAD)


def published_name(path: str, layer: int | None, naming: str) -> str:
    """The published name of the parameter at ``path`` of our tree (``blocks/`` left out, ``layer`` given there)."""
    require(naming in NAMINGS, f"naming is {naming!r}; accepted: {', '.join(NAMINGS)}")
    module, leaf = _split(path)
    table = _OUTER if layer is None else _LAYER
    name = table[module][NAMINGS.index(naming)] + _LEAF.get(leaf, "")
    return name if layer is None else f"blocks.{layer}.{name}"


def tensor_to_ours(path: str, value: np.ndarray) -> np.ndarray:
    """One published tensor in our layout, a view where the elements need not move; ``path`` as above."""
    if path.endswith("modulation"):
        return value[0]
    if path == "patch_embedding/kernel":
        return rearrange(value, "o c t p q -> (t p q c) o")
    return value.T if path.endswith("kernel") else value


def tensor_to_published(path: str, value: np.ndarray, config: TransformerConfig) -> np.ndarray:
    """The inverse of :func:`tensor_to_ours`."""
    if path.endswith("modulation"):
        return value[None]
    if path == "patch_embedding/kernel":
        t, p, q = config.patch_size
        return rearrange(value, "(t p q c) o -> o c t p q", t=t, p=p, q=q)
    return value.T if path.endswith("kernel") else value


def published_shapes(config: TransformerConfig, naming: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint of ``config``'s size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in store.flatten(transformer.abstract(config)).items():
        layers = range(config.num_layers) if path.startswith("blocks/") else (None,)
        inner = path.removeprefix("blocks/")
        ours = leaf.shape if layers == (None,) else leaf.shape[1:]
        shape = tensor_to_published(inner, np.broadcast_to(np.float32(0), ours), config).shape
        shapes |= {published_name(inner, layer, naming): shape for layer in layers}
    return shapes


def from_published(state: State, config: TransformerConfig, naming: str = "original") -> dict[str, Any]:
    """Our parameter tree (numpy) from a published state dict.

    Raises:
        ConfigError: missing, unexpected or misshapen tensors, named.
    """
    expected = published_shapes(config, naming)
    if naming == "diffusers" and config.image_dim:
        state = {name: value for name, value in state.items() if not unread(name)}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    misshapen = [name for name in expected.keys() & state.keys() if tuple(state[name].shape) != expected[name]]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", sorted(misshapen))):
        if names:
            raise ConfigError(
                f"{naming} transformer weights do not fit the configuration: {len(names)} tensor(s) {problem}, "
                f"first {', '.join(names[:3])}"
            )
    flat = {}
    for path in store.flatten(transformer.abstract(config)):
        inner = path.removeprefix("blocks/")
        if inner == path:
            flat[path] = tensor_to_ours(path, np.asarray(state[published_name(path, None, naming)]))
        else:
            layers = [np.asarray(state[published_name(inner, i, naming)]) for i in range(config.num_layers)]
            flat[path] = np.stack([tensor_to_ours(inner, value) for value in layers])
    return store.unflatten(flat)


def to_published(params: Mapping[str, Any], config: TransformerConfig, naming: str = "original") -> State:
    """A published state dict from our parameter tree; :func:`from_published` of it is ``params`` bit for bit."""
    state = {}
    for path, value in store.flatten(params).items():
        inner, value = path.removeprefix("blocks/"), np.asarray(value)
        if inner == path:
            state[published_name(path, None, naming)] = tensor_to_published(path, value, config)
        else:
            for i in range(config.num_layers):
                state[published_name(inner, i, naming)] = tensor_to_published(inner, value[i], config)
    return {name: np.ascontiguousarray(value) for name, value in state.items()}
