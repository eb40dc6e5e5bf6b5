"""Predict a stream over several devices: a pipeline of denoising steps, or every pass split. Nothing is measured.

``python benchmarks/pipeline.py --config=wan_1_3b --chips=h200,v5p,v6e`` prints the table of docs/pipeline.md. The block
is that of a full window, counted by shapes as in ``benchmarks/chips.py``: products at 80% of the published peak, or
weights and keys and values read once in every pass, whichever takes longer.

Rows:

- *one device*: all denoising steps and the pass that writes the finished block.
- *context N*: the same, every pass split over N devices (``parallel.context``); also without the write pass
  (``causal.context_pass`` off), for comparison with the noisy keys.
- *steps, noisy keys*: one denoising step on each device (``sampling.pipelined`` with ``causal.context_pass`` off).
- *steps, estimates*: the same, and each device writes its own x0 by a second pass (``causal.context_pass``).
- *steps, sent keys*: noisy keys, which one more device replaces by those of finished blocks. Not built.

What devices send is counted on top of their work, at the full rate of a GPU, and on a TPU at that of all links for
``context`` and of one link for a step's neighbour. Latency is from noise to the end of the program that returns the
block's latents; a step's device waits for the slowest one in every round.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import chips

from causvid_jax.analysis import estimate, topology
from causvid_jax.config import Recipe, require
from causvid_jax.config.recipes import load_recipe
from causvid_jax.sampling.schedule import passes_per_block

LINKS = {"v5e": 4, "v5p": 6, "v6e": 4}
"""Links of a TPU in its torus; ``topology.Chip.ici_bandwidth`` counts all of them."""
F32 = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one scheme.

    Attributes:
        scheme: its name.
        devices: how many.
        gib: memory of a device.
        sent_mb: bytes that a device sends for a block, in MB.
        block_ms: time between two finished blocks.
        latency_ms: from noise to the latents of a block.
        frames: pixel frames a second.
    """

    scheme: str
    devices: int
    gib: float
    sent_mb: float
    block_ms: float
    latency_ms: float
    frames: float


def machine(chip: str, devices: int) -> topology.TopologySpec:
    """Return ``devices`` chips of a kind, joined by its fast links."""
    return topology.TopologySpec(f"{chip}:{devices}", chip, (1, devices))


def rows(recipe: Recipe, chip: str) -> Iterator[Row]:
    """Yield the rows of ``chip``, by shapes."""
    steps, k = len(recipe.diffusion.denoising_timesteps), recipe.causal.frames_per_block
    all_links = topology.CHIPS[chip].ici_bandwidth
    one_link = all_links / LINKS.get(chip, 1)
    alone = estimate.estimate(recipe, "stream", machine(chip, 1))
    one_pass = chips.row(chip, recipe).roofline_ms / passes_per_block(recipe)

    def row(scheme: str, devices: int, memory: float, sent: float, seconds: float, turns: int = 1) -> Row:
        block = 1e3 * seconds
        return Row(scheme, devices, memory / topology.GIB, sent / 1e6, block, turns * block, 4 * k / seconds)

    def split(devices: int, passes: int, name: str) -> Row:
        mesh = dataclasses.replace(recipe.parallel, context=devices)
        whole = estimate.estimate(dataclasses.replace(recipe, parallel=mesh), "stream", machine(chip, devices))
        sent = whole.traffic * passes / passes_per_block(recipe)
        seconds = 1e-3 * one_pass * passes / devices + sent / all_links
        return row(name, devices, whole.memory, sent, seconds)

    yield row("one device", 1, alone.memory, 0.0, 1e-3 * one_pass * passes_per_block(recipe))
    for devices in (steps, steps + 1):
        # A slice of a TPU has no five chips.
        if recipe.student.num_heads % devices == 0 and (devices == steps or chip not in LINKS):
            yield split(devices, passes_per_block(recipe), f"context {devices}")
    if recipe.causal.context_pass:
        yield split(steps, steps, f"context {steps}, no write pass")
    latents = k * recipe.latent_size[0] * recipe.latent_size[1] * recipe.vae.z_dim * F32
    slots = recipe.causal.window + recipe.causal.sink if recipe.causal.window else recipe.video.latent_frames
    keys = alone.parts["caches"] * k / slots
    own = alone.memory + 2 * latents
    for name, devices, memory, sent, passes in (
        ("steps, noisy keys", steps, own, latents, 1),
        ("steps, estimates", steps, own, latents, 2),
        ("steps, sent keys", steps + 1, own + 2 * keys, latents + keys, 1),
    ):
        yield row(name, devices, memory, sent, 1e-3 * one_pass * passes + sent / one_link, steps)


def markdown(found: Mapping[str, Sequence[Row]]) -> str:
    """Return one line for each scheme, with a column for each chip: block and latency in ms, frames a second."""
    heads = ["scheme", "devices", "memory of one", "sent a block", *(f"{c}: block, latency, frames/s" for c in found)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    schemes = {one.scheme: one for each in found.values() for one in each}
    for scheme, any_chip in schemes.items():
        cells = [scheme, str(any_chip.devices), f"{any_chip.gib:.1f} GiB", f"{any_chip.sent_mb:.4g} MB"]
        for chip, each in found.items():
            one = next((one for one in each if one.scheme == scheme), None)
            fits = one is not None and one.gib * topology.GIB <= topology.CHIPS[chip].memory
            times = f"{one.block_ms:.1f}, {one.latency_ms:.0f}, {one.frames:.1f}" if one else ""
            cells.append(times if fits or one is None else "too large")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Print one table for all chips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan_1_3b", help="a recipe's name or file")
    parser.add_argument("--chips", default="h200,v5p,v6e", help="names separated by commas")
    options = parser.parse_args(arguments)
    recipe, names = load_recipe(options.config), options.chips.split(",")
    unknown = [name for name in names if name not in topology.CHIPS]
    require(not unknown, f"--chips names {', '.join(unknown)}; accepted: {', '.join(topology.CHIPS)}")
    found = {chip: list(rows(recipe, chip)) for chip in names}
    print(markdown(found))
    return found


if __name__ == "__main__":
    main()
