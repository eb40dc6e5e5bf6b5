"""Save the state of a stream and load it again; the stream continues bit for bit."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.checkpoints.store import flatten, load_params, save_params
from causvid_jax.config import Recipe, changed_fields, require
from causvid_jax.models import kv_cache
from causvid_jax.sampling.state import StreamState

FORMAT = "3"  # with the settings by which the arrays are read


def save_stream(path: str | pathlib.Path, state: StreamState, *, config: Recipe) -> None:
    """Write the state as one safetensors file, from which :func:`load_stream` continues the stream bit for bit.

    The name of an array is its path in the state, such as ``cache.k``. The form of the cache is the same for every
    device, so a stream may continue on another one.

    Args:
        path: of the file; an existing file is replaced.
        state: between two blocks. It is not consumed.
        config: the recipe of the stream.

    Raises:
        ConfigError: the state of another sampler, or a path that cannot be written.
    """
    require(
        isinstance(state, StreamState),
        f"a {type(state).__name__} cannot be saved; accepted: a StreamState, also that of a RollingState with an "
        "empty window",
    )
    leaves = jax.tree_util.tree_leaves_with_path(_portable(state, config))
    metadata = {"started": str(state.started), "format": FORMAT, "settings": json.dumps(_settings(config))}
    save_params(path, {_name(where): leaf for where, leaf in leaves}, metadata)


def load_stream(path: str | pathlib.Path, like: StreamState, *, config: Recipe) -> StreamState:
    """Load a state that :func:`save_stream` wrote.

    Args:
        path: of the file.
        like: any state of the same recipe, batch and maximum length, such as that of a new stream.

    Returns:
        The state on the default device.

    Raises:
        ConfigError: the file is missing or damaged, or holds the state of another recipe, batch or student.
    """
    params, metadata = load_params(path, dtype=None)
    require(
        metadata.get("format") == FORMAT,
        f"stream state {path} is of format {metadata.get('format', '1')}; accepted: {FORMAT}",
    )
    changes = changed_fields(json.loads(metadata["settings"]), _settings(config)).values()
    require(not changes, f"stream state {path} does not fit this recipe: {', '.join(changes)}")
    arrays = flatten(params)
    shapes = jax.eval_shape(functools.partial(_portable, config=config), like)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    for where, leaf in leaves:
        array = arrays.get(_name(where))
        described = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
        expected = f"{leaf.dtype}{list(leaf.shape)}"
        require(
            described == expected,
            f"stream state {path} does not fit this recipe: {_name(where)} is {described}, not {expected}",
        )
    extra = sorted(set(arrays) - {_name(where) for where, _ in leaves})
    require(
        not extra,
        f"stream state {path} does not fit this recipe: it also holds {', '.join(extra)}; a new stream has no LoRA and "
        "no picture here",
    )
    state = jax.tree.unflatten(structure, [jnp.asarray(arrays[_name(where)]) for where, _ in leaves])
    return dataclasses.replace(
        state, cache=kv_cache.like(state.cache, like.cache), started=metadata["started"] == "True"
    )


def _portable(state: StreamState, config: Recipe) -> StreamState:
    (height, width), (_, patch_h, patch_w) = config.latent_size, config.student.patch_size
    tokens = (height // patch_h) * (width // patch_w)
    return dataclasses.replace(state, cache=kv_cache.frame_major(state.cache, tokens))


def _name(where: tuple) -> str:
    return jax.tree_util.keystr(where, simple=True, separator=".")


def _settings(config: Recipe) -> dict[str, Any]:
    """Return the settings by which the arrays of a state are read, and which their shapes do not tell."""
    causal, net = config.causal, config.student
    names = ("frames_per_block", "independent_first_frame", "window", "sink", "positions")
    return {f"causal.{name}": getattr(causal, name) for name in names} | {
        "student.patch_size": list(net.patch_size),
        "student.rope_theta": net.rope_theta,
    }
