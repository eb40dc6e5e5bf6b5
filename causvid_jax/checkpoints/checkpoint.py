"""Recognise a checkpoint of any known format and load it straight onto devices.

:func:`open_checkpoint` recognises the network, the format and the sizes of a file or folder and reads only headers.
:func:`load` returns ``(params, config)``. Each device's shard is read from the part of the file that contains it.
``str(checkpoint)`` describes the recognised network, format, sizes and types in one line.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints import clip_vision, pickles, source, store, taehv, umt5, wan_transformer, wan_vae
from causvid_jax.checkpoints.safetensors_io import BUFFER, CHECKSUM, Tensor, array_tensor, sample_digest
from causvid_jax.checkpoints.source import Source
from causvid_jax.checkpoints.table import FORMATS, OURS, Config, Network, Row, Sizes
from causvid_jax.config import CLIPConfig, ConfigError, TransformerConfig, VAEConfig, published, require

NETWORKS = (wan_transformer.NETWORK, wan_vae.NETWORK, umt5.NETWORK, clip_vision.NETWORK, taehv.NETWORK)

# Parts of keys in files that are not read, and a description of these files for the error message.
_FOREIGN = {
    "img_emb.emb_pos": "a transformer for first and last frame, which this version does not have",
    "image_embedder.pos_embed": "a transformer for first and last frame, which this version does not have",
    "vace_": "a VACE transformer, which this version does not have",
    "lora_A": "a LoRA; give it with --lora, and the transformer as the checkpoint",
    "lora_down": "a LoRA; give it with --lora, and the transformer as the checkpoint",
    "lokr_": "a LoKr adapter, which is not read; accepted: LoRA",
    "hada_": "a LoHa adapter, which is not read; accepted: LoRA",
}


class Update(Protocol):
    """A change of a transformer's weights, such as :class:`causvid_jax.checkpoints.lora.Lora`."""

    def delta(self, row: Row, config: TransformerConfig) -> np.ndarray | None:
        """Return the array to add to a parameter, float32 in our layout; None for no change."""

    def identity(self) -> str:
        """Return a text that identifies the change."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint; no weights are read yet.

    Attributes:
        network: description of the network whose weights these are.
        format: ``"original"``, ``"diffusers"`` or ``"causvid_jax"``.
        config: the network's configuration; a VAE's with the latent statistics.
        source: the file, with only the tensors that the network reads.
        copies: second copies of tied tensors, under the names of the first copies.
        ignored: number of tensors in the file that the network does not read.
        updates: changes, such as LoRAs, that are added when a parameter is read.
    """

    network: Network
    format: str
    config: Any
    source: Source
    copies: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    ignored: int = 0
    updates: tuple[Update, ...] = ()

    @property
    def path(self) -> pathlib.Path:
        """The file or folder."""
        return self.source.path

    @property
    def dtypes(self) -> str:
        """The stored types, as ``"bfloat16, float32"``."""
        return ", ".join(sorted({tensor.dtype.name for tensor in self.source.tensors.values()}))

    def __str__(self) -> str:
        notes = [
            self.source.of_parts,
            f"without {' '.join(self.source.prefixes)}" if self.source.prefixes else "",
            f"{self.source.dequantised} tensors times their 8-bit scales" if self.source.dequantised else "",
            f"{self.ignored} unused tensors ignored" if self.ignored else "",
        ]
        more = "".join(f", {note}" for note in notes if note)
        return f"{self.path}: {describe(self.config)}, {self.format} names, {self.dtypes}{more}"

    def identity(self) -> str:
        """Return a text that identifies the weights: our checksum, else the :func:`sample_digest` of the tensors.

        With updates it is a SHA-256 of the identities of the weights and of every update.
        """
        if self.updates:
            base = dataclasses.replace(self, updates=())
            parts = [base.identity(), *(update.identity() for update in self.updates)]
            return hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return self.source.metadata.get(CHECKSUM) or sample_digest(self.source.tensors)

    @contextlib.contextmanager
    def read(self, row: Row) -> Iterator[np.ndarray]:
        """Yield a parameter in our layout with the updates added; without updates it is a view of the file."""
        with self.source.tensors[row.key].view() as tensor:
            value = row.transform.to_ours(tensor)
            del tensor
            for update in self.updates:
                delta = update.delta(row, self.config)
                if delta is not None:
                    delta += value.astype(np.float32)
                    value = delta
            yield value
            del value

    def check(self) -> None:
        """Compare the content of our own file with its checksum, and the copies of tied tensors with each other.

        Raises:
            ConfigError: the file was changed, or two tensors that should be equal differ.
        """
        if CHECKSUM in self.source.metadata:
            store.verify(self.path)
        for key, copy in self.copies.items():
            require(_equal(self.source.tensors[key], copy), f"{self.path} holds two different tensors {key}")


def describe(config: Config) -> str:
    """Return the sizes of a network in a few words."""
    return network_of(config).describe(config)


def network_of(config: Config) -> Network:
    """Return the network whose configuration class ``config`` has; raise a ConfigError if there is none."""
    for network in NETWORKS:
        if isinstance(config, network.config):
            return network
    raise ConfigError(f"{type(config).__name__} is the configuration of no network with weights")


def open_checkpoint(
    weights: str | os.PathLike | Mapping[str, Any],
    config: Config | None = None,
    *,
    part: str | None = None,
    num_heads: int = 0,
) -> Checkpoint:
    """Recognise the network, the format and the sizes of a checkpoint; read only headers.

    Args:
        weights: a file or the folder of one network: original Wan2.1, diffusers, CausVid, Self-Forcing and relatives,
            TAEHV, UMT5, CLIP, or ours; ``.safetensors``, ``.pt``, ``.pth``, sharded or not. Or a state dict in memory,
            or a nested tree of our parameters.
        config: the sizes that it must have; None recognises them by ``config.json``, metadata, presets or shapes.
        part: the part of a checkpoint with several parts, such as ``generator_ema``; None prefers the part that the
            authors of a published model sample (``config.published``), then EMA weights.
        num_heads: of a transformer; 0 takes it from the file's metadata or derives it from the width.

    Raises:
        ConfigError: the checkpoint is unreadable or has no known format, or other sizes than ``config``.
    """
    if isinstance(weights, Mapping):
        return recognise(_in_memory(weights), config, num_heads)
    path = pathlib.Path(weights)
    model = published.find(path)
    preferred = (model.part, *source.PREFERRED) if model and model.part else source.PREFERRED
    return recognise(source.open_source(path, part, preferred, not is_named_file(path)), config, num_heads)


# Network to patterns of file names in a published folder. The folder's config.json is the transformer's.
NAMED_FILES: Mapping[str, tuple[str, ...]] = {
    "vae": ("Wan2.1_VAE.*", "Wan2.2_VAE.*"),
    "text_encoder": ("models_t5_*",),
    "image_encoder": ("models_clip_*",),
    "taehv": ("taew2_1*", "taehv*"),
}


def is_named_file(path: pathlib.Path) -> bool:
    """Return whether the file name is one of :data:`NAMED_FILES`, which names the network."""
    return any(path.match(pattern) for patterns in NAMED_FILES.values() for pattern in patterns)


def _in_memory(weights: Mapping[str, Any]) -> Source:
    nested = any(isinstance(value, Mapping) for value in weights.values())
    flat = store.flatten(weights) if nested else weights
    tensors = {name: array_tensor(pickles.as_array(value)) for name, value in flat.items()}
    return Source(pathlib.Path("weights in memory"), tensors)


def recognise(opened: Source, config: Config | None = None, num_heads: int = 0) -> Checkpoint:
    """Recognise an opened source; arguments and errors as in :func:`open_checkpoint`."""
    networks = NETWORKS if config is None else (network_of(config),)
    pairs = [(network, form) for network in networks for form in network.formats]

    def overlap(pair: tuple[Network, str]) -> int:
        network, form = pair
        keys = network.shapes(config or network.template, form)
        return sum(name in keys or network.tied.get(name) in keys for name in opened.tensors)

    network, form = max(pairs, key=overlap)
    tensors, copies = _untie(opened, network)
    ignored = len(opened.tensors) - len(tensors) - len(copies)
    adapted = dataclasses.replace(opened, tensors=tensors)
    metadata = _known(network, opened)
    if num_heads and network is wan_transformer.NETWORK:
        metadata["num_heads"] = num_heads
    fitted, problems = _fit(network, form, adapted, metadata, config)
    if problems or fitted is None:
        mark = next((what for key, what in _FOREIGN.items() if any(key in name for name in opened.tensors)), "")
        refused = "is no checkpoint that can be read" if config is None else "does not fit the configuration"
        where = f"{opened.path}{f' ({opened.of_parts})' if opened.part else ''} {refused}{mark and f', but {mark}'}"
        require(
            overlap((network, form)) > 0, f"{where}: none of its tensors is known, first {list(opened.tensors)[:2]}"
        )
        closest = f"{describe(fitted)}, {form} names" if fitted else f"a {network.component} with {form} names"
        raise ConfigError(f"{where}; the closest is {closest}: {problems or 'its sizes cannot be determined'}")
    if isinstance(fitted, VAEConfig):
        fitted = wan_vae.statistics(fitted, metadata, form)
    if config is None:
        _require_heads(fitted, metadata, opened)
    return Checkpoint(network, form, fitted, adapted, copies, ignored)


def _fit(
    network: Network, form: str, opened: Source, metadata: Mapping[str, Any], config: Config | None
) -> tuple[Config | None, str]:
    """Return the configuration that fits the file's shapes and "", else the closest one and the first mismatches."""
    shapes, sizes = opened.shapes, Sizes(network, opened.shapes, form)
    if config is not None:
        return config, store.misfit(shapes, network.shapes(config, form))
    inferred = network.infer(sizes, metadata)
    candidates: tuple[Config, ...] = (*(() if inferred is None else (inferred,)), *network.presets)
    problems: dict[Config, int] = {}
    for candidate in candidates:
        want = network.shapes(candidate, form)
        wrong = sum(shapes.get(key) != shape for key, shape in want.items()) + len(shapes.keys() - want.keys())
        if wrong == 0:
            return candidate, ""
        problems[candidate] = wrong
    if not problems:
        return None, ""
    closest: Config = min(problems, key=lambda candidate: problems[candidate])
    return closest, store.misfit(shapes, network.shapes(closest, form))


def _untie(opened: Source, network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors that ``network`` reads, each under its first name, and the second copies."""
    tensors = {
        name: network.adapt(name, tensor) for name, tensor in opened.tensors.items() if not network.ignored(name)
    }
    copies = {}
    for copy, name in network.tied.items():
        if copy in tensors and name in tensors:
            copies[name] = tensors.pop(copy)
        elif copy in tensors:
            tensors[name] = tensors.pop(copy)
    return tensors, copies


def _known(network: Network, opened: Source) -> dict[str, Any]:
    """Return the fields of the configuration that ``config.json`` or our metadata give."""
    content = dict(opened.config)
    for key in ("network", "config", *wan_vae.STATISTICS):
        try:
            value = json.loads(opened.metadata[key])
        except (KeyError, ValueError):
            continue
        if key == "config" and isinstance(value, dict):
            role = "teacher" if opened.metadata.get("stage") in ("teacher", "causal") else "student"
            names = {"transformer": role, "text_encoder": "umt5", "vae": "vae", "taehv": "taehv"}
            value = value.get(names.get(network.component, ""), {})
        content |= value if isinstance(value, dict) else {key: value}
    fields = {field.name: field.default for field in dataclasses.fields(network.config)}
    known = {}
    for name, value in content.items():
        field = network.aliases.get(name, name)
        default = fields.get(field)
        if isinstance(default, (int, float)):
            plausible = type(value) in (int, type(default)) and value > 0
        else:
            plausible = field in fields
        if plausible:
            known[field] = value
    return known


def _require_heads(config: Config, metadata: Mapping[str, Any], opened: Source) -> None:
    """Refuse a width that does not determine the number of heads, unless the file states that number."""
    if isinstance(config, (TransformerConfig, CLIPConfig)):
        size = wan_transformer.HEAD_DIM if isinstance(config, TransformerConfig) else clip_vision.HEAD_DIM
        remedy = "--num_heads" if isinstance(config, TransformerConfig) else "it in a config.json beside the file"
        require(
            "num_heads" in metadata or config.dim % size == 0,
            f"the number of heads does not follow from the width {config.dim} of {opened.path} (published heads have "
            f"size {size}); give {remedy}",
        )


def _equal(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors bit by bit in the memory of two buffers."""
    equal = first.shape == second.shape and first.dtype == second.dtype
    step = BUFFER // first.dtype.itemsize
    for start in range(0, int(np.prod(first.shape, dtype=np.int64)) if equal else 0, step):
        with first.view() as a, second.view() as b:
            piece = slice(start, start + step)
            equal &= a.reshape(-1)[piece].tobytes() == b.reshape(-1)[piece].tobytes()
    return equal


# ---- onto devices ---------------------------------------------------------------------------------------------------


def load(
    weights: str | os.PathLike | Mapping[str, Any] | Checkpoint,
    sharding: Any = None,
    *,
    config: Config | None = None,
    dtype: Any = jnp.float32,
    part: str | None = None,
    updates: Sequence[Update] = (),
    check: bool = True,
    convert: Callable[[str, Any], Any] = lambda path, array: array,
) -> tuple[dict[str, Any], Any]:
    """Return ``(params, config)`` of a checkpoint of any known format.

    The host holds one array, or one shard of it, at a time.

    Args:
        weights: as in :func:`open_checkpoint`, or a checkpoint that it returned.
        sharding: None (the default device), ``"host"`` (NumPy arrays), a ``jax.sharding.Sharding`` for every array, or
            a tree of them.
        config: the sizes that it must have; None recognises them.
        dtype: type of the arrays; None keeps the stored types; or a tree of leaves with a ``dtype``.
        part: as in :func:`open_checkpoint`.
        updates: LoRAs to add, in float32 (:func:`causvid_jax.checkpoints.lora.open_lora`).
        check: whether to compare our own file with its checksum. In a run of many processes let one of them call
            ``checkpoint.check()`` instead.
        convert: ``(path, array) -> array or dict of arrays``, applied to each array before the next is read.

    Returns:
        The parameter tree, and the configuration; a VAE's has the latent statistics.

    Raises:
        ConfigError: the checkpoint is unreadable, has another network or size, was changed, or holds a NaN or infinity.
    """
    opened = weights if isinstance(weights, Checkpoint) else open_checkpoint(weights, config, part=part)
    if updates:
        opened = dataclasses.replace(opened, updates=(*opened.updates, *updates))
    if check:
        opened.check()
    shapes = opened.network.shapes(opened.config, OURS)
    each = _per_leaf(sharding, shapes, "shardings")
    types = _per_leaf(dtype, shapes, "types")
    rows = opened.network.layers(opened.config, opened.format)
    flat: dict[str, Any] = {}
    for path, shape in shapes.items():
        kind = types[path]
        if kind is not None:
            kind = np.dtype(kind if isinstance(kind, type | str) else getattr(kind, "dtype", kind))
        array_type = storage(opened, rows[path], kind)
        read = functools.partial(read_array, opened, rows[path], array_type)
        flat[path] = convert(path, _place(shape, each[path], read))
    return store.unflatten(flat), opened.config


def _per_leaf(value: Any, shapes: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the value of each path, from one value for all paths or from a tree of values."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(shapes, value)
    flat = store.flatten(value)
    problems = store.misfit(dict.fromkeys(flat, ()), dict.fromkeys(shapes, ()))
    require(not problems, f"the {what} do not fit the parameters ({problems})")
    return flat


def storage(opened: Checkpoint, rows: Sequence[Row], dtype: np.dtype | None) -> np.dtype:
    """Return the type of the array of ``rows``: ``dtype``, or the stored type for None.

    Raises:
        ConfigError: a stored type that is not floating; without ``dtype``, layers of different types or a type that our
            files do not have.
    """
    kinds = {opened.source.tensors[row.key].dtype: row.key for row in rows}
    for kind, key in kinds.items():
        where = f"tensor {key} of {opened.path} is {kind.name}"
        require(jnp.issubdtype(kind, jnp.floating), f"{where}; accepted: floating types")
        require(
            dtype is not None or kind in store.STORAGE.values(),
            f"{where}; give --dtype, one of {', '.join(store.STORAGE)}",
        )
    if dtype is not None:
        return dtype
    require(
        len(kinds) == 1,
        f"the layers of {rows[0].path} are stored as {' and '.join(kind.name for kind in kinds)} in {opened.path}; "
        "stacked they must agree: give --dtype=float32",
    )
    return next(iter(kinds))


def read_array(opened: Checkpoint, rows: Sequence[Row], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Return the slice ``index`` of the parameter of ``rows`` as ``dtype``; ``rows`` are its layers, if it is stacked.

    Raises:
        ConfigError: a NaN, an infinity, or a value beyond the range of ``dtype``.
    """
    if rows[0].layer is None:
        with opened.read(rows[0]) as value:
            return finite(np.array(store.cast(rows[0].key, value[index], dtype), order="C"), opened, rows[0])
    layers = rows[index[0]] if index else rows
    out: np.ndarray | None = None
    for i, row in enumerate(layers):
        with opened.read(row) as value:
            piece = value[index[1:]]
            out = np.empty((len(layers), *piece.shape), dtype) if out is None else out
            out[i] = store.cast(row.key, piece, dtype)
            finite(out[i], opened, row)
    assert out is not None
    return out


# The exponent bits of each type: all ones in a NaN or an infinity.
_EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    jnp.dtype(jnp.bfloat16): (np.uint16, 0x7F80),
}


def finite(array: np.ndarray, opened: Checkpoint, row: Row) -> np.ndarray:
    """Return ``array``; raise a ConfigError that names the tensor of ``row`` if it holds a NaN or an infinity."""
    if array.dtype in _EXPONENTS:
        unsigned, mask = _EXPONENTS[array.dtype]
        flat = np.ascontiguousarray(array).reshape(-1).view(unsigned)
        step = 1 << 20
        for start in range(0, flat.size, step):
            bad = ((flat[start : start + step] & mask) == mask).any()
            require(not bad, f"tensor {row.key} of {opened.path} holds a NaN or an infinity; the weights are unusable")
    return array


def _place(shape: tuple[int, ...], sharding: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Any:
    """Return one array made of its shards; each shard is read once, also if several devices hold it."""
    everything = (slice(None),) * len(shape)
    if isinstance(sharding, str):
        require(sharding == "host", f"sharding is {sharding!r}; accepted: None, 'host', a Sharding, a tree of them")
        return read(everything)
    if sharding is None:
        return jax.device_put(read(everything)).block_until_ready()
    devices: dict[tuple, list[Any]] = {}
    indices: dict[tuple, tuple[slice, ...]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        devices.setdefault(key, []).append(device)
        indices[key] = index
    arrays: list[jax.Array] = []
    for key, index in indices.items():
        value = read(index)
        arrays += [jax.device_put(value, device) for device in devices[key]]
        jax.block_until_ready(arrays[-len(devices[key]) :])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def state_dict(
    params: Mapping[str, Any], config: Config, format: str, dtype: str | None = None
) -> dict[str, np.ndarray]:
    """Return our parameters as a published state dict of NumPy arrays, for example to load it into PyTorch.

    Args:
        params: nested dict of our parameters.
        config: the sizes of the network.
        format: ``"original"``, ``"diffusers"`` or ``"causvid_jax"``.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; None keeps the types of ``params``.

    Raises:
        ConfigError: the parameters do not have the sizes of ``config``, or the network has no such format.
    """
    opened = open_checkpoint(params, config)
    accepted = opened.network.formats
    require(format in accepted, f"format is {format!r}; accepted: {', '.join(accepted)}")
    kind, result = store.storage_type(dtype), {}
    for key, rows in opened.network.pairs(config, opened.format, format).items():
        pieces = []
        for row, own in rows:
            with opened.read(own) as value:
                pieces.append(row.transform.to_file(value))
        # Writers of safetensors files need row-major arrays.
        whole = np.array(np.concatenate(pieces) if len(pieces) > 1 else pieces[0], order="C")
        result[key] = store.cast(key, whole, kind)
    return result


__all__ = ["FORMATS", "NETWORKS", "Checkpoint", "describe", "load", "network_of", "open_checkpoint", "state_dict"]
