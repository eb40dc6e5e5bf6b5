"""The totals of VBench from the scores of its sixteen dimensions, with the constants of its published scripts.

    n_d = w_d (x_d - low_d) / (high_d - low_d)
    quality = sum n_d over seven dimensions / 6.5,  semantic = mean of n_d over nine
    total = (4 quality + semantic) / 5

Published code counts a missing dimension as 0. Here a partial run is refused.
Source: Vchitect/VBench, ``scripts/constant.py`` and ``scripts/cal_final_score.py``. Imports no JAX.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from causvid_jax.config import ConfigError, require
from causvid_jax.config.files import reason


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of VBench: its group, the range [low, high] that scores are normalised by, and its weight."""

    group: Literal["quality", "semantic"]
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


DIMENSIONS: Mapping[str, Dimension] = {
    "subject_consistency": Dimension("quality", 0.1462),
    "background_consistency": Dimension("quality", 0.2615),
    "temporal_flickering": Dimension("quality", 0.6293),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "aesthetic_quality": Dimension("quality"),
    "imaging_quality": Dimension("quality"),
    "dynamic_degree": Dimension("quality", weight=0.5),
    "object_class": Dimension("semantic"),
    "multiple_objects": Dimension("semantic"),
    "human_action": Dimension("semantic"),
    "color": Dimension("semantic"),
    "spatial_relationship": Dimension("semantic"),
    "scene": Dimension("semantic", 0.0, 0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", 0.0, 0.364),
    "overall_consistency": Dimension("semantic", 0.0, 0.364),
}
FLICKER = "temporal_flickering"
CLIPS = 5
"""Clips of a prompt that VBench reads, 0 to 4; of temporal flickering it reads up to five static ones."""

PUBLISHED = {
    "Self-Forcing, DMD, chunks of 3: self_forcing_dmd.pt (arXiv 2506.08009, table 1)": (84.31, 85.07, 81.28),
    "Self-Forcing, DMD, single frames (the same table)": (84.26, 85.25, 80.30),
    "Self-Forcing, trained again by FastGen (README of its distribution matching)": (84.27, 85.31, 80.14),
    "Wan2.1-T2V-1.3B, the teacher (arXiv 2506.08009, table 1)": (84.26, 85.30, 80.09),
}
"""Total, quality and semantic in percent, as their authors report them, to calibrate an installation on."""


def normalised(dimension: str, score: float) -> float:
    """Return ``w (x - low) / (high - low)`` of a dimension's score ``x``."""
    entry = DIMENSIONS[dimension]
    return entry.weight * (score - entry.low) / (entry.high - entry.low)


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """Return quality, semantic and total in [0, 1] of the scores of all sixteen dimensions.

    Raises:
        ConfigError: a dimension is missing, unknown or no number: a partial run has no total.
    """
    absent = [name for name in DIMENSIONS if name not in scores]
    require(
        not absent,
        f"{len(absent)} of 16 dimensions have no score, first {', '.join(absent[:3])}; a partial run has no total",
    )
    unknown = sorted(set(scores) - set(DIMENSIONS))
    require(not unknown, f"{unknown[0] if unknown else ''!r} is no dimension; accepted: {', '.join(DIMENSIONS)}")
    bad = [name for name, score in scores.items() if not math.isfinite(score)]
    require(not bad, f"the score of {bad[0] if bad else ''} is no number; a partial run has no total")
    result = {}
    for group in ("quality", "semantic"):
        names = [name for name, entry in DIMENSIONS.items() if entry.group == group]
        weight = sum(DIMENSIONS[name].weight for name in names)
        result[group] = sum(normalised(name, scores[name]) for name in names) / weight
    return result | {"total": (4 * result["quality"] + result["semantic"]) / 5}


def read_results(paths: Sequence[str | os.PathLike], expected: Mapping[str, int]) -> dict[str, float]:
    """Return the scores in files that VBench wrote, ``{dimension: [score, [result of every video]]}``.

    Args:
        paths: ``*_eval_results.json``; together they hold every dimension once.
        expected: dimension to the number of videos that it must have been computed on.

    Raises:
        ConfigError: an unreadable file, a dimension twice, or one that was computed on fewer videos.
    """
    scores: dict[str, float] = {}
    for path in paths:
        for name, (score, videos) in _read(path).items():
            require(name not in scores, f"{path} holds {name}, which another file has too; give each dimension once")
            want = expected.get(name, 0)
            # The static filter keeps up to five static clips of a prompt; a prompt whose clips all move has none.
            complete = 1 <= len(videos) <= want if name == FLICKER else len(videos) == want
            require(
                not want or complete,
                f"{path} scored {name} on {len(videos)} videos of {want}; a partial run has no total",
            )
            scores[name] = float(score)
    return scores


def _read(path: str | os.PathLike) -> dict[str, tuple[float, list[Any]]]:
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return {name: (float(value[0]), list(value[1])) for name, value in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ConfigError(f"{path} is no result of VBench: {reason(error)}") from error


def describe(scores: Mapping[str, float]) -> str:
    """Return the scores, their totals and the published totals as Markdown tables, in percent.

    Raises:
        ConfigError: as :func:`totals`.
    """
    result = totals(scores)
    lines = ["| dimension | score | normalised |", "|---|---:|---:|"]
    for name, score in scores.items():
        lines.append(f"| {name} | {100 * score:.2f} | {100 * normalised(name, score):.2f} |")
    lines += [f"| **{name}** | | **{100 * value:.2f}** |" for name, value in result.items()]
    lines += ["", "Published, for calibration:", "", "| | total | quality | semantic |", "|---|---:|---:|---:|"]
    lines.append(f"| here | {' | '.join(f'{100 * result[key]:.2f}' for key in ('total', 'quality', 'semantic'))} |")
    lines += [f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" for name, values in PUBLISHED.items()]
    return "\n".join(lines) + "\n"
