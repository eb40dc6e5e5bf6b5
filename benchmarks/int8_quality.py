"""Measure the effect of 8 bits on clips of the digits student: ``python benchmarks/int8_quality.py [CLIPS]``.

Samples the same prompts and noise with the recipe's settings, with each of ``student.kv_cache``, ``student.attention``
and ``student.linear`` set to ``"int8"``, with all three, and with ``student.precision="fast"``, twice the trained
length. Prints for each the PSNR of the first and of the second half of its frames against those of the first setting,
and how often the classifier reads the second half as prompted.
"""

import dataclasses
import sys

import numpy as np

import causvid_jax as cv
from causvid_jax.config.recipes import load_recipe
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier, metrics

NAMES = ("kv_cache", "attention", "linear")
SETTINGS: dict[str, dict[str, str]] = {
    "none of these": {},
    **{f"{name} int8": {name: "int8"} for name in NAMES},
    "all three": dict.fromkeys(NAMES, "int8"),
    "precision fast": {"precision": "fast"},
}


def main(count: int) -> None:
    """Print a line for each setting: PSNR in dB of both halves, and the classifier's accuracies on the second half."""
    recipe = load_recipe("digits")
    reader = classifier.load(recipe.data)
    prompts = [str(p) for p in np.random.default_rng(0).permutation(digits.captions(recipe.data, "test"))[:count]]
    blocks = 2 * recipe.video.latent_frames // recipe.causal.frames_per_block
    targets = [classifier.target_triples(prompt) for prompt in prompts]
    first: np.ndarray | None = None
    for name, changes in SETTINGS.items():
        student = dataclasses.replace(recipe.student, **changes)
        pipe = cv.load(dataclasses.replace(recipe, student=student))
        frames = np.concatenate([x for x, _ in pipe.frames(pipe.stream(prompts, seed=0), blocks)], axis=1)
        first = frames if first is None else first
        half = frames.shape[1] // 2
        error = np.square(frames.astype(np.float64) - first)
        psnr = [
            "same" if not e.any() else f"{10 * np.log10(255**2 / e.mean()):.1f} dB" for e in np.split(error, [half], 1)
        ]
        reading = classifier.read(reader, frames[:, half:], data=recipe.data)
        shares = metrics.accuracies(reading.triples, targets)
        print(f"{name}: PSNR {psnr[0]}, {psnr[1]}; {' '.join(f'{k} {v:.3f}' for k, v in shares.items())}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
