"""Find the fastest mesh of a recipe that fits a machine, by estimating every legal mesh."""

import dataclasses
import itertools
import math
from collections.abc import Container, Iterator

from causvid_jax.analysis import estimate as estimates
from causvid_jax.analysis import flops
from causvid_jax.analysis.topology import TopologySpec
from causvid_jax.config import ConfigError, ParallelConfig, Recipe


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe with a mesh, and its estimate."""

    recipe: Recipe
    estimate: estimates.Estimate
    limit: float  # bytes of a device's memory

    @property
    def fits(self) -> bool:
        """Whether the estimate leaves the margin of a device's memory (``estimate.MARGIN``)."""
        return self.estimate.memory <= estimates.MARGIN * self.limit

    def settings(self, stage: str) -> str:
        """Return the flags that set this candidate's mesh and memory settings."""
        return settings(self.recipe, stage)


def settings(recipe: Recipe, stage: str) -> str:
    """Return the flags that set the mesh of ``recipe`` and the memory settings of ``stage``."""
    mesh = recipe.parallel
    flags = [f"parallel.{n}={getattr(mesh, n)}" for n in ("slices", "data", "fsdp", "context", "tensor")]
    flags = [flag for flag in flags if not flag.endswith("=1")]
    if stage != "stream":
        accumulate = getattr(recipe, f"train_{stage}").accumulate
        flags += [f"train_{stage}.accumulate={accumulate}"] if accumulate > 1 else []
        flags += ["parallel.offload_optimizer=True"] if mesh.offload_optimizer else []
        flags += [f"{role}.remat={getattr(recipe, role).remat}" for role in ("student", "teacher")]
    return " ".join(f"--config.{flag}" for flag in flags)


def without_mesh(parallel: ParallelConfig) -> ParallelConfig:
    """Return ``parallel`` for one device, with its settings other than the axes."""
    return ParallelConfig(offload_optimizer=parallel.offload_optimizer, ring=parallel.ring)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _meshes(recipe: Recipe, stage: str, machine: TopologySpec) -> Iterator[Recipe]:
    """Yield legal meshes: fsdp of 1, of a node or of all; a batch whole, in halves or one example at a time."""
    per_slice = machine.size // machine.slices
    nets = (recipe.student,) if stage == "stream" else (recipe.teacher, recipe.student)
    for tensor, context in itertools.product(_divisors(min(per_slice, 8)), _divisors(min(per_slice, 16))):
        inner = tensor * context
        # All-to-all over context and all-reduce over tensor are too slow across nodes or slices.
        if per_slice % inner or inner > machine.ici_size:
            continue
        if any(n.num_heads % inner or flops.tokens_per_frame(recipe, n) % context for n in nets):
            continue
        rest = per_slice // inner
        fsdps = {1} if stage == "stream" else {1, rest, math.gcd(rest, max(1, machine.ici_size // inner))}
        for fsdp in sorted(fsdps):
            mesh = dataclasses.replace(
                recipe.parallel,
                slices=machine.slices,
                data=rest // fsdp,
                fsdp=fsdp,
                context=context,
                tensor=tensor,
            )
            for one in _accumulated(recipe, stage, machine.slices * rest):
                try:
                    candidate = dataclasses.replace(one, parallel=mesh)
                    if stage != "stream":
                        candidate.check_batch(stage)
                except ConfigError:  # for example a batch of the curriculum that the mesh does not divide
                    continue
                yield candidate


def _accumulated(recipe: Recipe, stage: str, ways: int) -> Iterator[Recipe]:
    if stage == "stream":
        yield recipe
        return
    config = getattr(recipe, f"train_{stage}")
    local, remainder = divmod(config.batch_size, ways)
    if not local or remainder:
        return
    for accumulate in sorted({1, max(d for d in _divisors(local) if d <= max(1, local // 2)), local}):
        yield dataclasses.replace(recipe, **{f"train_{stage}": dataclasses.replace(config, accumulate=accumulate)})


def _policies(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the recipe with remat policies and offloading, from the fastest to that of least memory."""
    for offload in (False, True):
        for remat in ("attention", "full", "offload"):
            yield dataclasses.replace(
                recipe,
                teacher=dataclasses.replace(recipe.teacher, remat=remat),
                student=dataclasses.replace(recipe.student, remat=remat),
                parallel=dataclasses.replace(recipe.parallel, offload_optimizer=offload),
            )


def search(recipe: Recipe, stage: str, machine: TopologySpec, *, too_large: Container[str] = ()) -> Candidate:
    """Return the fastest candidate of ``stage`` that fits ``machine``, or the one of least memory if none fits.

    For training it also chooses ``remat`` and ``offload_optimizer``. Moments are offloaded only if nothing else fits.

    Args:
        recipe: its mesh is ignored.
        stage: "teacher", "init", "distill" or "stream".
        machine: gives the devices, their memory and their links.
        too_large: settings (:meth:`Candidate.settings`) that did not fit when they were compiled; they are skipped.

    Raises:
        ConfigError: no mesh over the devices divides the recipe's sizes.
    """
    least = None
    unsharded = dataclasses.replace(recipe, parallel=without_mesh(recipe.parallel))
    for policy in _policies(unsharded) if stage != "stream" else [unsharded]:
        best = None
        for one in _meshes(policy, stage, machine):
            candidate = Candidate(one, estimates.estimate(one, stage, machine), machine.chip.memory)
            if least is None or candidate.estimate.memory < least.estimate.memory:
                least = candidate
            faster = best is None or sum(candidate.estimate.seconds) < sum(best.estimate.seconds)
            if candidate.fits and faster and candidate.settings(stage) not in too_large:
                best = candidate
        if best is not None:
            return best
    if least is None:
        raise ConfigError(f"no mesh over the {machine.size} devices of {machine.name} divides the recipe's sizes")
    return least
