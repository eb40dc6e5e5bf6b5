"""What is measured, on random weights, and whether it can be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.analysis import bench_codecs as codecs
from causvid_jax.analysis import devices, sampling_memory
from causvid_jax.config import Recipe, require
from causvid_jax.models import attention, transformer


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
      repeats: timed calls of each program; a fourth of them, at least 3, of clips and first frames.
      streams: videos side by side.
      codecs: which decoders, of ``codecs.NAMES``.
      weights: ``"compute"`` keeps kernels in the type they are multiplied in, ``"float32"`` all in float32.
    """

    repeats: int = 20
    streams: int = 1
    codecs: tuple[str, ...] = codecs.NAMES
    weights: str = "compute"

    def __post_init__(self) -> None:
        require(self.repeats >= 2, f"--repeats is {self.repeats}; it must be at least 2")
        require(self.streams >= 1, f"--streams is {self.streams}; it must be at least 1")
        accepted = ("compute", "float32")
        require(self.weights in accepted, f"--weights is {self.weights!r}; accepted: {', '.join(accepted)}")
        require(len(set(self.codecs)) == len(self.codecs), f"--codecs names {self.codecs} twice; give each once")

    @property
    def few(self) -> int:
        return max(3, self.repeats // 4)


def lengths(recipe: Recipe) -> list[tuple[int, int]]:
    """(frames before a block, frames it sees) of every block of K frames until the cache is full."""
    causal, k = recipe.causal, recipe.causal.frames_per_block
    first = int(causal.independent_first_frame)
    last = causal.window + causal.sink + first if causal.window else recipe.video.latent_frames - k
    found: dict[int, int] = {}
    for start in range(first, last + 1, k):
        seen = sum(b - a for a, b in attention.visible_frames(start + k, causal))
        found.setdefault(seen, start)
    return [(start, seen) for seen, start in found.items()]


def abstract_weights(recipe: Recipe, plan: Plan) -> Any:
    """Shapes and stored types of the student's parameters."""
    make = transformer.inference if plan.weights == "compute" else transformer.abstract
    return make(recipe.student)


def random_weights(abstract: Any, seed: int = 0) -> Any:
    """Scales 1, biases 0, the rest N(0, 0.02^2), of the given shapes and types, made on the device."""

    def make() -> Any:
        flat, structure = jax.tree_util.tree_flatten_with_path(abstract)
        # XLA's own generator: a threefry for every array would take longer to compile than all else here.
        keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(flat))
        leaves = []
        for key, (path, leaf) in zip(keys, flat, strict=True):
            if path[-1].key in ("scale", "gamma", "bias"):
                leaves.append(jnp.full(leaf.shape, path[-1].key != "bias", leaf.dtype))
            else:
                leaves.append((0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype))
        return jax.tree.unflatten(structure, leaves)

    return jax.jit(make)()


def check(recipe: Recipe, plan: Plan) -> list[codecs.Codec]:
    """The plan's codecs, after proof that all can fit the device.

    Raises:
        ConfigError: what cannot work.
    """
    made = [codecs.make(name, recipe, plan.streams) for name in plan.codecs]
    for variant in (recipe, *(c.recipe for c in made)):
        needed = sampling_memory.plan(
            variant, "student", batch=plan.streams, latents=recipe.video.latent_frames, prompts=0
        )
        sampling_memory.check(needed, devices.memory_limit())
    return made


def settings(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What was measured, in words that stand in every line."""
    causal, net = recipe.causal, recipe.student
    sink = f" + sink {causal.sink}" if causal.sink else ""
    write = " + write" if causal.context_pass else ""
    return {
        "recipe": recipe.name,
        "resolution": f"{recipe.video.height}x{recipe.video.width}",
        "streams": plan.streams,
        "frames_per_block": causal.frames_per_block,
        "window": f"{causal.window}{sink}" if causal.window else f"{recipe.video.latent_frames}",
        "steps": f"{len(recipe.diffusion.denoising_timesteps)}{write}",
        "precision": net.dtype if net.precision == "default" else f"{net.dtype}, rounded as {net.precision}",
        "attention": attention.resolve(net.attention, net.dtype),
    }
