"""Draw the training curves of a working directory as one picture."""

import os
import pathlib

import matplotlib
import numpy as np

from causvid_jax.config import require
from causvid_jax.config.files import atomic
from causvid_jax.training.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Metrics that are drawn: losses on a logarithmic axis, scores of the classifier on a linear one.
LOSSES = {
    "vae": ("l2", "l1"),
    "taehv": ("l2", "encoded"),
    "teacher": ("loss",),
    "causal": ("loss",),
    "init": ("loss",),
    "consistency": ("loss",),
    "distill": ("critic_loss", "generator_loss"),
}
SCORES = ("sample_digit", "sample_color", "sample_direction", "sample_all")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return a moving average over nine values, over fewer values at the ends."""
    kernel = np.ones(min(9, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw(workdir: str | os.PathLike, path: str | os.PathLike) -> list[str]:
    """Draw the curves of every stage of ``workdir`` that has metrics into the PNG ``path``; return the stages' names.

    Raises:
        ConfigError: no stage has metrics.
    """
    records = {name: read_metrics(pathlib.Path(workdir) / name) for name in LOSSES}
    records = {name: values for name, values in records.items() if values}
    require(bool(records), f"{workdir} holds no metrics of any stage ({', '.join(LOSSES)})")
    figure, axes = plt.subplots(2, len(records), figsize=(4 * len(records), 6), squeeze=False)
    for column, (name, values) in enumerate(records.items()):
        for row, (keys, smooth) in enumerate(((LOSSES[name], True), (SCORES, False))):
            axis = axes[row][column]
            for key in keys:
                points = [(r["step"], r[key]) for r in values if r.get(key) is not None]
                if points:
                    steps, curve = map(np.asarray, zip(*points, strict=True))
                    axis.plot(steps, _smooth(curve) if smooth else curve, label=key, marker=None if smooth else "o")
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()
        hours = max(r.get("hours") or 0.0 for r in values)
        axes[0][column].set_title(f"{name}: {hours * 60:.0f} minutes")
        axes[0][column].set_yscale("log" if name != "distill" else "linear")
        axes[1][column].set_ylim(-0.02, 1.02)
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    plt.close(figure)
    return list(records)
