"""The input pipeline: Grain over random-access sources, in threads, with exact resume.

Every iterator here is a pure function of its arguments and its position: the global example order depends on the seed
alone, process p of n takes examples p, p + n, p + 2n, ... of that one order, and random crops are seeded by the
example's place in it. So an epoch loses and repeats no example on any number of processes, and
``iterator.set_state(other.get_state())`` continues ``other`` exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np

from causvid_jax.config import require


class Source(Protocol):
    """Random access to examples; tfds data sources and plain lists of dicts are ones."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class _Numbered:
    """A source whose examples come with their number."""

    def __init__(self, source: Source | Sequence[dict[str, Any]]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return int(index), self._source[index]


def batches(
    source: Source | Sequence[dict[str, Any]],
    transform: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    process_id: int = 0,
    process_count: int = 1,
    threads: int = 2,
) -> grain.DatasetIterator:
    """An endless iterator of batches of ``transform(example, rng)``, shuffled anew every epoch.

    Args:
        source: the examples.
        transform: makes one example ready; its generator is seeded by (seed, position in the global order).
        batch_size: examples per batch of this process; batches run across the ends of epochs, none is dropped.
        seed: of the order and of every transform.
        shuffle: False reads the source in order.
        process_id: of this process, usually ``jax.process_index()``.
        process_count: usually ``jax.process_count()``.
        threads: that read and transform ahead.

    Returns:
        an iterator of dicts of stacked numpy arrays, with ``get_state()`` and ``set_state(state)``. ``index`` ``[B]``
        in each are the numbers of its examples in ``source``.
    """
    require(len(source) > 0, "the dataset is empty; it must have at least one example")
    require(batch_size > 0, f"batch_size is {batch_size}; it must be positive")
    require(
        0 <= process_id < process_count,
        f"process_id is {process_id} of {process_count} processes; accepted: 0 to {process_count - 1}",
    )

    def numbered(example: tuple[int, dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
        return {**transform(example[1], rng), "index": np.int64(example[0])}

    examples = grain.MapDataset.source(_Numbered(source)).seed(seed)
    if shuffle:
        examples = examples.shuffle()
    # The transform stands before the slice, so that its randomness does not depend on the number of processes.
    examples = examples.repeat().random_map(numbered).slice(slice(process_id, None, process_count))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16, 2 * batch_size))
    return iter(examples.to_iter_dataset(options).batch(batch_size, drop_remainder=True))


def this_process() -> dict[str, int]:
    """``process_id`` and ``process_count`` of this JAX process, for everything that splits data over hosts."""
    return {"process_id": jax.process_index(), "process_count": jax.process_count()}


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [-1, 1]."""
    return video.astype(np.float32) / 127.5 - 1.0


def as_text(value: str | bytes) -> str:
    """A caption as a dataset gives it, as a string."""
    return value.decode() if isinstance(value, bytes) else str(value)


def clip_batches(source, *, batch_size: int, seed: int, frames: int = 0, **options) -> grain.DatasetIterator:
    """Batches of pixel clips, with a random contiguous crop of ``frames`` frames (0: whole clips).

    Returns:
        iterator of ``{"video": float32 [B, T, H, W, 3] in [-1, 1], "caption": str [B]}``; ``options`` as
        :func:`batches`.
    """

    def transform(example, rng):
        video = example["video"]
        total = len(video)
        require(0 <= frames <= total, f"frames is {frames}; the clips have {total}, so accepted: 0 to {total}")
        start = int(rng.integers(total - frames + 1)) if frames else 0
        return {"video": to_float(video[start : start + (frames or total)]), "caption": as_text(example["caption"])}

    return batches(source, transform, batch_size=batch_size, seed=seed, **options)


def latent_batches(source, *, batch_size: int, seed: int, frames: int = 0, **options) -> grain.DatasetIterator:
    """Batches of latents, cut to their first ``frames`` frames (0: all).

    The cut always starts at frame 0: the causal VAE's first latent frame holds one pixel frame, the others four.

    Returns:
        iterator of ``{"latents": float32 [B, F, h, w, C], "caption": str [B]}``; ``options`` as :func:`batches`.
    """

    def transform(example, rng):
        latents = example["latents"]
        total = len(latents)
        require(0 <= frames <= total, f"frames is {frames}; the latents have {total}, so accepted: 0 to {total}")
        return {"latents": latents[: frames or total].astype(np.float32), "caption": as_text(example["caption"])}

    return batches(source, transform, batch_size=batch_size, seed=seed, **options)


def trajectory_batches(source, *, batch_size: int, seed: int, **options) -> grain.DatasetIterator:
    """Batches of ODE trajectories: the Q states at the student's timesteps, then the clean end.

    Returns:
        iterator of ``{"trajectory": float32 [B, Q + 1, F, h, w, C], "caption": str [B]}``, with the ``context``
        ``[B, F, h, w, C]`` of a causal teacher's; ``options`` as :func:`batches`.
    """

    def transform(example, rng):
        states = {key: example[key].astype(np.float32) for key in ("trajectory", "context") if key in example}
        return states | {"caption": as_text(example["caption"])}

    return batches(source, transform, batch_size=batch_size, seed=seed, **options)
