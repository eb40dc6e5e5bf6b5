"""The input pipeline: read random-access sources by Grain, in threads, with exact resume.

There is one global order of examples, a function of the sources, their weights and the seed alone. Step k takes the
next batch of this order, and each process reads only its own examples of the batch. With any number of processes every
epoch therefore has every example once. The position is a number of examples in the global order, so a run can continue
on another number of processes.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from causvid_jax.config import require
from causvid_jax.data import pictures
from causvid_jax.media import to_float


class Source(Protocol):
    """Random access to examples, such as a tfds data source or a list of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]
Examples = Source | Sequence[dict[str, Any]]


class Part:
    """The examples ``numbers`` of a source, in this order."""

    def __init__(self, source: Source, numbers: Sequence[int]):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._numbers[index]]


class Mixture:
    """Several sources that are read as one; each is shuffled and repeated on its own.

    Attributes:
        sources: sources of examples with the same keys and shapes.
        weights: positive numbers; source i has the share ``weights[i] / sum(weights)`` of the global order.
    """

    def __init__(self, sources: Sequence[Examples], weights: Sequence[float]):
        require(len(sources) == len(weights) > 0, f"a mixture has {len(sources)} datasets and {len(weights)} weights")
        require(all(w > 0 for w in weights), f"weights of a mixture are {tuple(weights)}; they must be positive")
        self.sources, self.weights = tuple(sources), tuple(weights)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)


class _Numbered:
    """A source that yields (number, example); numbers count on through the sources of a mixture."""

    def __init__(self, source: Examples, first: int):
        self._source, self._first = source, first

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return self._first + int(index), self._source[index]


class _Rows(grain.MapDataset):
    """The examples ``rows`` of every batch of ``size`` examples from example ``start`` on, one by one."""

    def __init__(self, order: grain.MapDataset, start: int, size: int, rows: tuple[int, ...]):
        super().__init__(order)
        self._order, self._start, self._size, self._rows = order, start, size, rows

    def __len__(self) -> int:
        return (len(self._order) - self._start) // self._size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        batch, row = divmod(int(index), len(self._rows))
        return self._order[self._start + batch * self._size + self._rows[row]]


class Batches:
    """An endless iterator of batches of a global order, with a position that can be saved and restored.

    The position is ``{"examples": n}``: n examples of the global order were read. It does not depend on the number of
    processes.
    """

    def __init__(self, order: grain.MapDataset, size: int, rows: tuple[int, ...], options: grain.ReadOptions):
        self._order, self._size, self._rows, self._options = order, size, rows, options
        self._begin(0)

    def _begin(self, start: int) -> None:
        self._examples = start
        rows = _Rows(self._order, start, self._size, self._rows)
        self._iterator = iter(rows.batch(len(self._rows), drop_remainder=True).to_iter_dataset(self._options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._iterator)
        self._examples += self._size
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the position in the global order as JSON values, the same on every process."""
        return {"examples": self._examples}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue at the position ``state`` of :meth:`get_state`."""
        self._begin(int(state["examples"]))


def batches(
    source: Examples | Mixture,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    threads: int = 2,
) -> Batches:
    """Iterate without end over batches of ``transform(example, rng)``, in a new random order every epoch.

    Args:
        source: the examples; a :class:`Mixture` of several.
        transform: converts one example; its generator is seeded by (seed, position in the global order).
        batch_size: examples per batch of all processes together. A batch may contain the end of one epoch and the start
            of the next; no example is dropped.
        seed: seed of the order and of every transform.
        rows: indices of the examples of every batch that this process reads; None: all.
        threads: number of threads that read and transform ahead.

    Returns:
        an iterator of dicts of stacked NumPy arrays. ``index`` int64 [B] has the numbers of the examples in ``source``;
        in a mixture the numbers of each source follow those of the one before.

    Raises:
        ConfigError: an empty source or batch, or impossible ``rows``.
    """
    require(len(source) > 0, "the dataset is empty; it must have at least one example")
    require(batch_size > 0, f"batch_size is {batch_size}; it must be positive")
    mine = tuple(range(batch_size) if rows is None else rows)
    require(
        len(mine) > 0 and all(0 <= row < batch_size for row in mine),
        f"rows are {rows} of a batch of {batch_size}; accepted: some rows of the batch",
    )

    def numbered(example: tuple[int, dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
        return {**transform(example[1], rng), "index": np.int64(example[0])}

    # Transform before the rows are chosen, so that randomness does not depend on the processes.
    order = _endless(source, seed).random_map(numbered)
    # Elements of the iterator are whole batches: each thread makes one, and as many are buffered.
    return Batches(order, batch_size, mine, grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))


def _endless(source: Examples | Mixture, seed: int, first: int = 0) -> grain.MapDataset:
    """Return the global order: epoch after epoch of a source, or the interleaved orders of several."""
    if isinstance(source, Mixture):
        firsts = itertools.accumulate((len(one) for one in source.sources), initial=0)
        orders = [_endless(one, seed + i, n) for (i, one), n in zip(enumerate(source.sources), firsts, strict=False)]
        return grain.MapDataset.mix(orders, source.weights).seed(seed)
    return grain.MapDataset.source(_Numbered(source, first)).seed(seed).shuffle().repeat()


def as_text(value: str | bytes) -> str:
    """Return a caption of a dataset as text; tfds stores bytes, UTF-8."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _prompt(example: dict[str, Any], text_length: int) -> dict[str, Any]:
    """Return the caption and, if the dataset has them and ``text_length`` is positive, its padded embeddings."""
    prompt: dict[str, Any] = {"caption": as_text(example["caption"])}
    if text_length and "text" in example:
        rows = example["text"]
        require(
            len(rows) <= text_length,
            f"a caption has {len(rows)} tokens; text.length is {text_length}: prepare the data again",
        )
        prompt["text"] = np.zeros((text_length, rows.shape[1]), np.float32)
        prompt["text"][: len(rows)] = rows
    return prompt


def clip_batches(source: Any, *, batch_size: int, seed: int, frames: int = 0, **options: Any) -> Batches:
    """Iterate over batches of pixel clips, each a random run of ``frames`` pixel frames (0: whole clips).

    Returns:
        iterator of ``{"video": float32 [B, T, H, W, 3] in [-1, 1], "caption": str [B]}``; other arguments as
        :func:`batches`.

    Raises:
        ConfigError: while iterating, clips of fewer frames; otherwise as :func:`batches`.
    """

    def transform(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        video = example["video"]
        total = len(video)
        require(0 <= frames <= total, f"frames is {frames}; the clips have {total}, so accepted: 0 to {total}")
        start = int(rng.integers(total - frames + 1)) if frames else 0
        return {"video": to_float(video[start : start + (frames or total)]), "caption": as_text(example["caption"])}

    return batches(source, transform, batch_size=batch_size, seed=seed, **options)


def stream_batches(source: Any, *, batch_size: int, seed: int, frames: int = 0, **options: Any) -> Batches:
    """Iterate over batches of the student's clips: latents and their decoded frames.

    Clips are cut to their first ``frames`` pixel frames, ``1 + 4 n`` for a VAE of four frames per latent (0: all).

    Returns:
        iterator of ``{"video": float32 [B, T, H, W, 3] in [-1, 1], "latents": float32 [B, F, h, w, C], "caption":
        str [B]}``; other arguments as :func:`batches`.

    Raises:
        ConfigError: while iterating, a number of frames that clips cannot be cut to; otherwise as :func:`batches`.
    """

    def transform(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        video, latents = example["video"], example["latents"]
        if frames:
            factor = (len(video) - 1) // (len(latents) - 1)
            require(
                0 < frames <= len(video) and (frames - 1) % factor == 0,
                f"frames is {frames}; the clips have {len(video)}, so accepted: 0, or 1 + {factor}n to {len(video)}",
            )
            video, latents = video[:frames], latents[: 1 + (frames - 1) // factor]
        return {
            "video": to_float(video),
            "latents": latents.astype(np.float32),
            "caption": as_text(example["caption"]),
        }

    return batches(source, transform, batch_size=batch_size, seed=seed, **options)


def example_batches(
    source: Any, *, batch_size: int, seed: int, frames: int = 0, text_length: int = 0, **options: Any
) -> Batches:
    """Iterate over batches of latents, ODE trajectories or prompts; latents are cut to ``frames`` frames (0: all).

    The first latent frame is always kept, because it encodes one pixel frame and all others encode four.

    Returns:
        iterator of ``{"caption": str [B]}`` and the float32 arrays of the dataset: ``latents [B, F, h, w, C]``;
        ``trajectory [B, Q + 1, F, h, w, C]``, the Q states at the student's timesteps and the clean end; ``context
        [B, F, h, w, C]``, the clean past of every block of a causal teacher. With ``text_length``, a dataset of
        embedded captions also gives ``"text": float32 [B, text_length, dim]``, zero after the last token. A dataset
        with pictures also gives the arrays of :mod:`causvid_jax.data.pictures`. Other arguments as :func:`batches`.

    Raises:
        ConfigError: while iterating, latents of fewer frames or captions of more than ``text_length`` tokens; otherwise
            as :func:`batches`.
    """

    def transform(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        arrays = {key: example[key] for key in ("latents", "trajectory", "context") if key in example}
        if "latents" in arrays:
            total = len(arrays["latents"])
            require(0 <= frames <= total, f"frames is {frames}; the latents have {total}, so accepted: 0 to {total}")
            arrays["latents"] = arrays["latents"][: frames or total]
        shown = {key: array.astype(np.float32) for key, array in arrays.items()}
        return shown | pictures.of_example(example, frames) | _prompt(example, text_length)

    return batches(source, transform, batch_size=batch_size, seed=seed, **options)
