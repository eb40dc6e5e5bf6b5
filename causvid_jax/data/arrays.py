"""Datasets of computed arrays (latents, ODE trajectories): written chunk by chunk, so that hours of work survive.

A dataset of ``chunks`` chunks becomes ``chunks`` ArrayRecord shards. Each is written under a temporary name and renamed
when whole, so whatever stops the program (Ctrl-C, preemption, a crash) costs at most the chunk in hand; the next run
skips the shards it finds. When all are there, the metadata that makes the folder a tfds dataset is written, and last a
marker file that says so.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tqdm import tqdm

from causvid_jax.config import ConfigError, require

IDENTITY = "identity.json"
_FINISHED = "FINISHED"


class EmptyDataset(ConfigError):
    """All chunks are there, and there is no example in them."""


def array_features(more: Mapping[str, Any] | None = None, **shapes: Sequence[int | None]) -> tfds.features.FeaturesDict:
    """Features of float16 arrays, name to shape, of their caption, and ``more`` features."""
    tensors = {
        name: tfds.features.Tensor(shape=tuple(shape), dtype=np.float16, encoding="bytes")
        for name, shape in shapes.items()
    }
    return tfds.features.FeaturesDict(tensors | {"caption": tfds.features.Text()} | dict(more or {}))


def trim_text(rows: np.ndarray) -> np.ndarray:
    """Text rows ``[length, dim]`` as float16 without the zero rows at their end, which a reader puts back."""
    used = np.flatnonzero(np.any(rows != 0, axis=1))
    return rows[: used[-1] + 1 if len(used) else 0].astype(np.float16)


def shard_path(folder: str | os.PathLike, name: str, index: int, chunks: int, split: str = "train") -> pathlib.Path:
    """The file of chunk ``index``; it exists once the chunk is whole."""
    return pathlib.Path(folder) / f"{name}-{split}.array_record-{index:05d}-of-{chunks:05d}"


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether ``folder`` holds a finished dataset with all of its shards."""
    folder = pathlib.Path(folder)
    if not (folder / _FINISHED).is_file():
        return False
    splits = tfds.builder_from_directory(os.fspath(folder)).info.splits
    return bool(splits) and all(pathlib.Path(f).is_file() for s in splits.values() for f in s.filepaths)


def source(folder: str | os.PathLike, split: str = "train"):
    """Random access to the examples of a finished dataset.

    Raises:
        ConfigError: there is none at ``folder``, or it is not finished.
    """
    require(is_complete(folder), f"no finished dataset at {folder}; write it with launch.prepare")
    return tfds.builder_from_directory(os.fspath(folder)).as_data_source(split=split)


def write_dataset(
    folder: str | os.PathLike,
    *,
    name: str,
    features: tfds.features.FeaturesDict,
    chunks: int,
    make_chunk: Callable[[int], Iterable[dict[str, Any]]],
    identity: dict[str, Any],
    split: str = "train",
    process_id: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> bool:
    """Write the chunks that are still missing; finish the dataset when all are there.

    Args:
        folder: the dataset's own folder.
        name: of the dataset; shards are ``NAME-SPLIT.array_record-00000-of-00004``.
        features: of one example.
        chunks: how many; chunk i becomes shard i.
        make_chunk: chunk index to its examples; must depend on the index alone.
        identity: whatever decides the content (sizes, seeds, digests of weights), as JSON values. A folder begun with
            another identity is refused, so that no two teachers' trajectories ever mix.
        split: its name.
        process_id: this process writes chunks process_id, process_id + process_count, ...
        process_count: of processes that share ``folder``.
        progress: show a bar with the remaining time.

    Returns:
        whether the dataset is finished (False: another process still has chunks to write).

    Raises:
        ConfigError: the folder holds a dataset of another identity.
        EmptyDataset: every chunk is there and none has an example.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_identity(folder, {"name": name, "split": split, "chunks": chunks, **identity})
    if is_complete(folder):
        return True
    shards = [shard_path(folder, name, i, chunks, split) for i in range(chunks)]
    mine = range(process_id, chunks, process_count)
    missing = [i for i in mine if not shards[i].is_file()]
    bar = tqdm(total=len(mine), initial=len(mine) - len(missing), desc=name, unit="chunk", disable=not progress)
    with bar:
        for index in missing:
            _write_shard(shards[index], (features.serialize_example(example) for example in make_chunk(index)))
            bar.update()
    if not all(shard.is_file() for shard in shards):
        return False
    _finish(folder, name, split, features, shards)
    return True


def _check_identity(folder: pathlib.Path, identity: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(identity))
    path = folder / IDENTITY
    if not path.is_file():
        replace_file(path, json.dumps(wanted, indent=1).encode())
        return
    found = json.loads(path.read_text())
    different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if different:
        changes = ", ".join(f"{k} was {found.get(k)!r} and is now {wanted.get(k)!r}" for k in different)
        raise ConfigError(f"{folder} holds another dataset ({changes}); remove it or choose another workdir")


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader finds the whole old or the whole new file."""
    # Hosts that share the folder may share the process number, as containers do.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()
    os.replace(temporary, path)


def _finish(folder, name, split, features, shards) -> None:
    """Write the metadata of a tfds dataset, then the marker that it is finished."""
    lengths, size = [], 0
    for shard in shards:
        reader = array_record_module.ArrayRecordReader(os.fspath(shard))
        lengths.append(reader.num_records())
        reader.close()
        size += shard.stat().st_size
    if not sum(lengths):
        raise EmptyDataset(f"{folder} would be a dataset without any example")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
        ],
        filename_template=template,
        check_data=False,
    )
    replace_file(folder / _FINISHED, b"")
