"""Compile a recipe's sharded programs ahead of time for a described machine, and report whether they fit.

Memory per device and collectives are the compiler's own figures. The compiler does not predict speed; the step time is
a roofline from analytic FLOPs and traffic (:mod:`causvid_jax.analysis.estimate`).
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from causvid_jax.analysis import estimate, hlo
from causvid_jax.analysis.topology import Topology, TopologySpec
from causvid_jax.config import Recipe, require
from causvid_jax.config.files import format_bytes
from causvid_jax.models import experts, transformer
from causvid_jax.models.kv_cache import TEXT_AXES, axes_of
from causvid_jax.models.transformer_spec import block_spec, outer_spec
from causvid_jax.sampling import stream
from causvid_jax.sharding import constraints
from causvid_jax.sharding.mesh import make_mesh
from causvid_jax.sharding.placement import Placement, batch_sharding
from causvid_jax.training import dmd, flow_matching, ode
from causvid_jax.training.update import abstract_network, with_shardings

STAGES = ("teacher", "init", "distill", "stream")


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory, collectives and time of one stage on one machine.

    Attributes:
        topology: the machine's name.
        devices: their number.
        mesh: axis sizes.
        compiled: whether the memory comes from the compiler or is computed from shapes
            (:mod:`causvid_jax.analysis.estimate`).
        compile_seconds: processor time of this process; 0 if nothing was compiled.
        quick: whether the program was compiled with the least optimisation (:func:`compile_for`).
        arguments, temporaries, peak, limit: bytes per device; ``peak`` is the compiler's own figure.
        host: bytes of the host's memory per device; offloaded moments of a described GPU are computed.
        collectives: by kind, of :func:`causvid_jax.analysis.hlo.totals`.
        model_flops: of one step over all devices; of one block of ``streams`` streams.
        step_seconds: of one step or block by the roofline: pessimistic, optimistic.
        mfu: model FLOPs over the FLOPs at peak rate in these times, in [0, 1].
        traffic: computed bytes that one device receives in a step.
        parts: the computed memory by kind of array.
        streams: number of parallel streams; 0 in training.
    """

    topology: str
    devices: int
    mesh: Mapping[str, int]
    compiled: bool
    compile_seconds: float
    arguments: int
    temporaries: int
    peak: int
    limit: float
    host: int
    collectives: Mapping[str, Mapping[str, int]]
    model_flops: float
    step_seconds: tuple[float, float]
    mfu: tuple[float, float]
    traffic: float
    parts: Mapping[str, float]
    streams: int = 0
    quick: bool = False

    @property
    def fits(self) -> bool:
        """Whether the program fits a device; a computed program must leave a margin."""
        return self.peak <= self.limit * (1.0 if self.compiled else estimate.MARGIN)


def _training_program(recipe: Recipe, stage: str, place: Placement) -> tuple[Any, tuple[Any, ...]]:
    """Return the train step that the stage runs, and its abstract arguments."""
    assert place.mesh is not None
    if stage == "distill":
        optimizers = dmd.make_optimizers(recipe.train_distill)
        student, critic, teacher = (
            abstract_network(spec, place, net.rules)
            for net, spec in (
                (recipe.student, transformer.spec(recipe.student)),
                (recipe.fake_score, dmd.critic_spec(recipe)),
                (recipe.teacher, transformer.spec(recipe.teacher)),
            )
        )
        teacher = experts.per_expert(teacher, recipe.experts)
        init = functools.partial(dmd.new_state, recipe=recipe, optimizers=optimizers)
        state = with_shardings(jax.eval_shape(init, student, critic), dmd.state_shardings(recipe, place, optimizers))
        batch = _abstract_batch(dmd.batch_shapes(recipe), place, leading=1)
        negative_prompt_embeds = jax.ShapeDtypeStruct(
            (recipe.text.length, recipe.text.dim), jnp.float32, sharding=place.replicated()
        )
        return dmd.compiled_step(recipe, place), (state, teacher, batch, negative_prompt_embeds)
    if stage == "teacher":
        net, step, shapes = (
            recipe.teacher,
            flow_matching.teacher_step(recipe, place),
            flow_matching.batch_shapes(recipe),
        )
    else:
        net, step, shapes = recipe.student, ode.init_step(recipe, place), ode.batch_shapes(recipe)
    params = abstract_network(transformer.spec(net), place, net.rules)
    state = with_shardings(jax.eval_shape(step.init, params), step.shardings)
    return step.train_step, (state, _abstract_batch(shapes, place))


def _abstract_batch(shapes: dict[str, jax.ShapeDtypeStruct], place: Placement, leading: int = 0) -> Any:
    """Return a batch's shapes, split over the mesh; the batch axis comes after ``leading`` axes."""
    assert place.mesh is not None
    split = batch_sharding(place.mesh, place.rules, leading)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for name, x in shapes.items()}


def _stream_program(recipe: Recipe, place: Placement, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """Return one denoising pass of the streaming student at a full window, and its arguments.

    Parameters have the types in which a stream holds them, :func:`transformer.inference`.
    """
    net, causal = recipe.student, recipe.causal
    height, width = recipe.latent_size
    outer, layer = outer_spec(net), block_spec(net)
    spec = {**outer, "blocks": (layer,) * net.num_layers}

    placed = abstract_network(spec, place, net.rules)
    types = transformer.inference(net, unstacked=True)
    params = jax.tree.map(lambda x, kind: jax.ShapeDtypeStruct(x.shape, kind.dtype, sharding=x.sharding), placed, types)
    mesh = place.mesh
    assert mesh is not None
    whole, streams = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh, place.rules)

    def split(x: Any, axes: constraints.Axes) -> NamedSharding:
        return NamedSharding(mesh, constraints.spec_for(axes, x.shape, constraints.axis_sizes(mesh), net.rules))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the form of the cache depends on the platform
        state = stream.abstract_state({"student": params}, recipe, batch)
    text = with_shardings(state.text, jax.tree.map(lambda x: split(x, TEXT_AXES[-x.ndim :]), state.text))
    where = jax.tree.map(lambda x: split(x, axes_of(x.ndim)) if x.ndim > 1 else whole, state.cache)
    cache = with_shardings(state.cache, where)
    k = causal.frames_per_block
    x = jax.ShapeDtypeStruct((batch, k, height, width, recipe.vae.z_dim), jnp.float32, sharding=streams)
    timestep = jax.ShapeDtypeStruct((batch, k), jnp.float32, sharding=streams)

    # A pass does not read the text embedding's parameters, but they occupy the devices.
    @functools.partial(jax.jit, donate_argnums=4, keep_unused=True)
    def one_pass(params: Any, x: Any, timestep: Any, text: Any, cache: Any) -> Any:
        return transformer.cached(params, x, timestep, text, cache, config=net, causal=causal)

    return one_pass, (params, x, timestep, text, cache)


def program(recipe: Recipe, stage: str, mesh: Mesh, *, batch: int = 1) -> tuple[Any, tuple[Any, ...]]:
    """Return the jitted function of ``stage`` (one of :data:`STAGES`) and its abstract arguments on ``mesh``.

    The function is the train step that the stage runs, or one denoising pass of ``batch`` streams at a full window.

    Raises:
        ConfigError: an unknown stage.
    """
    require(stage in STAGES, f"stage is {stage!r}; accepted: {', '.join(STAGES)}")
    place = Placement(mesh, recipe.student.rules, recipe.parallel.offload_optimizer)
    return _stream_program(recipe, place, batch) if stage == "stream" else _training_program(recipe, stage, place)


def lower_block(recipe: Recipe, machine: Topology | None = None, *, unstacked: bool = True) -> jax.stages.Lowered:
    """Lower ``stream.next_block`` of one stream for one device of ``machine``; None: for the default device."""

    def arguments() -> tuple[Any, stream.StreamState]:
        params = {"student": transformer.inference(recipe.student, unstacked=unstacked)}
        state = stream.abstract_state(params, recipe, 1)
        return params, dataclasses.replace(state, decode=cast(Any, None))  # nothing is decoded

    if machine is None:
        return stream.next_block.lower(*arguments(), config=recipe)
    mesh = Mesh(machine.devices[:1], "x")
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_matmul_precision("default"):
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments())
        return stream.next_block.lower(*placed, config=recipe)


def options(machine: TopologySpec) -> Any:
    """Return the compiler options for programs of ``machine``."""
    return dict(_OPTIONS.get(machine.chip.platform, {}))


def estimate_for(recipe: Recipe, stage: str, machine: TopologySpec) -> Report:
    """Report the estimate of ``stage`` on ``machine``, without a compiler.

    Raises:
        ConfigError: a mesh that does not fit the devices.
    """
    estimated = estimate.estimate(recipe, stage, machine)
    peak_rate, seconds = machine.chip.flops * machine.size, estimated.seconds
    return Report(
        topology=machine.name,
        devices=machine.size,
        mesh=estimate.make_mesh(recipe.parallel, machine).axes,
        compiled=False,
        compile_seconds=0.0,
        arguments=0,
        temporaries=0,
        peak=round(estimated.memory),
        limit=machine.chip.memory,
        host=round(estimated.host),
        collectives={},
        model_flops=estimated.work.model,
        step_seconds=seconds,
        mfu=(estimated.work.model / (peak_rate * seconds[0]), estimated.work.model / (peak_rate * seconds[1])),
        traffic=estimated.traffic,
        parts={name: size for name, size in estimated.parts.items() if size},
        streams=estimated.streams,
    )


_OPTIONS = {
    # XLA chooses the tiles of Triton's matrix products by timing. Without a device it takes any fitting tiles, and it
    # fails for operands of odd shapes (42 timesteps). cuBLAS works for all shapes.
    "cuda": {"xla_gpu_enable_triton_gemm": False},
}
"""Compiler options by platform."""


_QUICK = {"optimization_level": 9}
"""XLA's level O0. On TPU it takes a seventh of the time, because scheduling and fusion take most of it."""


def _offloaded(recipe: Recipe, stage: str, machine: TopologySpec) -> tuple[int, int]:
    """Return the bytes of a described GPU's moments on the host, and of those in transfer; 0 without offload.

    JAX has no host memory for a GPU known only by topology, so offloaded moments are compiled as if they were on the
    device. The caller subtracts their bytes and adds the buffers in transfer.
    """
    in_transfer = estimate.estimate(recipe, stage, machine).parts.get("moments in transfer", 0)
    if not in_transfer:
        return 0, 0
    here = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, offload_optimizer=False))
    return round(estimate.estimate(here, stage, machine).parts["moments"]), round(in_transfer)


def compile_for(recipe: Recipe, stage: str, topology: Topology, *, quick: bool = False) -> Report:
    """Compile ``stage`` of ``recipe`` on the mesh of ``recipe.parallel`` over ``topology``.

    ``quick`` compiles with the least optimisation. Memory hardly changes (docs/scaling.md has figures), but collectives
    are not merged: there are more and smaller ones.

    Raises:
        ConfigError: a mesh that does not fit the devices.
        RuntimeError: the compiler's error, for example of a program that is too large for the device
            ("RESOURCE_EXHAUSTED").
    """
    machine, on_gpu = topology.machine, topology.machine.chip.platform == "cuda"
    estimated = estimate_for(recipe, stage, machine)
    mesh = make_mesh(recipe.parallel, topology.devices)
    function, arguments = program(recipe, stage, mesh, batch=max(estimated.streams, 1))
    start = time.process_time()
    # Use the abstract mesh; with the mesh itself, JAX would put constants on devices that do not exist.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = function.lower(*arguments)
    compiled = lowered.compile(options(machine) | (_QUICK if quick else {}))
    seconds = time.process_time() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    moved, in_transfer = _offloaded(recipe, stage, machine) if on_gpu else (0, 0)
    # The peak that XLA reports for GPUs does not include arguments.
    peak_bytes = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        - moved
        + in_transfer
    )
    return dataclasses.replace(
        estimated,
        compiled=True,
        compile_seconds=seconds,
        quick=quick,
        arguments=memory.argument_size_in_bytes - moved,
        temporaries=memory.temp_size_in_bytes + in_transfer,
        peak=peak_bytes if on_gpu else memory.peak_memory_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes + moved,
        collectives=hlo.totals(text),
    )


_FLOPS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP"))
_SECONDS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Format ``value`` to three digits, in the largest unit of which it has at least one, else in the smallest."""
    size, unit = next((u for u in units if abs(value) >= u[0]), units[-1])
    return f"{float(f'{value / size:.3g}'):g} {unit}"


def readable_seconds(value: float) -> str:
    """Format seconds: ``1.2 s``, ``35 ms``, ``3.5 h``."""
    return _scaled(value, _SECONDS)


def _size(value: float) -> str:
    """Return bytes for people."""
    return format_bytes(round(value))


def table(report: Report) -> str:
    """Return the report as lines of text: memory, host memory, collectives, time and MFU."""
    per = {name: size for name, size in report.mesh.items() if size > 1}
    mesh = " x ".join(f"{n} {s}" for n, s in per.items()) or "one device"
    fits = "fits" if report.fits else "does NOT fit"
    how = (
        f"compiled {'quickly ' if report.quick else ''}in {readable_seconds(report.compile_seconds)} of processor time"
        if report.compiled
        else ("computed from shapes, NOT compiled")
    )
    lines = [f"{report.topology}: {report.devices} devices, mesh {mesh}, {how}"]
    if report.compiled:
        parts = f"arguments {_size(report.arguments)}, temporaries {_size(report.temporaries)}"
    else:
        parts = ", ".join(f"{name} {_size(value)}" for name, value in report.parts.items())
    lines.append(f"memory per device: {parts}; peak {_size(report.peak)} of {_size(report.limit)}: {fits}")
    if report.host:
        lines.append(f"memory of the host, per device: {_size(report.host)}")
    for kind, entry in sorted(report.collectives.items()):
        lines.append(
            f"{kind}: {entry['count']} in loops, {_size(entry['bytes'])} a turn; "
            f"{entry['count_once']} outside, {_size(entry['bytes_once'])}"
        )
    what = f"a block of {report.streams} streams" if report.streams else "a step"
    slow, fast = report.step_seconds
    low, high = estimate.EFFICIENCY
    lines.append(
        f"{_scaled(report.model_flops, _FLOPS)} of model work {what}; by roofline, an assumption and no measurement, "
        f"{readable_seconds(fast)} (work at {high:.0%} of peak, {_size(report.traffic)} of traffic a device behind it) "
        f"to {readable_seconds(slow)} ({low:.0%}, traffic on top): MFU {report.mfu[0]:.0%} to {report.mfu[1]:.0%}"
    )
    return "\n".join(lines)
