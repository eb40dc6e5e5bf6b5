"""Write and read datasets of arrays, chunk by chunk; an interruption loses at most one chunk.

Each chunk is one ArrayRecord shard. It is written under a temporary name and renamed when complete. The next run skips
the shards that exist. When all shards exist, the metadata of a tfds dataset is written, and then a marker file.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tqdm import tqdm

from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import atomic_write, write_text, writing

IDENTITY = "identity.json"
SPLIT = "train"
"""The one split of a dataset."""
ADDED = ("dtype", "text")
"""Settings of an identity that older datasets lack; such a dataset is accepted for any value of them."""
_FINISHED = "FINISHED"


def read_identity(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the ``identity`` of a dataset that :func:`write_dataset` stored; {} if there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = pathlib.Path(folder) / IDENTITY
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: it is damaged; remove {folder} and prepare it again") from error
    require(isinstance(value, dict), f"{path} is damaged; remove {folder} and prepare it again")
    return value


class EmptyDataset(ConfigError):
    """All chunks of a dataset are written, but none has an example."""


def array_features(more: Mapping[str, Any] | None = None, **shapes: Sequence[int | None]) -> tfds.features.FeaturesDict:
    """Return the tfds features of float16 arrays (name to shape; None is any length), a caption, and ``more``."""
    tensors = {
        name: tfds.features.Tensor(shape=tuple(shape), dtype=np.float16, encoding="bytes")
        for name, shape in shapes.items()
    }
    return tfds.features.FeaturesDict(tensors | {"caption": tfds.features.Text()} | dict(more or {}))


def trim_text(embeds: np.ndarray) -> np.ndarray:
    """Return prompt embeddings ``[length, dim]`` as float16 ``[tokens, dim]``, without the zeros after the last token.

    The readers of :mod:`causvid_jax.data.pipeline` restore the zeros.
    """
    nonzero = np.flatnonzero(np.any(embeds != 0, axis=1))
    return embeds[: nonzero[-1] + 1 if len(nonzero) else 0].astype(np.float16)


def shard_path(folder: str | os.PathLike, name: str, index: int, chunks: int) -> pathlib.Path:
    """Return the file of chunk ``index`` of ``chunks``. It exists when the chunk is complete."""
    return pathlib.Path(folder) / f"{name}-{SPLIT}.array_record-{index:05d}-of-{chunks:05d}"


def is_complete(folder: str | os.PathLike) -> bool:
    """Return whether ``folder`` holds a finished dataset with all of its shards.

    Raises:
        ConfigError: its metadata cannot be read, or have a feature type or file format that is not accepted.
    """
    folder = pathlib.Path(folder)
    if not (folder / _FINISHED).is_file():
        return False
    return has_all_shards(_open(folder))


def has_all_shards(builder: Any) -> bool:
    """Return whether all shards of a tfds builder are on disk. They appear at the end, but may be lost later."""
    splits = builder.info.splits
    return bool(splits) and all(pathlib.Path(f).is_file() for s in splits.values() for f in s.filepaths)


FEATURES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in ("features_dict.FeaturesDict", "tensor_feature.Tensor", "text_feature.Text", "scalar.Scalar")
}
"""Accepted feature types. tfds imports the module that ``features.json`` names, and this could run any code."""


def _open(folder: pathlib.Path) -> Any:
    """Return the tfds builder of a dataset folder of known feature types, whose shards are below it.

    Raises:
        ConfigError: another feature type or file format, or metadata that cannot be read.
    """
    try:
        info, features = (json.loads((folder / name).read_text()) for name in ("dataset_info.json", "features.json"))
        names = set(_class_names(features))
        templates = [str(split.get("filepathTemplate", "")) for split in info.get("splits", [])]
        kind = info.get("fileFormat")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the dataset {folder} cannot be read: its metadata is missing or damaged") from error
    unknown = sorted(names - FEATURES)
    require(not unknown, f"the dataset {folder} has the feature type {next(iter(unknown), '')!r}; it is not accepted")
    require(kind == "array_record", f"the dataset {folder} has files of kind {kind!r}; accepted: 'array_record'")
    require(
        not any("/" in template or "\\" in template for template in templates),
        f"the dataset {folder} names files outside of it",
    )
    return tfds.builder_from_directory(os.fspath(folder))


def _class_names(features: Any) -> Iterator[str]:
    """Yield every class that ``features.json`` names."""
    if isinstance(features, dict):
        if "pythonClassName" in features:
            yield str(features["pythonClassName"])
        for value in features.values():
            yield from _class_names(value)
    elif isinstance(features, list):
        for value in features:
            yield from _class_names(value)


def source(folder: str | os.PathLike) -> Any:
    """Return a finished dataset for random access: ``len(source)``, and ``source[i]`` is a dict of arrays.

    Raises:
        ConfigError: there is none at ``folder``, it is not finished, or it has features of an unknown type.
    """
    require(is_complete(folder), f"no finished dataset at {folder}; write it with causvid prepare")
    return _open(pathlib.Path(folder)).as_data_source(split=SPLIT)


def write_dataset(
    folder: str | os.PathLike,
    *,
    name: str,
    features: tfds.features.FeaturesDict,
    chunks: int,
    make_chunk: Callable[[int], Iterable[dict[str, Any] | bytes]],
    identity: dict[str, Any],
    process_id: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> bool:
    """Write the missing chunks; finish the dataset when all are written.

    Args:
        folder: the dataset's own folder.
        name: name of the dataset; shards are ``NAME-train.array_record-00000-of-00004``.
        features: features of one example (:func:`array_features`).
        chunks: number of chunks; chunk i becomes shard i.
        make_chunk: returns the examples of a chunk by its index, or their serialized features; the result must depend
            on the index alone.
        identity: everything that decides the content (sizes, seeds, digests of weights), as JSON values. A folder that
            was started with another identity is refused, so that trajectories of two teachers never mix.
        process_id: this process writes chunks process_id, process_id + process_count, ...
        process_count: number of processes that share ``folder``.
        progress: whether to show a bar with the remaining time.

    Returns:
        whether the dataset is finished (False: another process still has chunks to write).

    Raises:
        ConfigError: the folder holds a dataset of another identity, or its metadata cannot be read.
        EmptyDataset: all chunks are written and none has an example.
        RunError: the disk is full.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_identity(folder, {"name": name, "split": SPLIT, "chunks": chunks, **identity})
    if is_complete(folder):
        return True
    shards = [shard_path(folder, name, i, chunks) for i in range(chunks)]
    mine = range(process_id, chunks, process_count)
    todo = [i for i in mine if not shards[i].is_file()]
    bar = tqdm(total=len(mine), initial=len(mine) - len(todo), desc=name, unit="chunk", disable=not progress)
    with bar:
        for index in todo:
            examples = make_chunk(index)
            _write_shard(
                shards[index], (e if isinstance(e, bytes) else features.serialize_example(e) for e in examples)
            )
            bar.update()
    if not all(shard.is_file() for shard in shards):
        return False
    with writing(folder):
        _finish(folder, name, features, shards)
    return True


def _check_identity(folder: pathlib.Path, identity: dict[str, Any]) -> None:
    expected = json.loads(json.dumps(identity))
    path = folder / IDENTITY
    if not path.is_file():
        write_text(path, json.dumps(expected, indent=1))
        return
    stored = read_identity(folder)
    stored = {name: expected[name] for name in ADDED if name in expected} | stored
    different = sorted(k for k in {*stored, *expected} if stored.get(k) != expected.get(k))
    if different:
        changes = ", ".join(_change(name, stored.get(name), expected.get(name)) for name in different)
        raise ConfigError(f"{folder} holds another dataset ({changes}); remove it or choose another workdir")


def _change(name: str, before: Any, now: Any) -> str:
    """Describe how a setting differs. Long values are omitted."""
    short = len(repr(before)) + len(repr(now)) <= 100
    return f"{name} was {before!r} and is now {now!r}" if short else f"{name} differs"


def _write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    # Two processes that were started alike write the same shard, each to a temporary file of its own.
    with writing(path), atomic_write(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()


def _finish(
    folder: pathlib.Path, name: str, features: tfds.features.FeaturesDict, shards: Sequence[pathlib.Path]
) -> None:
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
        data_dir=folder, dataset_name=name, split=SPLIT, filetype_suffix="array_record"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
        ],
        filename_template=template,
        check_data=False,
    )
    write_text(folder / _FINISHED, "")
