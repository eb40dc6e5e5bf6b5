"""Which mesh a recipe should have on a machine: legal ones, estimated; the fastest that fits."""

import dataclasses
import itertools
import math
from collections.abc import Container, Iterator

from causvid_jax.analysis import flops
from causvid_jax.analysis import training_memory as estimates
from causvid_jax.analysis.topology import Machine
from causvid_jax.config import ConfigError, ParallelConfig, Recipe

TRAIN = {"teacher": "train_teacher", "init": "train_init", "distill": "train_distill"}
STAGES = ("train_vae", "train_taehv", "train_causal", *TRAIN.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe with its mesh, and what is computed of it."""

    recipe: Recipe
    estimate: estimates.Estimate
    limit: float  # bytes of a device's memory
    given: Recipe  # before the plan

    @property
    def fits(self) -> bool:
        return self.estimate.memory <= estimates.MARGIN * self.limit

    def settings(self, stage: str) -> str:
        """The flags that make this plan of the recipe's file."""
        return settings(self.recipe, self.given, stage)


def settings(recipe: Recipe, given: Recipe, stage: str) -> str:
    """The flags that give ``given`` the mesh of ``recipe``, and to ``stage`` what of its memory can be chosen."""
    mesh = recipe.parallel
    flags = [f"parallel.{n}={getattr(mesh, n)}" for n in ("slices", "data", "fsdp", "context", "tensor")]
    flags = [flag for flag in flags if not flag.endswith("=1")]
    ways = mesh.slices * mesh.data * mesh.fsdp
    for name in STAGES:  # every stage's batch must be divided, the others' too
        config = getattr(given, name)
        if name != TRAIN.get(stage) and config.batch_size % (ways * config.accumulate):
            flags += [f"{name}.batch_size={ways}"]
    if stage in TRAIN:
        accumulate = getattr(recipe, TRAIN[stage]).accumulate
        flags += [f"{TRAIN[stage]}.accumulate={accumulate}"] if accumulate > 1 else []
        flags += ["parallel.offload_optimizer=True"] if mesh.offload_optimizer else []
        flags += [f"{role}.remat={getattr(recipe, role).remat}" for role in ("student", "teacher")]
    return " ".join(f"--config.{flag}" for flag in flags)


def without_mesh(parallel: ParallelConfig) -> ParallelConfig:
    """``parallel`` for one device: what is no axis stays."""
    return ParallelConfig(offload_optimizer=parallel.offload_optimizer, ring=parallel.ring)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _meshes(recipe: Recipe, stage: str, machine: Machine) -> Iterator[Recipe]:
    """Legal meshes: no, little or all fsdp beside context and tensor; a batch whole or in its smallest parts."""
    per_slice = machine.size // machine.slices
    nets = (recipe.teacher, recipe.student) if stage in TRAIN else (recipe.student,)
    for tensor, context in itertools.product(_divisors(min(per_slice, 8)), _divisors(min(per_slice, 16))):
        inner = tensor * context
        # Exchanging tokens for heads, or sums over tensor, on anything but the fast links is not worth a thought.
        if per_slice % inner or inner > machine.near:
            continue
        if any(n.num_heads % inner or flops.tokens_per_frame(recipe, n) % context for n in nets):
            continue
        rest = per_slice // inner
        fsdps = {1} if stage == "stream" else {1, rest, math.gcd(rest, max(1, machine.near // inner))}
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
                    yield dataclasses.replace(one, parallel=mesh)
                except ConfigError:  # a stage of another batch that the mesh does not divide, or the like
                    continue


def _accumulated(recipe: Recipe, stage: str, ways: int) -> Iterator[Recipe]:
    # Stages that are not asked about must not stand in a mesh's way.
    quiet = {
        name: dataclasses.replace(getattr(recipe, name), batch_size=ways, accumulate=1, curriculum=())
        for name in STAGES
        if name != TRAIN.get(stage)
    }
    if stage == "stream":
        yield dataclasses.replace(recipe, **quiet)
        return
    config = getattr(recipe, TRAIN[stage])
    local, left = divmod(config.batch_size, ways)
    if not local or left:
        return
    for accumulate in sorted({1, max(d for d in _divisors(local) if d <= max(1, local // 2)), local}):
        stages = quiet | {TRAIN[stage]: dataclasses.replace(config, accumulate=accumulate)}
        yield dataclasses.replace(recipe, **stages)


def _policies(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe as it would be fastest, then with less and less memory: what a layer keeps, where moments lie."""
    for offload in (False, True):
        for remat in ("attention", "full", "offload"):
            yield dataclasses.replace(
                recipe,
                teacher=dataclasses.replace(recipe.teacher, remat=remat),
                student=dataclasses.replace(recipe.student, remat=remat),
                parallel=dataclasses.replace(recipe.parallel, offload_optimizer=offload),
            )


def plan(
    recipe: Recipe, stage: str, machine: Machine, *, policies: bool = True, too_large: Container[str] = ()
) -> Plan:
    """The fastest plan of ``stage`` that fits ``machine``, or, where none does, the one of the least memory.

    ``policies``: also choose ``remat`` and ``offload_optimizer``, moving moments only where nothing else fits.
    ``too_large``: settings (:meth:`Plan.settings`) that a compiler has found not to fit, whatever is estimated.
    """
    least = None
    alone = dataclasses.replace(recipe, parallel=without_mesh(recipe.parallel))
    for base in _policies(alone) if policies and stage != "stream" else [alone]:
        best = None
        for one in _meshes(base, stage, machine):
            found = Plan(one, estimates.estimate(one, stage, machine), machine.chip.memory, recipe)
            if least is None or found.estimate.memory < least.estimate.memory:
                least = found
            faster = best is None or sum(found.estimate.seconds) < sum(best.estimate.seconds)
            if found.fits and faster and found.settings(stage) not in too_large:
                best = found
        if best is not None:
            return best
    if least is None:
        raise ConfigError(f"no mesh over the {machine.size} devices of {machine.name} divides the recipe's sizes")
    return least
