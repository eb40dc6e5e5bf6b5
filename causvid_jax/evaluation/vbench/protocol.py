"""Number and length of the clips of VBench, as flags of ``causvid vbench``. Imports no JAX."""

import dataclasses

from causvid_jax.config.fields import BatchSize, Many, Seed
from causvid_jax.config.recipes import option


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Number and length of the sampled clips; the defaults are VBench's numbers and 81 frames."""

    samples: Many = option(5, "Clips of a prompt.")
    flicker_samples: Many = option(25, "Clips of a prompt of temporal flickering.")
    frames: Many = option(81, "Frames of a clip.")
    seed: Seed = option(0, "Seed of the first clip of every prompt; clip i has seed + i.")
    batch: BatchSize = option(1, "Clips sampled at once.")
