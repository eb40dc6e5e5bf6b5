"""Compile a recipe's real sharded programs for a machine that is not at hand, and say whether they fit.

What the compiler knows exactly is reported as it is: memory per device and the collectives in the program. It does not
know speed; the step time is a roofline from analytic FLOPs (:mod:`causvid_jax.parallel.flops`) and published peaks.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from causvid_jax.config import Recipe, require
from causvid_jax.models import transformer
from causvid_jax.models.params import abstract_tree
from causvid_jax.parallel import flops, hlo
from causvid_jax.parallel.mesh import make_mesh
from causvid_jax.parallel.shardings import Placement, batch_sharding
from causvid_jax.parallel.topology import GIB, Topology
from causvid_jax.streaming.stream import latent_size
from causvid_jax.training import steps

STAGES = ("teacher", "init", "distill", "stream")
EFFICIENCY = (0.35, 0.6)
"""Share of peak FLOP/s that well-sharded transformers of these sizes reach: pessimistic, optimistic."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compilation says.

    Attributes:
      topology: its name.
      devices: how many.
      mesh: axis sizes.
      compile_seconds: on this host.
      arguments, temporaries, peak, limit: bytes per device; ``peak`` is the compiler's own figure.
      collectives: :func:`hlo.totals`.
      model_flops: of one step over all devices.
      step_seconds: pessimistic and optimistic.
      mfu: model FLOPs over peak in these times.
    """

    topology: str
    devices: int
    mesh: Mapping[str, int]
    compile_seconds: float
    arguments: int
    temporaries: int
    peak: int
    limit: float
    collectives: Mapping[str, Mapping[str, int]]
    model_flops: float
    step_seconds: tuple[float, float]
    mfu: tuple[float, float]

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes of ``tree`` that say where they lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _network(spec: Any, shardings: Any) -> Any:
    return _placed(abstract_tree(spec), shardings)


def _training_program(recipe: Recipe, stage: str, place: Placement) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step and abstract arguments of a training stage."""
    if stage == "distill":
        null_text = np.zeros((recipe.text.length, recipe.text.dim), np.float32)
        step = steps.distill_step(recipe, place, null_text)
    else:
        step = (steps.teacher_step if stage == "teacher" else steps.init_step)(recipe, place)
    rules = recipe.student.rules
    starts = [_network(spec, place.params(spec, rules)) for spec in step.starts]
    state = _placed(jax.eval_shape(step.init, *starts), step.layout)
    frozen = [_network(spec, place.params(spec, recipe.teacher.rules)) for spec in step.frozen]
    assert place.mesh is not None
    split = batch_sharding(place.mesh, place.rules, step.leading)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=split) for k, v in step.batch.items()}
    return step.update, (state, *frozen, batch)


def _stream_program(recipe: Recipe, place: Placement, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """One denoising pass of the streaming student at a full window, with bfloat16 weights, and its arguments."""
    net, causal = recipe.student, recipe.causal
    height, width = latent_size(recipe)
    spec = transformer.spec(net)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(net.dtype), sharding=x.sharding),
        _network(spec, place.params(spec, net.rules)),
    )
    make_cache = functools.partial(
        transformer.init_cache,
        net,
        causal,
        batch=batch,
        height=height,
        width=width,
        frames=None if causal.window else recipe.video.latent_frames,
    )
    assert place.mesh is not None
    whole = NamedSharding(place.mesh, PartitionSpec())
    split = NamedSharding(place.mesh, transformer.cache_spec(net, batch, place.mesh))
    cache = jax.eval_shape(make_cache)
    cache = dataclasses.replace(
        _placed(cache, jax.tree.map(lambda _: whole, cache)),
        k=jax.ShapeDtypeStruct(cache.k.shape, cache.k.dtype, sharding=split),
        v=jax.ShapeDtypeStruct(cache.v.shape, cache.v.dtype, sharding=split),
    )
    rows = jax.ShapeDtypeStruct((batch, recipe.text.length, recipe.text.dim), jnp.float32, sharding=whole)
    encoded = jax.eval_shape(functools.partial(transformer.encode_text, config=net), params, rows)
    text = _placed(encoded, jax.tree.map(lambda _: whole, encoded))
    k = causal.frames_per_block
    x = jax.ShapeDtypeStruct((batch, k, height, width, recipe.vae.z_dim), jnp.float32, sharding=whole)
    timestep = jax.ShapeDtypeStruct((batch, k), jnp.float32, sharding=whole)

    @functools.partial(jax.jit, donate_argnums=4)
    def one_pass(params, x, timestep, text, cache):
        return transformer.cached(params, x, timestep, text, cache, config=net, causal=causal)

    return one_pass, (params, x, timestep, text, cache)


def program(recipe: Recipe, stage: str, mesh: Mesh, *, batch: int = 1) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function of ``stage`` and abstract arguments that lie on ``mesh``; ``batch`` streams for "stream"."""
    require(stage in STAGES, f"stage is {stage!r}; accepted: {', '.join(STAGES)}")
    place = Placement(mesh, recipe.student.rules)
    return _stream_program(recipe, place, batch) if stage == "stream" else _training_program(recipe, stage, place)


def compile_for(recipe: Recipe, stage: str, topology: Topology) -> Report:
    """Compile ``stage`` of ``recipe`` on the mesh of ``recipe.parallel`` over ``topology``.

    Raises:
        ConfigError: a mesh that does not fit the devices.
        RuntimeError: the compiler's own refusal; a program that is too large for the device is one
            ("RESOURCE_EXHAUSTED").
    """
    mesh = make_mesh(recipe.parallel, topology.devices)
    function, arguments = program(recipe, stage, mesh)
    start = time.perf_counter()
    # The abstract mesh only: with the mesh itself, constants would be made on devices that are not there.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = function.lower(*arguments)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    work = flops.StepFlops(flops.stream_block(recipe)) if stage == "stream" else flops.training_step(recipe, stage)
    peak_rate = topology.chip.flops * len(topology.devices)
    times = tuple((work.model + work.recomputed) / (peak_rate * share) for share in EFFICIENCY)
    return Report(
        topology=topology.name,
        devices=len(topology.devices),
        mesh=dict(mesh.shape),
        compile_seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        limit=topology.chip.memory,
        collectives=hlo.totals(text),
        model_flops=work.model,
        step_seconds=(times[0], times[1]),
        mfu=(work.model / (peak_rate * times[0]), work.model / (peak_rate * times[1])),
    )


def table(report: Report) -> str:
    """The report in lines to read."""
    per = {name: size for name, size in report.mesh.items() if size > 1}
    mesh = " x ".join(f"{n} {s}" for n, s in per.items()) or "one device"
    lines = [
        f"{report.topology}: {report.devices} devices, mesh {mesh}, compiled in {report.compile_seconds:.0f} s",
        f"memory per device: arguments {report.arguments / GIB:.2f} GiB, temporaries {report.temporaries / GIB:.2f}, "
        f"peak {report.peak / GIB:.2f} of {report.limit / GIB:.2f}: {'fits' if report.fits else 'does NOT fit'}",
    ]
    for kind, entry in sorted(report.collectives.items()):
        lines.append(
            f"{kind}: {entry['count']} in loops, {entry['bytes'] / 2**20:.1f} MiB a turn; "
            f"{entry['count_once']} outside, {entry['bytes_once'] / 2**20:.1f} MiB"
        )
    slow, fast = report.step_seconds
    lines.append(
        f"{report.model_flops / 1e12:.3g} TFLOP of model work a step; at {EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of "
        f"peak (an assumption) {fast:.3g} to {slow:.3g} s, MFU {report.mfu[0]:.0%} to {report.mfu[1]:.0%}"
    )
    return "\n".join(lines)
