"""Sample the clips of VBench under its file names. A run that was stopped continues.

``{prompt}-{index}.mp4`` is named by the short prompt. The sampled text may be longer: line i of an extended list
belongs to entry i of VBench's list. There are five clips per prompt, and 25 for prompts of temporal flickering.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from causvid_jax import media
from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import reason, write_text
from causvid_jax.evaluation.vbench.protocol import Protocol
from causvid_jax.evaluation.vbench.totals import CLIPS, DIMENSIONS, FLICKER
from causvid_jax.sampling import blocks, script

if TYPE_CHECKING:
    from causvid_jax.sampling.pipeline import StudentPipeline

MANIFEST = "sampling.json"
VIDEOS = "videos"
"""The folder of the clips. It holds no other file, because VBench takes the suffix of all clips from any file there."""
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of VBench's list: a prompt, the text sampled for it, and the dimensions that use its clips."""

    prompt: str
    text: str
    dimensions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip to sample: VBench's prompt, the text that is sampled, the seed, and the file's name."""

    prompt: str
    text: str
    seed: int
    name: str


def read_entries(info: str | os.PathLike, extended: str | os.PathLike | None = None) -> list[Entry]:
    """Return the entries of ``VBench_full_info.json``, with the texts of a list of as many lines.

    Raises:
        ConfigError: an unreadable file, unknown dimensions, lists of different lengths, or a prompt that is no file
            name.
    """
    try:
        content = json.loads(pathlib.Path(info).read_text(encoding="utf-8"))
        rows = [(str(row["prompt_en"]), tuple(map(str, row["dimension"]))) for row in content]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--info {info} is no list of VBench: {reason(error)}") from error
    texts = [prompt for prompt, _ in rows]
    if extended is not None:
        try:
            texts = pathlib.Path(extended).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--extended {extended} cannot be read: {reason(error)}") from error
        require(
            len(texts) == len(rows),
            f"--extended {extended} has {len(texts)} lines and --info {info} has {len(rows)} entries; they are paired",
        )
    entries = [Entry(prompt, text.strip(), names) for (prompt, names), text in zip(rows, texts, strict=True)]
    for entry in entries:
        unknown = [name for name in entry.dimensions if name not in DIMENSIONS]
        require(not unknown, f"--info {info} names a dimension {unknown[:1]}; accepted: {', '.join(DIMENSIONS)}")
        fits = entry.prompt and "/" not in entry.prompt and len(entry.prompt.encode()) <= 240
        require(fits, f"prompt {entry.prompt[:60]!r} of {info} is no file name; accepted: up to 240 bytes without '/'")
        require(entry.text, f"the text of prompt {entry.prompt[:60]!r} is empty")
    return entries


def plan(entries: Sequence[Entry], protocol: Protocol) -> list[Clip]:
    """Return every clip once. A prompt with two entries has the text of the first and the larger number of clips.

    Clip i of every prompt has seed ``protocol.seed + i``.
    """
    texts: dict[str, str] = {}
    counts: dict[str, int] = {}
    for entry in entries:
        count = protocol.flicker_samples if FLICKER in entry.dimensions else protocol.samples
        texts.setdefault(entry.prompt, entry.text)
        counts[entry.prompt] = max(count, counts.get(entry.prompt, 0))
    return [
        Clip(prompt, texts[prompt], protocol.seed + i, f"{prompt}-{i}.mp4")
        for prompt, count in counts.items()
        for i in range(count)
    ]


def expected_videos(entries: Sequence[Entry], protocol: Protocol) -> dict[str, int]:
    """Return dimension to the number of videos that its score is computed on; of temporal flickering, the most."""
    result: dict[str, int] = {}
    for name in DIMENSIONS:
        prompts = {entry.prompt for entry in entries if name in entry.dimensions}
        result[name] = len(prompts) * min(CLIPS, protocol.flicker_samples if name == FLICKER else protocol.samples)
    return result


def parse_shard(text: str) -> tuple[int, int]:
    """Return the text ``I/N`` as two numbers.

    Raises:
        ConfigError: another text, or I that is not below N.
    """
    first, _, second = text.partition("/")
    numbers = [part for part in (first, second) if part.isascii() and part.isdigit() and len(part) < 7]
    require(
        len(numbers) == 2 and int(first) < int(second), f"--shard is {text!r}; accepted: I/N with I from 0 to N - 1"
    )
    return int(first), int(second)


def absent(clips: Sequence[Clip], folder: pathlib.Path) -> list[Clip]:
    """Return the clips that have no video in ``folder``."""
    return [clip for clip in clips if not (folder / clip.name).is_file()]


def claim(folder: pathlib.Path, identity: Mapping[str, object]) -> None:
    """Record the settings of the clips in ``folder``; refuse to add clips with other settings.

    Raises:
        ConfigError: the folder holds clips of other weights, texts or settings, or cannot be written.
    """
    path = folder / MANIFEST
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not readable JSON: {reason(error)}") from error
        before.setdefault("size", identity["size"])  # manifests of older versions have none
        changed = [name for name in identity if before.get(name) != identity[name]]
        require(
            not changed,
            f"{folder} holds clips that were sampled with another {', '.join(changed)}; give another --output",
        )
        return
    write_text(path, json.dumps(identity, indent=1))


def identity(pipe: "StudentPipeline", checksum: str, clips: Sequence[Clip], protocol: Protocol) -> dict[str, object]:
    """Return what determines the pixels of a run: recipe, weights, texts, seeds, and frames with size and rate."""
    texts = hashlib.sha256("\n".join(f"{clip.name}\t{clip.text}\t{clip.seed}" for clip in clips).encode()).hexdigest()
    size = f"{script.size_of(pipe.config)} at {pipe.config.video.fps:g}"
    return {"recipe": pipe.config.name, "weights": checksum, "clips": texts, "frames": protocol.frames, "size": size}


def sample(
    pipe: "StudentPipeline", clips: Sequence[Clip], folder: pathlib.Path, protocol: Protocol, say: Say = print
) -> int:
    """Sample the clips that ``folder`` lacks and return their number; a video appears when it is complete."""
    todo = absent(clips, folder)
    say(f"{len(clips) - len(todo)} of {len(clips)} clips are there, {len(todo)} to sample")
    for start in range(0, len(todo), protocol.batch):
        group = todo[start : start + protocol.batch]
        # Pad a smaller last group with its first clip, so that one program serves all groups.
        padded = [*group, *[group[0]] * (protocol.batch - len(group))]
        videos = np.concatenate(list(_frames(pipe, padded, protocol.frames)), axis=1)
        for clip, video in zip(group, videos, strict=False):
            with media.VideoWriter(folder / clip.name, pipe.config.video.fps, whole=True) as writer:
                writer.comment = json.dumps({"text": clip.text, "seed": clip.seed, "recipe": pipe.config.name})
                writer.append(video)
        say(f"{start + len(group)} of {len(todo)}: {group[-1].name}")
    return len(todo)


def _frames(pipe: "StudentPipeline", clips: Sequence[Clip], frames: int) -> Iterator[np.ndarray]:
    """Yield the frames of a group of clips block by block, ``frames`` in all."""
    longest = blocks.covering_latents(frames, pipe.config)
    state = pipe.stream([clip.text for clip in clips], seed=[clip.seed for clip in clips], frames=longest)
    count = 0
    while count < frames:
        part, state = next(iter(pipe.frames(state)))
        yield part[:, : frames - count]
        count += part.shape[1]
