"""Figures of a report, in numpy: accuracies, Frechet distance, discontinuity at block borders, prompt switches.

Clips are uint8 ``[B, T, H, W, 3]``. A stream's blocks are K latent frames; the causal VAE turns latent frame 0 into one
pixel frame and every later one into four, so the first block shows ``1 + 4 (K - 1)`` frames and the others ``4 K``.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from causvid_jax.config import require

ATTRIBUTES = ("digit", "color", "direction")


def agreement(read: Sequence[Sequence[tuple]], targets: Sequence[Sequence[tuple]]) -> np.ndarray:
    """Return which attributes are correct: bool ``[B, n, 3]``, the last axis in the order of :data:`ATTRIBUTES`.

    The order of a clip's digits is arbitrary. Of all assignments of the digits read to those of the caption, the one
    with the most correct attributes counts.

    Args:
        read: n predicted triples (digit, color, direction) of each of B clips.
        targets: n triples of each clip's caption.

    Raises:
        ConfigError: other numbers of clips or digits in ``read`` and ``targets``.
    """
    require(len(read) == len(targets), f"{len(read)} clips were read but {len(targets)} captions are given")

    def best(predicted: Sequence[tuple], target: Sequence[tuple]) -> np.ndarray:
        require(
            len(predicted) == len(target),
            f"{len(predicted)} digits were read in a clip whose caption names {len(target)}",
        )
        ways = [
            np.array([[r == w for r, w in zip(a, b, strict=True)] for a, b in zip(order, target, strict=True)])
            for order in itertools.permutations(predicted)
        ]
        return max(ways, key=np.sum)

    return np.stack([best(*pair) for pair in zip(read, targets, strict=True)])


def accuracies(read: Sequence[Sequence[tuple]], targets: Sequence[Sequence[tuple]]) -> dict[str, float]:
    """Return the share of digits correct in each attribute, and of clips correct in all attributes (``"all"``)."""
    right = agreement(read, targets)
    scores = {name: float(right[..., i].mean()) for i, name in enumerate(ATTRIBUTES)}
    return scores | {"all": float(right.all(axis=(1, 2)).mean())}


def _sqrt(matrix: np.ndarray) -> np.ndarray:
    """Return the square root of a symmetric positive semi-definite matrix. Eigenvalues below 0 count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of the Gaussians fitted to two sets of features.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Heusel et al. 2017, arXiv 1706.08500). The inner
    matrix is symmetric, so its root is computed by an eigendecomposition, which is more stable than a general root.

    Args:
        a, b: ``[N, D]``, ``[M, D]``, one row per clip; computed in float64.

    Raises:
        ConfigError: a set of fewer than two clips.
    """
    for features in (a, b):
        require(len(features) >= 2, f"a covariance needs at least 2 clips; {len(features)} given")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = _sqrt(cov_a)
    cross = _sqrt(root @ cov_b @ root)
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(cross)
    return float(max(distance, 0.0))


def block_starts(latent_frames: int, block_sizes: Sequence[int]) -> np.ndarray:
    """Return the first pixel frame of every block, and the clip's length as the last entry: int ``[blocks + 1]``.

    A block that begins at latent frame f > 0 begins at pixel frame ``1 + 4 (f - 1)``.

    Raises:
        ConfigError: blocks that do not add up to ``latent_frames``.
    """
    ends = np.cumsum([0, *block_sizes])
    require(int(ends[-1]) == latent_frames, f"blocks of {tuple(block_sizes)} are not {latent_frames} latent frames")
    return np.where(ends == 0, 0, 1 + 4 * (ends - 1))


def discontinuity(video: np.ndarray, starts: Sequence[int] | np.ndarray) -> float:
    """Return the change of the picture between blocks over the change inside blocks; 1 is seamless.

    It is the mean absolute difference of neighbouring frames across block borders, divided by that inside blocks, both
    over all clips. Motion is not compensated; it is in both terms.

    Args:
        video: ``[B, T, H, W, 3]``.
        starts: first pixel frames of the blocks, as from :func:`block_starts`; those outside (0, T) are ignored.

    Raises:
        ConfigError: no border between blocks, or nothing but borders.
    """
    change = np.abs(np.diff(video.astype(np.float32), axis=1)).mean(axis=(0, 2, 3, 4))  # [T - 1], frame t to t + 1
    border = np.zeros(len(change), bool)
    border[[s - 1 for s in starts if 0 < s < video.shape[1]]] = True
    require(border.any() and not border.all(), f"{video.shape[1]} frames with blocks at {list(starts)} have no border")
    at, inside = float(change[border].mean()), float(change[~border].mean())
    if inside == 0.0:
        return 1.0 if at == 0.0 else float("inf")
    return at / inside


def blocks_until(holds: Sequence[bool]) -> int | None:
    """Return the number of blocks until every later block is classified correctly: 1 if at once, None if never.

    This is the strictest count: a single late error restarts it.

    Args:
        holds: for every block from the switch on, whether all attributes of the new caption are predicted for it.
    """
    return first_block(np.logical_and.accumulate(np.asarray(holds, bool)[::-1])[::-1])


def first_block(begins: Sequence[bool] | np.ndarray) -> int | None:
    """Return the number, from 1, of the first block from which on the new caption holds; None if there is none.

    Args:
        begins: for every block from the switch on, whether the new caption is predicted for it and all later frames.
    """
    right = np.flatnonzero(begins)
    return int(right[0]) + 1 if len(right) else None


def switch_scores(counts: Sequence[int | None]) -> dict[str, float]:
    """Summarize :func:`first_block` or :func:`blocks_until` over clips.

    Args:
        counts: blocks until the new caption holds, of each clip.

    Returns:
        ``within_1`` to ``within_3``: share of clips that hold within so many blocks. ``ever``: share that ever hold.
        ``median_blocks``: median number of blocks of those that do (NaN if none does).
    """
    reached = [c for c in counts if c is not None]
    scores = {f"within_{n}": sum(c <= n for c in reached) / len(counts) for n in (1, 2, 3)}
    return scores | {
        "ever": len(reached) / len(counts),
        "median_blocks": float(np.median(reached)) if reached else float("nan"),
    }


def network_passes(*, block_sizes: Sequence[int], passes: Sequence[int]) -> dict[str, float]:
    """Return how often the network is called for a clip, and how often each latent frame passes through it.

    Args:
        block_sizes: latent frames of each block; one block for the bidirectional teacher.
        passes: of each block. Classifier-free guidance takes two for a step.

    Returns:
        ``calls`` of the network, and ``passes_per_frame``, the mean over the latent frames.
    """
    work = sum(size * count for size, count in zip(block_sizes, passes, strict=True))
    return {"calls": sum(passes), "passes_per_frame": work / sum(block_sizes)}
