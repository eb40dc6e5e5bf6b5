"""The ``moving_digits`` dataset: :func:`prepare` writes it once, :func:`source` opens a split of it."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from causvid_jax.config import ConfigError, DataConfig, VideoConfig, require
from causvid_jax.config.files import lock, writing
from causvid_jax.data import arrays
from causvid_jax.data.moving_digits.moving_digits_dataset_builder import SPLITS, Builder, MovingDigitsConfig, clip


def _builder(data_dir: str | os.PathLike, data: DataConfig, video: VideoConfig) -> Builder:
    return Builder(data_dir=os.fspath(data_dir), config=MovingDigitsConfig.of(data, video))


def prepare(data_dir: str | os.PathLike, data: DataConfig, video: VideoConfig) -> Builder:
    """Write the dataset of ``data`` and ``video`` under ``data_dir``, or reuse it if it is complete.

    Remains of an interrupted run are removed. A dataset of another number of clips is replaced.

    Returns:
        the builder; ``builder.as_data_source("train")`` reads the clips.

    Raises:
        ConfigError: ``train_clips`` or ``test_clips`` is 0.
        RunError: the disk is full.
    """
    require(
        data.train_clips > 0 and data.test_clips > 0,
        f"data.train_clips and test_clips are {data.train_clips} and {data.test_clips}; both must be positive",
    )
    with _alone(pathlib.Path(data_dir)):
        builder = _builder(data_dir, data, video)
        sizes = {split: getattr(data, f"{split}_clips") for split in SPLITS}
        stored = {name: split.num_examples for name, split in builder.info.splits.items()}
        if stored == sizes and arrays.has_all_shards(builder):
            return builder
        # tfds writes beside the final folder and renames at the end; also remove remains of an interrupted run there.
        shutil.rmtree(pathlib.Path(builder.data_path).parent, ignore_errors=True)
        builder = _builder(data_dir, data, video)
        with writing(builder.data_path):
            builder.download_and_prepare(file_format="array_record")
        return builder


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Wait until no other process prepares the dataset, because one would remove the unfinished clips of the other."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)  # the lock of a folder leaves no file
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def source(data_dir: str | os.PathLike, data: DataConfig, video: VideoConfig, split: str) -> Sequence[dict[str, Any]]:
    """Open one split for random access: ``source[i]`` is ``{"video" uint8 [T, H, W, 3], "caption", "held_out"}``.

    Raises:
        ConfigError: the dataset has not been written, or files of it are missing.
    """
    builder = _builder(data_dir, data, video)
    if not arrays.has_all_shards(builder):
        raise ConfigError(
            f"no complete {data.name} dataset at {builder.data_path}; write it with causvid prepare --stage=data"
        )
    return builder.as_data_source(split=split)
