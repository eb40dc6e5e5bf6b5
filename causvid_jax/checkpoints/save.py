"""Write checkpoints in any format, tensor by tensor: conversion is ``open_checkpoint`` + ``save``.

At most one tensor of one layer is in memory (as stored, in the other layout, and cast). Files and folders are written
atomically.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from causvid_jax.checkpoints import safetensors_io, store, wan_vae
from causvid_jax.checkpoints.checkpoint import Checkpoint, finite, storage
from causvid_jax.checkpoints.table import FORMATS, OURS
from causvid_jax.config import VAEConfig, require
from causvid_jax.config.files import atomic, format_bytes

SHARD_BYTES = 10_000_000_000
"""Largest shard of a published folder in bytes; diffusers' own limit."""
_PART_BYTES = 1 << 26
# Fields of a configuration that describe how the network runs, not its weights.
_HOW_TO_RUN = ("dtype", "attention", "precision", "remat", "rules")
_ORIGINAL_STEMS = {
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    "taehv": "taew2_1",
}
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]


def file_stem(component: str, form: str) -> str:
    """Return the file name, without suffix, of a component in a published folder."""
    if form == "original":
        return _ORIGINAL_STEMS.get(component, "diffusion_pytorch_model")
    return "model" if component in ("text_encoder", "image_encoder") else "diffusion_pytorch_model"


def layout(opened: Checkpoint, form: str, dtype: str | None = None) -> Layout:
    """Return name to (shape, type) of every tensor that :func:`save` would write.

    Raises:
        ConfigError: the network has no such format, or a type cannot be kept.
    """
    require(form in FORMATS, f"--to is {form!r}; accepted: {', '.join(FORMATS)}")
    accepted = opened.network.formats
    require(form in accepted, f"--to is {form!r}, but {opened}; accepted: {', '.join(accepted)}")
    kind, shapes = store.storage_type(dtype), opened.network.shapes(opened.config, form)
    pairs = opened.network.pairs(opened.config, opened.format, form)
    return {key: (shapes[key], storage(opened, [own for _, own in rows], kind)) for key, rows in pairs.items()}


def size(written: Layout) -> int:
    """Return the size in bytes of the tensors of a layout."""
    return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in written.values())


def summary(opened: Checkpoint, form: str, dtype: str | None = None) -> str:
    """Return one line with the network, format, types and size that :func:`save` would read and write."""
    written = layout(opened, form, dtype)
    theta = getattr(opened.config, "rope_theta", 10_000.0)
    warning = (
        f" (their code has a rotary base of 10000, this one {theta:g})" if theta != 10_000 and form != OURS else ""
    )
    merged = "".join(f", plus {update}" for update in opened.updates)
    types_written = ", ".join(sorted({kind.name for _, kind in written.values()}))
    read = sum(tensor.nbytes for tensor in opened.source.tensors.values())
    return (
        f"{opened}; {opened.network.parameters(opened.config):,} parameters, {format_bytes(read)} -> {form} names"
        f"{warning}, {types_written}, {format_bytes(size(written))}{merged}"
    )


def save(
    checkpoints: Checkpoint | Mapping[str, Checkpoint],
    output: str | os.PathLike,
    form: str = OURS,
    dtype: str | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
    shard_bytes: int = SHARD_BYTES,
    copies: Mapping[str, pathlib.Path] = types.MappingProxyType({}),
) -> None:
    """Write one checkpoint, or a folder of several, atomically.

    Args:
        checkpoints: one, or several by their path under ``output``. ``open_checkpoint(params, config)`` makes one of
            parameters in memory.
        output: a ``.safetensors`` file, which is replaced, or a folder, which must be empty or absent. A published
            folder gets ``config.json``, and shards with an index if the weights are large.
        form: causvid_jax, original or diffusers.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for every floating tensor; None keeps the stored types.
        progress: called with the number of bytes written since the last call.
        shard_bytes: largest shard of a published folder, in bytes.
        copies: files to copy into the folder, by path under it.

    Raises:
        ConfigError: the output cannot be written, exists and is not empty, or does not fit on the disk; a value is
            beyond the range of ``dtype``; a tensor holds a NaN or an infinity; our own file was changed; or two tensors
            that should be equal differ.
    """
    several = {"": checkpoints} if isinstance(checkpoints, Checkpoint) else dict(checkpoints)
    target = pathlib.Path(output)
    jobs = {path: _Job(opened, form, layout(opened, form, dtype), progress) for path, opened in several.items()}
    _check_space(target, sum(size(job.written) for job in jobs.values()))
    for opened in several.values():
        opened.check()
    if list(jobs) == [""] and target.suffix == ".safetensors":
        jobs[""].write(target)
        return
    require(not target.exists() or (target.is_dir() and not any(target.iterdir())), f"{target} exists and is not empty")
    with atomic(target, directory=True) as temporary:
        for path, job in jobs.items():
            if path.endswith(".safetensors"):
                job.write(temporary / path)
            else:
                _write_folder(job, temporary / path, shard_bytes)
        for path, file in copies.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / path)


def _check_space(target: pathlib.Path, needed: int) -> None:
    folder = next((folder for folder in target.absolute().parents if folder.exists()), pathlib.Path("/"))
    free = shutil.disk_usage(folder).free
    require(free > needed, f"{target} needs {format_bytes(needed)}, but {folder} has {format_bytes(free)} free")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One checkpoint to write."""

    opened: Checkpoint
    form: str
    written: Layout
    progress: Callable[[int], None]

    def write(self, path: pathlib.Path, keys: Sequence[str] | None = None) -> None:
        """Write the tensors of ``keys`` (None: all) as one file."""
        rows = self.opened.network.pairs(self.opened.config, self.opened.format, self.form)

        def pieces(key: str) -> Iterator[np.ndarray]:
            for row, origin in rows[key]:
                with self.opened.read(origin) as value:
                    # Our layers are stacked one after the other, so each is written without a change.
                    value = value if self.form == OURS else row.transform.to_file(value)
                    for part in _parts(value):
                        # A scalar stays one: ascontiguousarray would make it a vector.
                        array = store.cast(key, np.ascontiguousarray(part), self.written[key][1])
                        del part
                        yield finite(array, self.opened, origin)
                        self.progress(array.nbytes)
                        del array
                    del value

        entries = {key: self.written[key] for key in keys or self.written}
        safetensors_io.write_safetensors(path, entries, pieces, self.metadata(), checksum=self.form == OURS)

    def metadata(self) -> dict[str, str]:
        """Return the sizes, the latent statistics, and the metadata of a file of ours."""
        config, source = self.opened.config, self.opened.source
        sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in _HOW_TO_RUN}
        own = {"component": self.opened.network.component, "network": json.dumps(sizes)}
        if isinstance(config, VAEConfig) and config.latent_mean:
            own |= wan_vae.metadata(config)
        if self.opened.updates:
            own["merged"] = ", ".join(map(str, self.opened.updates))
        if self.form != OURS:
            # Readers of published files require this entry.
            return {"format": "pt", **own}
        return {k: v for k, v in source.metadata.items() if k not in (safetensors_io.CHECKSUM, "format")} | own


def _write_folder(job: _Job, folder: pathlib.Path, shard_bytes: int) -> None:
    """Write a published component: weights, in shards with an index if they are large, and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    require(
        job.form != OURS, f"our own format is one file; give --output a name in .safetensors, not the folder {folder}"
    )
    stem = file_stem(job.opened.network.component, job.form)
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for key in sorted(job.written):
        needed = size({key: job.written[key]})
        if needed > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= needed
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        job.write(folder / f"{stem}{suffix}.safetensors", keys)
        weight_map |= dict.fromkeys(keys, f"{stem}{suffix}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": size(job.written)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    content = job.opened.network.to_json(job.opened.config, job.form)
    if content is not None:
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _parts(value: np.ndarray) -> Iterator[np.ndarray]:
    """Yield ``value`` in slices of at most ``_PART_BYTES`` along its first axis."""
    if value.ndim == 0 or value.nbytes <= _PART_BYTES:
        yield value
        return
    step = max(1, _PART_BYTES // (value.nbytes // value.shape[0]))
    for start in range(0, value.shape[0], step):
        yield value[start : start + step]
