"""The size of a report, as flags of ``causvid evaluate``. Imports no JAX."""

import dataclasses
from typing import Annotated, Literal

from causvid_jax.config import require
from causvid_jax.config.fields import BatchSize, Bounds, Few, ManyOrZero, Seed, check_bounds
from causvid_jax.config.recipes import option

Clips = Annotated[int, Bounds(least=2, most=10**6)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers of clips, streams and timed runs of a report.

    Raises:
        ConfigError: a number out of bounds.
    """

    samples: Clips = option(64, "Clips per row; held-out prompts are repeated with other noise if there are fewer.")
    long_samples: ManyOrZero = option(0, "Streams of --long_factor times the trained length; 0: as --samples.")
    switch_samples: ManyOrZero = option(0, "Streams whose prompt changes half-way; 0: as --samples.")
    reference: Clips = option(256, "Number of real test clips for the Frechet distances.")
    batch: BatchSize = option(16, "Clips sampled at once, also in the timing.")
    long_factor: Few = option(10, "Length of the long streams, in trained lengths.")
    longest_factor: Annotated[int, Bounds(least=0, most=10_000)] = option(
        0, "Length of a further row of streams, 100 for example; 0: no such row."
    )
    longest_samples: Clips = option(16, "Streams of that row.")
    repeats: Few = option(3, "Timed runs of each sampler after one that compiles; the median is reported.")
    seed: Seed = option(0, "Of prompts, real clips and noise.")
    captions: Literal["test", "validation"] = option(
        "test", "The split of the prompts: choose settings on validation (data.validation_fraction), report on test."
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("long_samples", "switch_samples"):
            value = getattr(self, name)
            require(value != 1, f"--{name} is {value}; it must be 0 (as --samples) or at least 2")

    @property
    def most_samples(self) -> int:
        """Number of prompts of the longest row."""
        longest = self.longest_samples if self.longest_factor else 0
        return max(self.samples, self.long_samples, self.switch_samples, longest)
