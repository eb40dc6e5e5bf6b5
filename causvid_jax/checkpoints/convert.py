"""Checkpoints into other layouts, tensor by tensor, and straight into sharded arrays.

:func:`plan` opens and checks everything and reads no weights; :func:`run` writes. At no time is more than one tensor of
one layer in memory (three times: as stored, moved to the other layout, cast), and what is written appears whole or not
at all. :func:`load_published` builds our parameter tree of a file, each device's shard from the part that it needs.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints import exports, files, layouts, sources, store, workdir
from causvid_jax.checkpoints.files import Tensor
from causvid_jax.checkpoints.layouts import Match, Piece
from causvid_jax.checkpoints.lora import Lora
from causvid_jax.config import TransformerConfig, VAEConfig, require

SHARD_BYTES = 10_000_000_000
"""What diffusers cuts its shards at."""
PART_BYTES = 1 << 26
"""A larger tensor is moved and cast in parts of about this size."""
# Fields of a configuration that are not of the weights.
_HOW_TO_RUN = ("dtype", "attention", "precision", "remat", "rules")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One component's conversion, checked: ``written`` holds shape and type of every tensor to write."""

    source: sources.Source
    match: Match
    naming: str
    dtype: np.dtype | None
    loras: tuple[Lora, ...]
    written: Mapping[str, tuple[tuple[int, ...], np.dtype]]

    @property
    def bytes_read(self) -> int:
        return sum(tensor.nbytes for tensor in self.source.tensors.values())

    @property
    def bytes_written(self) -> int:
        return sum(_size(*entry) for entry in self.written.values())

    @property
    def memory(self) -> int:
        """Bytes at most needed beyond the program itself: a tensor as stored, a part of it moved and cast, and with
        LoRA three times the tensor in float32."""
        elements = max(int(np.prod(shape)) for shape in self.match.network.pieces(self.match.config).values())
        stored = max(tensor.nbytes for tensor in self.source.tensors.values())
        widest = max(
            *(tensor.dtype.itemsize for tensor in self.source.tensors.values()),
            *(dtype.itemsize for _, dtype in self.written.values()),
        )
        parts = 2 * min(PART_BYTES, elements * widest)
        return stored + parts + (12 * elements if self.loras else 0) + 2 * files.BUFFER

    def __str__(self) -> str:
        types = sorted({t.dtype.name for t in self.source.tensors.values()})
        into = sorted({dtype.name for _, dtype in self.written.values()})
        chosen = f", part {self.source.part} of {', '.join(self.source.parts)}" if len(self.source.parts) > 1 else ""
        prefixes = f", without {' '.join(self.source.prefixes)}" if self.source.prefixes else ""
        prefixes += f", without {self.source.unread} tensors that nothing reads" if self.source.unread else ""
        theta = getattr(self.match.config, "rope_theta", 10_000.0)
        foreign = (
            ""
            if theta == 10_000.0 or self.naming == "causvid_jax"
            else (f" (whose rotary base of {theta:g} their code, which has 10000, will not know)")
        )
        merged = "".join(f", plus {lora.strength:g} x {lora.path.name}" for lora in self.loras)
        return (
            f"{self.source.path}{chosen}{prefixes}: {self.match}; {self.match.parameters:,} parameters, "
            f"{', '.join(types)}, {files.in_words(self.bytes_read)} -> {self.naming} names{foreign}, "
            f"{', '.join(into)}, {files.in_words(self.bytes_written)}{merged}; "
            f"about {self.memory / 2**20:.0f} MiB of memory"
        )


def plan(
    source: sources.Source,
    naming: str,
    dtype: str | None = None,
    loras: Sequence[Callable[[TransformerConfig], Lora]] = (),
    num_heads: int = 0,
) -> Plan:
    """Check that ``source`` can become a ``naming`` checkpoint; nothing but headers is read.

    Args:
        source: an opened checkpoint.
        naming: ``original``, ``diffusers`` or ``causvid_jax``.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for every floating tensor; None keeps each one's own.
        loras: each opens a LoRA for the sizes that were found (:func:`causvid_jax.checkpoints.lora.open_lora`).
        num_heads: of a transformer whose width does not tell them.

    Raises:
        ConfigError: a file of no known layout, a type that cannot be kept, or a LoRA that does not fit.
    """
    accepted = ", ".join(layouts.NAMINGS)
    require(naming in layouts.NAMINGS, f"--to is {naming!r}; accepted: {accepted}")
    kept = store.storage_type(dtype)
    match = layouts.detect(source, num_heads=num_heads)
    source, accepted = match.source, ", ".join(match.network.namings)
    require(
        naming in match.network.namings, f"--to is {naming!r}, but {source.path} is a {match}; accepted: {accepted}"
    )
    opened: tuple[Lora, ...] = ()
    if loras:
        require(
            isinstance(match.config, TransformerConfig),
            f"a LoRA changes a transformer, but {source.path} is a {match.network.component}",
        )
        opened = tuple(lora(match.config) for lora in loras)
    kinds, shapes = _types(source, match, naming, kept), match.network.shapes(match.config, naming)
    return Plan(source, match, naming, kept, opened, {name: (shapes[name], kinds[name]) for name in shapes})


def _types(source: sources.Source, match: Match, naming: str, dtype: np.dtype | None) -> dict[str, np.dtype]:
    """The type of every tensor to write; layers that are stacked must agree."""
    have = match.network.names(match.config, match.naming)
    want = match.network.names(match.config, naming)
    kinds: dict[str, np.dtype] = {}
    for piece, name in want.items():
        stored = source.tensors[have[piece]].dtype
        where = f"tensor {have[piece]} of {source.path} is {stored.name}"
        require(jnp.issubdtype(stored, jnp.floating), f"{where}; accepted: floating types")
        require(
            dtype is not None or stored in store.STORAGE.values(),
            f"{where}; give --dtype, one of {', '.join(store.STORAGE)}",
        )
        kind = stored if dtype is None else dtype
        require(
            kinds.setdefault(name, kind) == kind,
            f"the layers of {name} are stored as {kinds[name].name} and {kind.name} in {source.path}; "
            "stacked they must agree: give --dtype=float32",
        )
    return kinds


def run(
    plans: Mapping[str, Plan],
    output: str | os.PathLike,
    progress: Callable[[int], None] = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
    copies: Mapping[str, pathlib.Path] = types.MappingProxyType({}),
) -> None:
    """Write what was planned: all of it, or nothing.

    Args:
        plans: by place under ``output``. A single ``{"": plan}`` writes one file if ``output`` ends in
            ``.safetensors``, else a folder; several places, or ones that are named, write a folder.
        output: the file, which is replaced, or the folder, which must not exist or be empty.
        progress: called with the bytes written since the last call.
        shard_bytes: at most this many in one file of a published folder.
        copies: files to copy into the folder, by place.

    Raises:
        ConfigError: the place cannot be written, a type cannot hold a value, our file does not match its checksum, or
            two tensors that should be one differ.
    """
    target = pathlib.Path(output)
    _check_space(target, sum(one.bytes_written for one in plans.values()))
    for one in plans.values():
        if one.match.naming == "causvid_jax" and one.source.path.is_file():
            store.verify(one.source.path)
        _check_twins(one.source)
    if list(plans) == [""] and target.suffix == ".safetensors":
        _write(plans[""], target, progress)
        return
    require(not target.exists() or (target.is_dir() and not any(target.iterdir())), f"{target} exists and is not empty")
    with files.staged(target, directory=True) as temporary:
        for place, one in plans.items():
            if place.endswith(".safetensors"):
                _write(one, temporary / place, progress)
            else:
                _write_folder(one, temporary / place, progress, shard_bytes)
        for place, file in copies.items():
            (temporary / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / place)


def _check_twins(source: sources.Source) -> None:
    """Refuse a file that holds a tensor twice with different values: one of the two was never loaded by anyone."""
    for name, twin in source.twins.items():
        first = source.tensors[name]
        equal = first.shape == twin.shape and first.dtype == twin.dtype
        step = files.BUFFER // first.dtype.itemsize
        for start in range(0, int(np.prod(first.shape, dtype=np.int64)) if equal else 0, step):
            with first.view() as a, twin.view() as b:
                part = slice(start, start + step)
                equal &= a.reshape(-1)[part].tobytes() == b.reshape(-1)[part].tobytes()
        require(equal, f"{source.path} holds two different tensors {name}, one under another name; they must be equal")


def _check_space(target: pathlib.Path, needed: int) -> None:
    place = next((folder for folder in target.absolute().parents if folder.exists()), pathlib.Path("/"))
    free = shutil.disk_usage(place).free
    require(free > needed, f"{target} needs {files.in_words(needed)}, but {place} has {files.in_words(free)} free")


def _write_folder(one: Plan, folder: pathlib.Path, progress: Callable[[int], None], shard_bytes: int) -> None:
    """A published component: weights, in shards with an index if they are large, and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    require(
        one.naming != "causvid_jax", f"our own format is one file; give --output a name in .safetensors, not {folder}"
    )
    stem = exports.file_stem(one.match.network.component, one.naming)
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(one.written):
        size = _size(*one.written[name])
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        many = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        _write(one, folder / f"{stem}{many}.safetensors", progress, names)
        weight_map |= dict.fromkeys(names, f"{stem}{many}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": one.bytes_written}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    described = exports.describe(one.match.config, one.naming)
    if described is not None:
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def _write(one: Plan, path: pathlib.Path, progress: Callable[[int], None], names: Sequence[str] | None = None) -> None:
    pieces: dict[str, list[Piece]] = {}
    for piece, name in one.match.network.names(one.match.config, one.naming).items():
        pieces.setdefault(name, []).append(piece)
    reader, network = _Reader(one.match, one.loras), one.match.network

    def arrays(name: str) -> Iterator[np.ndarray]:
        for piece in sorted(pieces[name], key=lambda piece: network.place(piece.path)):
            with reader.look(piece) as value:
                if one.naming != "causvid_jax":
                    value = network.to_published(piece.path, value, one.match.config, one.naming)
                for part in _parts(value):
                    # A scalar stays one: ascontiguousarray makes it a vector.
                    array = store.cast(name, np.ascontiguousarray(part), one.written[name][1])
                    del part
                    yield array
                    progress(array.nbytes)
                    del array
                del value

    ours = one.naming == "causvid_jax"
    files.write_safetensors(
        path,
        {name: one.written[name] for name in names or one.written},
        arrays,
        _metadata(one),
        checksum=ours,
    )


def _parts(value: np.ndarray) -> Iterator[np.ndarray]:
    """``value`` in slices of at most ``PART_BYTES`` along its first axis."""
    if value.ndim == 0 or value.nbytes <= PART_BYTES:
        yield value
        return
    step = max(1, PART_BYTES // (value.nbytes // value.shape[0]))
    for start in range(0, value.shape[0], step):
        yield value[start : start + step]


def _metadata(one: Plan) -> dict[str, str]:
    """What the file says of itself beyond its tensors: sizes, latent statistics, and what came with our own."""
    config = one.match.config
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in _HOW_TO_RUN}
    own = {"component": one.match.network.component, "network": json.dumps(sizes)}
    if isinstance(config, VAEConfig) and config.latent_mean:
        own |= workdir.vae_metadata(config)
    if one.loras:
        own["merged"] = ", ".join(f"{lora.strength:g} x {lora.path.name}" for lora in one.loras)
    if one.naming != "causvid_jax":
        # Readers of published files insist on this entry.
        return {"format": "pt", **own}
    return {k: v for k, v in one.source.metadata.items() if k not in (files.CHECKSUM, "format")} | own


class _Reader:
    """The pieces of a checkpoint in our orientation, updates added."""

    def __init__(self, match: Match, loras: Sequence[Lora] = ()):
        self._match, self._loras = match, loras
        self._names = match.network.names(match.config, match.naming)

    @contextlib.contextmanager
    def look(self, piece: Piece) -> Iterator[np.ndarray]:
        """The piece as a view of the file where nothing is added."""
        tensor: Tensor = self._match.source.tensors[self._names[piece]]
        with tensor.view() as stored:
            if self._match.naming == "causvid_jax":
                value = stored if piece.layer is None else stored[piece.layer]
            else:
                value = self._match.network.to_ours(piece.path, stored, self._match.naming)
            del stored
            for lora in self._loras:
                delta = lora.delta(piece, self._match.config)
                if delta is not None:
                    delta += value.astype(np.float32)
                    value = delta
            yield value
            del value


def load_published(
    source: str | os.PathLike | sources.Source,
    config: layouts.Config,
    sharding: Any = None,
    dtype: Any = jnp.float32,
    loras: Sequence[Lora] = (),
) -> dict[str, Any]:
    """Our parameter tree as ``jax.Array`` from a checkpoint of any known layout, ours included.

    Each device's shard is made from the part of the file that it needs and handed over before the next is made, so that
    the host holds one shard at a time. The checksum of a file of ours is not compared (:func:`store.verify` does).

    Args:
        source: a file, the folder of one component, or an opened checkpoint.
        config: the sizes, which the checkpoint must have.
        sharding: None (the default device), one ``jax.sharding.Sharding`` for every array, or a tree of them.
        dtype: of the arrays; None keeps the stored types.
        loras: updates to add, in float32.

    Raises:
        ConfigError: an unreadable checkpoint, or one of another layout or size.
    """
    if not isinstance(source, sources.Source):
        source = sources.open_source(source)
    match = layouts.detect(source, config)
    _check_twins(match.source)
    reader, kind = _Reader(match, loras), None if dtype is None else jnp.dtype(dtype)
    shapes = {path: tuple(leaf.shape) for path, leaf in store.flatten(match.network.abstract(config)).items()}
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    each = store.flatten(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(shapes, sharding)
    require(
        each.keys() == shapes.keys(),
        f"the shardings do not fit the parameters ({store.misfit(_no(each), _no(shapes))})",
    )
    kinds = _types(match.source, match, "causvid_jax", kind)
    stacked = {piece.path for piece in match.network.pieces(config) if piece.layer is not None}

    def shard(path: str, index: tuple[slice, ...]) -> np.ndarray:
        if path not in stacked:
            with reader.look(Piece(path)) as value:
                return store.cast(path, np.array(value[index]), kinds[path])
        layers = range(shapes[path][0])[index[0]]
        out: np.ndarray | None = None
        for i, layer in enumerate(layers):
            with reader.look(Piece(path, layer)) as value:
                part = value[index[1:]]
                out = np.empty((len(layers), *part.shape), kinds[path]) if out is None else out
                out[i] = store.cast(path, part, kinds[path])
        assert out is not None
        return out

    flat = {path: _assemble(shape, each[path], functools.partial(shard, path)) for path, shape in shapes.items()}
    return store.unflatten(flat)


def _assemble(shape: tuple[int, ...], sharding: Any, shard: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """One array of its shards, each made once however many devices hold it."""
    devices: dict[tuple, list[Any]] = {}
    indices: dict[tuple, tuple[slice, ...]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        devices.setdefault(key, []).append(device)
        indices[key] = index
    arrays = []
    for key, index in indices.items():
        value = shard(index)
        arrays += [jax.device_put(value, device) for device in devices[key]]
        jax.block_until_ready(arrays[-len(devices[key]) :])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _no(names: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, ())


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
