"""Turn a folder of videos into a dataset of pixels or latents, with a report of every video.

A chunk is a group of videos. The clips of a video are written together, so an interruption neither loses nor repeats a
clip. The folder also holds ``videos.jsonl`` (file, caption and number of clips of every video that was used) and
``skipped.jsonl`` (file and reason of every other one).
"""

import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from causvid_jax.config import ConfigError, VideoConfig, require, to_json
from causvid_jax.config.files import write_text
from causvid_jax.data import arrays, captions, clips, devices, pictures
from causvid_jax.data.captions import Video
from causvid_jax.text import encoder

ORIGIN = {"file": tfds.features.Text(), "start": tfds.features.Scalar(dtype=np.float32)}
"""Features of an example that name its video, and the start of the clip in seconds."""
USED, SKIPPED = "videos.jsonl", "skipped.jsonl"
IN_MEMORY = 2**26
"""Most bytes of a video's encoded clips that are in memory; more are in a temporary file."""
_PARTS = "report"
T = TypeVar("T")


def write_latents(
    folder: str | os.PathLike,
    root: str | os.PathLike,
    videos: Sequence[Video],
    clip_encoder: pictures.ClipEncoder,
    *,
    batch: int = 1,
    prompt_encoder: encoder.Encoder | None = None,
    **options: Any,
) -> bool:
    """Split ``videos`` into clips of the recipe's size, length and rate, and encode them by the VAE.

    An example is ``latents`` float16 [F, h, w, C], ``caption``, its embeddings ``text`` float16 [tokens, dim], the
    name ``file`` of the video and the ``start`` of the clip in seconds.

    Args:
        folder, root, videos: as in :func:`write_clips`, with its result and its errors.
        clip_encoder: encodes the clips; video and text of its recipe are used too.
        batch: clips per device and call of the VAE.
        prompt_encoder: encoder of the captions; a recipe of words needs none.
        options: further ones of :func:`write_clips`.
    """
    recipe = clip_encoder.recipe

    def latents_of(params: Any, video: jax.Array) -> Any:
        return clip_encoder.encode(params, video.astype(jnp.float32) / 127.5 - 1.0)

    encode, size = devices.over_local_devices(latents_of, clip_encoder.params, batch, 2**16)
    identity = {"count": len(videos), "text": to_json(recipe.text), **clip_encoder.identity()}
    shapes = {"latents": recipe.latent_shape, **pictures.shapes(recipe), "text": (None, recipe.text.dim)}
    return write_clips(
        folder,
        root,
        videos,
        encode,
        functools.partial(encoder.encode, prompt_encoder or encoder.open_encoder(recipe)),
        config=recipe.video,
        features=arrays.array_features(ORIGIN, **shapes),
        identity=identity,
        size=size,
        **options,
    )


def write_pixels(
    folder: str | os.PathLike,
    root: str | os.PathLike,
    videos: Sequence[Video],
    config: VideoConfig,
    *,
    prompt_encoder: encoder.Encoder | None = None,
    **options: Any,
) -> bool:
    """Split ``videos`` into clips and store their pixels, for training a VAE or the tiny codec.

    An example is ``video`` uint8 [T, H, W, 3], ``caption``, the name ``file`` of the video and the ``start`` of the
    clip in seconds.

    Args:
        folder, root, videos: as in :func:`write_clips`, with its result and its errors.
        config: size, length and rate of a clip.
        prompt_encoder: skips videos whose caption it cannot encode; embeddings are not stored.
        options: further ones of :func:`write_clips`.
    """
    shape = (config.frames, config.height, config.width, 3)
    pixels = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib")
    return write_clips(
        folder,
        root,
        videos,
        lambda clips: {"video": clips},
        functools.partial(encoder.encode, prompt_encoder) if prompt_encoder else None,
        config=config,
        features=arrays.array_features(ORIGIN | {"video": pixels}),
        identity={},
        size=1,
        name="clips",
        **options,
    )


def part_of(used: Sequence[T], split: str) -> list[T]:
    """Return the videos of a split, of those that gave clips: every 50th is for tests, from the first one on.

    A single video is also for training.
    """
    if split == "test":
        return list(used[::50])
    return [video for i, video in enumerate(used) if i % 50] or list(used)


def write_clips(
    folder: str | os.PathLike,
    root: str | os.PathLike,
    videos: Sequence[Video],
    encode: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    encode_text: Callable[[list[str]], np.ndarray] | None,
    *,
    config: VideoConfig,
    features: tfds.features.FeaturesDict,
    identity: dict[str, Any],
    size: int,
    name: str = "latents",
    shard_videos: int = 64,
    clips_per_video: int = 0,
    workers: int = 2,
    process_id: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> bool:
    """Write a dataset of the clips of videos with any encoders; :func:`write_latents` and :func:`write_pixels` call it.

    Args:
        folder: folder of the dataset.
        root: folder that the names of the videos are relative to.
        videos: result of :func:`captions.list_videos`, the same on every process.
        encode: maps up to ``size`` clips uint8 [B, T, H, W, 3] to arrays [B, ...] by name.
        encode_text: maps captions to embeddings [B, length, dim] and raises ConfigError for a caption that it cannot
            encode; None accepts every caption.
        config: size, length and rate of a clip.
        features: the arrays of ``encode``, ``text`` if it is stored, and :data:`ORIGIN`.
        identity: of the encoders, as in :func:`arrays.write_dataset`; that of videos and clips is added.
        size: clips per call of ``encode``.
        name: ``"latents"`` stores the arrays as float16, ``"clips"`` as uint8.
        shard_videos: videos per shard.
        clips_per_video: maximum number of clips per video (0: all).
        workers: videos decoded at a time.
        process_id, process_count, progress: as in :func:`arrays.write_dataset`.

    Returns:
        whether the dataset is finished (False: another process still has videos to encode).

    Raises:
        ConfigError: the folder holds a dataset of other videos or settings, or no video gave any clip.
    """
    identity = {
        "videos": captions.digest([(v.file, v.caption, v.size) for v in videos]),
        "shard_videos": shard_videos,
        "clips_per_video": clips_per_video,
        "video": to_json(config),
        **identity,
    }
    kind = np.uint8 if name == "clips" else np.float16
    folder, root = pathlib.Path(folder), pathlib.Path(root)
    least = min(shard_videos, workers)
    require(least > 0, f"shard_videos is {shard_videos} and workers is {workers}; both must be at least 1")
    groups = [videos[i : i + shard_videos] for i in range(0, len(videos), shard_videos)]
    mine = range(process_id, len(groups), process_count)
    done = [i for i in mine if arrays.shard_path(folder, name, i, len(groups)).is_file()]
    bar = tqdm(
        total=sum(len(groups[i]) for i in mine),
        initial=sum(len(groups[i]) for i in done),
        desc="videos",
        unit="video",
        disable=not progress,
    )

    def make_chunk(index: int) -> Iterator[bytes]:
        group, report = groups[index], _Report(bar)
        rows = _text_rows(group, encode_text, report)
        good = [video for video in group if video.file in rows]

        def record(video: Video, n: int, encoded: Mapping[str, np.ndarray]) -> bytes:
            text = {"text": rows[video.file]} if "text" in features else {}
            start = np.float32(n * config.frames / config.fps)
            example = {name: x.astype(kind) for name, x in encoded.items()}
            return features.serialize_example(
                {**example, "caption": video.caption, **text, "file": video.file, "start": start}
            )

        paths = [root / video.file for video in good]
        pieces = clips.decode_ahead(paths, config, limit=clips_per_video, workers=workers)
        for whole in _encoded(good, pieces, encode, record, size, report, folder):
            yield from whole
        # Write the report before the shard gets its name, so that no shard lacks its report.
        _write_lines(folder / _PARTS / f"{index:05d}.jsonl", report.lines)

    try:
        with bar:
            return arrays.write_dataset(
                folder,
                name=name,
                features=features,
                chunks=len(groups),
                make_chunk=make_chunk,
                identity=identity,
                process_id=process_id,
                process_count=process_count,
                progress=False,
            )
    except arrays.EmptyDataset as error:
        _collect(folder)
        reasons = "; ".join(f"{line['file']} {line['reason']}" for line in skipped(folder)[:3])
        raise ConfigError(
            f"none of the {len(videos)} videos in {root} gave a clip ({reasons}); all reasons are in {folder / SKIPPED}"
        ) from error
    finally:
        _collect(folder)


def used(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Return ``{"file", "caption", "clips"}`` of every video in a dataset so far; [] for datasets not of videos."""
    return _read_lines(pathlib.Path(folder) / USED)


def skipped(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Return ``{"file", "reason"}`` of every video of a dataset that gave no clip."""
    return _read_lines(pathlib.Path(folder) / SKIPPED)


class _Report:
    """One line per video of a chunk, and the progress bar that counts them."""

    def __init__(self, bar: tqdm):
        self.lines: list[dict[str, Any]] = []
        self._bar = bar

    def used(self, video: Video, clips: int) -> None:
        self.lines.append({"file": video.file, "caption": video.caption, "clips": clips})
        self._bar.update()

    def skipped(self, video: Video, reason: str) -> None:
        self.lines.append({"file": video.file, "reason": reason})
        self._bar.update()


def _text_rows(
    videos: Sequence[Video], encode: Callable[[list[str]], np.ndarray] | None, report: _Report
) -> dict[str, np.ndarray]:
    """Return file to trimmed caption embeddings of every video with a usable caption; report the other videos."""
    possible = []
    for video in videos:
        if video.size <= 0:
            report.skipped(video, "does not exist" if video.size < 0 else "is empty (0 bytes)")
        elif not video.caption:
            report.skipped(video, "has no caption")
        else:
            possible.append(video)
    if not possible or encode is None:
        return {video.file: np.zeros((0, 0), np.float16) for video in possible}
    try:
        embeds = encode([video.caption for video in possible])
        return {video.file: arrays.trim_text(rows) for video, rows in zip(possible, embeds, strict=True)}
    except ConfigError:
        encode([""])  # raises if the encoder cannot work at all, whatever the caption
    kept = {}
    for video in possible:
        try:
            kept[video.file] = arrays.trim_text(encode([video.caption])[0])
        except ConfigError as error:
            report.skipped(video, f"has a caption that cannot be encoded: {error}")
    return kept


class _Records:
    """The encoded clips of a video, in memory up to :data:`IN_MEMORY` bytes and then in a temporary file."""

    def __init__(self, folder: pathlib.Path):
        self._file: Any = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=os.fspath(folder))  # noqa: SIM115
        self._sizes: list[int] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def append(self, record: bytes) -> None:
        self._sizes.append(self._file.write(record))

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        """Yield all records, once."""
        with self._file:
            self._file.seek(0)
            yield from map(self._file.read, self._sizes)


def _encoded(
    videos: Sequence[Video],
    pieces: Iterator[tuple[int, np.ndarray | clips.Unusable | None]],
    encode: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    record: Callable[[Video, int, Mapping[str, np.ndarray]], bytes],
    size: int,
    report: _Report,
    folder: pathlib.Path,
) -> Iterator[_Records]:
    """Yield the encoded clips of every usable video, each as the ``record`` of the video, its number and its arrays.

    Batches of ``size`` clips run across videos. The clips of a video are yielded after its last frame is decoded,
    because the clips of a damaged video are dropped.
    """
    waiting: list[tuple[int, np.ndarray]] = []
    done: dict[int, _Records] = {}
    whole: list[int] = []

    def run() -> None:
        if waiting:
            encoded = encode(np.stack([clip for _, clip in waiting]))
            for n, (i, _) in enumerate(waiting):
                done[i].append(record(videos[i], len(done[i]), {name: x[n] for name, x in encoded.items()}))
            waiting.clear()

    def ready(last: bool) -> Iterator[_Records]:
        if last:
            run()
        unfinished = {i for i, _ in waiting}
        while whole and whole[0] not in unfinished:
            i = whole.pop(0)
            report.used(videos[i], len(done[i]))
            yield done.pop(i)

    try:
        for i, piece in pieces:
            if isinstance(piece, np.ndarray):
                if i not in done:
                    done[i] = _Records(folder)
                waiting.append((i, piece))
                if len(waiting) == size:
                    run()
            elif piece is None:
                whole.append(i)
            else:
                waiting[:] = [entry for entry in waiting if entry[0] != i]
                if i in done:
                    done.pop(i).close()
                report.skipped(videos[i], str(piece))
            yield from ready(last=False)
        yield from ready(last=True)
    finally:
        for records in done.values():
            records.close()


def _write_lines(path: pathlib.Path, lines: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


def _collect(folder: pathlib.Path) -> None:
    """Merge the reports of all chunks so far, sorted by file name, into ``videos.jsonl`` and ``skipped.jsonl``."""
    lines = [line for path in sorted((folder / _PARTS).glob("*.jsonl")) for line in _read_lines(path)]
    lines.sort(key=lambda line: line["file"])
    if lines:
        _write_lines(folder / USED, [line for line in lines if "clips" in line])
        _write_lines(folder / SKIPPED, [line for line in lines if "reason" in line])
