"""Parameters of the transformer for streaming: every layer has its own arrays.

Training stacks the parameters of all layers and scans one compiled layer. A scan copies each layer's slice of a stacked
array before a product, and it copies the whole of a scanned key/value cache. A stream therefore runs its layers in a
loop over tuples: nothing is sliced, and each layer's cache is written in place.

In this form the columns of the q and k projections of self-attention are also reordered, in every head, from
interleaved rotary pairs ``(x0, x1, x2, x3, ...)`` to halves ``(x0, x2, ..., x1, x3, ...)``. Attention does not depend
on the order of a head's columns. Halves need no last axis of length 2, which is slow on vector units.
"""

import functools
from typing import Any

import jax
import numpy as np
from einops import rearrange

from causvid_jax.config import TransformerConfig
from causvid_jax.models.layers import Params

ROTATED: tuple[tuple[str, ...], ...] = (
    *(("q", "kernel"), ("q", "bias"), ("k", "kernel"), ("k", "bias"), ("norm_q", "scale"), ("norm_k", "scale")),
    *(("q", "kernel", "int8"), ("q", "kernel", "scale"), ("k", "kernel", "int8"), ("k", "kernel", "scale")),
    *(("q", "lora", "up"), ("k", "lora", "up")),
)
"""Parameters of self-attention that have the heads' rotated columns as their last axis."""


def is_unstacked(params: Params) -> bool:
    """Return whether ``params`` are unstacked: a tuple of layers."""
    return isinstance(params["blocks"], tuple)


def _split(leaf: jax.Array, heads: int, rotated: bool) -> tuple[jax.Array, ...]:
    """Return the layers of a stacked array ``[L, ...]``; with ``rotated`` in the order of halves."""
    where = None
    if isinstance(leaf, jax.Array):
        if isinstance(leaf, jax.core.Tracer) or [device.platform for device in leaf.devices()] != ["cpu"]:
            return _split_on_device(leaf, heads, rotated)
        where = leaf.sharding if leaf.committed else None  # another placement would be another program
    # For a small network, programs for every shape would take longer to compile than the stream's own to load.
    return tuple(jax.device_put(np.array(layer), where) for layer in _ordered(np.asarray(leaf), heads, rotated))


@functools.partial(jax.jit, static_argnames=("heads", "rotated"))
def _split_on_device(leaf: jax.Array, heads: int, rotated: bool) -> tuple[jax.Array, ...]:
    return tuple(_ordered(leaf, heads, rotated))


def _ordered(leaf: Any, heads: int, rotated: bool) -> Any:
    return rearrange(leaf, "... (N j two) -> ... (N two j)", N=heads, two=2) if rotated else leaf


def unstack(params: Params, config: TransformerConfig, *, free: bool = False) -> Params:
    """Return ``params`` with ``blocks`` as a tuple of layers and rotary halves; unstacked parameters do not change.

    Args:
        params: parameters of :func:`models.transformer.inference_spec`; also shapes, inside ``jax.eval_shape``.
        config: of the network.
        free: delete each stacked array as soon as it is split. Memory then peaks at one array above the parameters.
    """
    if is_unstacked(params):
        return params

    def split(path: Any, leaf: jax.Array) -> tuple[jax.Array, ...]:
        names = tuple(part.key for part in path)
        layers = _split(leaf, config.num_heads, names[0] == "self_attn" and names[1:] in ROTATED)
        if free:
            jax.block_until_ready(layers)
            leaf.delete()
        return layers

    split_leaves = jax.tree_util.tree_map_with_path(split, params["blocks"])
    outer = jax.tree.structure(params["blocks"])
    inner = jax.tree.structure((0,) * config.num_layers)
    return {**params, "blocks": jax.tree.transpose(outer, inner, split_leaves)}
