"""Estimate memory, traffic and time of a stage on a described machine, from shapes, without compiling or measuring.

Memory of one device is the sum of all arrays that are live at once. For a step of distillation it is that of the part
with most memory. The arrays are:

- parameters, moments, EMA and gradients as the sharding rules split them (exact);
- arrays that the layers keep for the backward pass by ``remat`` (exact for "full", "attention" and "offload");
- caches (exact);
- the temporary arrays of one layer (formulas meant to be too large rather than too small: :meth:`Network.working` for
  backward passes, :func:`memory.layer_work` for others).

Prefer a compiled figure if there is one; tests/analysis/test_estimate.py compares both.

With LoRA (``training.stages.with_lora``) moments, EMA and gradients are those of the adapters. FLOPs are counted as if
all weights were trained, so time is an upper bound.

Time is a roofline. Compute runs at 35% to 60% of the peak, traffic between devices at the full rate of its links. The
lower bound overlaps all traffic with compute, the upper bound none.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from causvid_jax.analysis import flops, memory
from causvid_jax.analysis.topology import TopologySpec
from causvid_jax.config import OptimizerConfig, ParallelConfig, Recipe, ShardingRules, TransformerConfig
from causvid_jax.models import adapters, transformer
from causvid_jax.sampling.schedule import passes_per_block
from causvid_jax.sharding import constraints
from causvid_jax.sharding.mesh import mesh_sizes
from causvid_jax.sharding.params import ParamSpec
from causvid_jax.training import dmd_scores, optimizers

EFFICIENCY = (0.35, 0.6)
"""Share of peak FLOP/s that well-sharded transformers of these sizes reach: pessimistic, optimistic."""
INT8_RATE = 2.0
"""Peak rate of int8 products over that of bfloat16, of every chip of ``topology.CHIPS`` by its data sheet."""
MARGIN = 0.9
"""Fraction of device memory that an estimate may use; the rest covers what it omits."""
F32 = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory of one device and time of a step.

    Attributes:
        parts: bytes in the device's memory, by name of the arrays.
        host: bytes in the host's memory, per device.
        work: FLOPs over all devices.
        traffic: bytes that one device receives from others.
        seconds: of one step (of one block, for a stream): pessimistic, optimistic.
        streams: number of parallel streams; 0 in training.
    """

    parts: Mapping[str, float]
    host: float
    work: flops.StepFlops
    traffic: float
    seconds: tuple[float, float]
    streams: int = 0

    @property
    def memory(self) -> float:
        """Bytes in the device's memory."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class _Mesh:
    """Sizes of the mesh axes, with slices counted in ``data``, and the machine."""

    data: int
    fsdp: int
    context: int
    tensor: int
    machine: TopologySpec

    @property
    def axes(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}

    @property
    def ways(self) -> int:
        return self.data * self.fsdp

    @property
    def gather_rate(self) -> float:
        """Bytes a second at which a device receives the parameters of its fsdp group."""
        chip, ici_size = self.machine.chip, self.machine.ici_size
        crosses_dcn = self.fsdp * self.context * self.tensor > ici_size
        # Every node or slice receives all data once, through the ports of all its devices.
        return min(chip.ici_bandwidth, chip.dcn_bandwidth * ici_size) if crosses_dcn else chip.ici_bandwidth


def make_mesh(config: ParallelConfig, machine: TopologySpec) -> _Mesh:
    """Return the mesh of ``config`` on ``machine``.

    Raises:
        ConfigError: a mesh that does not fit the devices.
    """
    data, fsdp, context, tensor = mesh_sizes(config, machine.size)
    return _Mesh(data * config.slices, fsdp, context, tensor, machine)


def param_bytes(spec: Any, mesh: Mapping[str, int], rules: ShardingRules, types: Any = None) -> float:
    """Return the bytes of the parameters ``spec`` on one device of ``mesh``, in the types of the tree ``types``.

    None: in float32.
    """
    leaves = jax.tree.leaves(spec, is_leaf=lambda x: isinstance(x, ParamSpec))
    sizes = [F32] * len(leaves) if types is None else [x.dtype.itemsize for x in jax.tree.leaves(types)]

    def one(leaf: ParamSpec, size: int) -> float:
        split = constraints.mesh_axes(leaf.axes, leaf.shape, mesh, rules)
        return math.prod(leaf.shape) * size / math.prod(mesh[a] for part in split for a in part)

    return sum(one(leaf, size) for leaf, size in zip(leaves, sizes, strict=True))


@functools.cache
def _sizes(net: TransformerConfig, axes: tuple[tuple[str, int], ...]) -> tuple[float, float, float, float, float]:
    """Return bytes on one device: parameters, layers gathered along fsdp; trained: all, largest array, kernels."""
    spec, mesh = transformer.spec(net), dict(axes)
    trained = adapters.split(spec)[0]
    leaves = jax.tree_util.tree_leaves_with_path(trained, is_leaf=lambda x: isinstance(x, ParamSpec))
    return (
        param_bytes(spec, mesh, net.rules),
        param_bytes(spec["blocks"], mesh | {"fsdp": 1}, net.rules),
        param_bytes(trained, mesh, net.rules),
        max(param_bytes(leaf, mesh, net.rules) for _, leaf in leaves),
        param_bytes([leaf for path, leaf in leaves if optimizers.is_layer_kernel(path)], mesh, net.rules),
    )


def _item(net: TransformerConfig) -> int:
    return 2 if net.dtype == "bfloat16" else F32


class Network:
    """Bytes of one network on one device of a mesh, per local example.

    Attributes:
        params: bytes of all parameters, in float32.
        layers_whole: bytes of all layers, gathered along fsdp.
        updated: bytes of the trained parameters; with LoRA those of the adapters.
        largest: bytes of the largest trained array.
        kernels: bytes of the trained kernels of layers.
        gathered: bytes of the layers gathered along fsdp that are alive at once.
        gpu_mesh: whether the device is one of several GPUs, on which programs keep more.
        frame: tokens of one latent frame on this device.
    """

    def __init__(self, net: TransformerConfig, recipe: Recipe, mesh: _Mesh):
        self.net, self.mesh, self.recipe = net, mesh, recipe
        sizes = _sizes(dataclasses.replace(net, remat="none"), tuple(mesh.axes.items()))
        self.params, self.layers_whole, self.updated, self.largest, self.kernels = sizes
        # The current layer and the next one or its gradient, in float32 as gathered and in the type of the matmuls.
        whole = 2 * self.layers_whole / net.num_layers * (F32 + _item(net)) / F32
        self.gathered = whole if mesh.fsdp > 1 else 0.0
        # On a mesh of GPUs, layers keep the result of attention twice: as cuDNN returns it, and under its name.
        self.gpu_mesh = mesh.machine.chip.platform == "cuda" and mesh.machine.size > 1
        self.frame = flops.tokens_per_frame(recipe, net) / mesh.context

    def _kept(self, frames: float, remat: str) -> float:
        """Return the bytes that one layer keeps for its backward pass, for one example."""
        net, tensor, tokens = self.net, self.mesh.tensor, frames * self.frame
        m, p = net.dim, net.ffn_dim
        attention = (_item(net) * m + F32 * net.num_heads) / tensor
        products = F32 * (4 * m / tensor + 3 * m + p / tensor)  # q, k, v, q; o, o, fc2; fc1
        # Also norms, rotations, modulations and activations, roughly.
        rest = F32 * (14 * m + 2 * p / tensor)
        own = F32 * m
        return (
            tokens
            * {
                "offload": 0.0,
                "full": own,
                "attention": own + attention,
                "dots": own + attention + products,
                "none": own + attention + products + rest,
            }[remat]
        )

    def saved(self, frames: float) -> float:
        """Return the bytes that all layers keep on the device for the backward pass over ``frames`` latent frames."""
        return self.net.num_layers * self._kept(frames, str(self.net.remat))

    def kept(self, frames: float) -> float:
        """Return :meth:`saved`, and on a mesh of GPUs the second copy of the results of attention."""
        copies = self.gpu_mesh and self.net.remat in ("attention", "dots", "none")
        again = self.net.num_layers * _item(self.net) * self.net.dim / self.mesh.tensor if copies else 0.0
        return self.saved(frames) + again * frames * self.frame

    def on_host(self, frames: float) -> float:
        """Return the bytes that all layers keep in the host's memory for the backward pass (``remat="offload"``)."""
        return self.net.num_layers * self._kept(frames, "full") if self.net.remat == "offload" else 0.0

    def working(self, frames: float) -> float:
        """Return the bytes to recompute and differentiate one layer: its activations and its widest gradient."""
        return self._kept(frames, "none") + F32 * frames * self.frame * self.net.ffn_dim / self.mesh.tensor

    def forward(self, frames: int, rows: int = 1) -> float:
        """Return the bytes to compute one layer without a gradient on ``rows`` inputs of ``frames`` latent frames."""
        shape = rows, frames, frames, *self.recipe.latent_size
        work = memory.layer_work(self.net, *shape, backend="kernel", tensor=self.mesh.tensor)
        return sum(work.values()) / self.mesh.context

    def text(self) -> float:
        """Return the bytes of the prompt's keys and values in all layers, for one example."""
        return 2 * F32 * self.net.num_layers * self.net.text_length * self.net.dim / self.mesh.tensor

    def cache(self, frames: int = 0) -> float:
        """Return the bytes of the keys and values of one example: of ``frames`` latent frames, or of a whole cache."""
        causal, net = self.recipe.causal, self.net
        slots = causal.window + causal.sink if causal.window else self.recipe.video.latent_frames
        slots = frames or slots
        split = self.mesh.tensor * self.mesh.context
        tokens = flops.tokens_per_frame(self.recipe, net)
        scales = F32 / tokens if net.kv_cache == "int8" else 0.0  # one per frame, head and channel
        item = 1 if net.kv_cache == "int8" else _item(net)
        return 2 * net.num_layers * slots * tokens * net.dim * (item + scales) / split

    # ---- traffic ----

    def gather(self) -> float:
        """Return the bytes received to all-gather every layer once."""
        return self.layers_whole * (1 - 1 / self.mesh.fsdp)

    def exchanged(self, frames: float) -> float:
        """Return the bytes received in a forward pass of one example: all-to-all (context), all-reduce (tensor)."""
        net, mesh, tokens = self.net, self.mesh, frames * self.frame
        heads = 4 * tokens * net.dim / mesh.tensor * _item(net) * (1 - 1 / mesh.context)
        sums = 3 * tokens * net.dim * F32 * 2 * (1 - 1 / mesh.tensor)
        return net.num_layers * (heads + sums)

    def trained(self, frames: float, examples: float) -> tuple[float, float]:
        """Return (gathered, exchanged) bytes that the device receives in a forward and backward pass.

        Parameters are gathered twice, gradients are scattered once.
        """
        again = 2 if self.net.remat in ("none", "dots") else 3
        scattered = self.gather() * self.updated / self.params
        return 2 * self.gather() + scattered, again * examples * self.exchanged(frames)


def _moments(networks: list[tuple[Network, OptimizerConfig]], recipe: Recipe) -> tuple[dict[str, float], float]:
    """Return the bytes of the moments on the device, by name, and on the host.

    Muon keeps one moment of a layer's kernel.
    """
    moments = sum(2 * n.updated - (n.kernels if config.kind == "muon" else 0.0) for n, config in networks)
    if not recipe.parallel.offload_optimizer:
        return {"moments": moments}, 0.0
    # Moments are fetched, updated and sent back array by array: old and new values of both kinds.
    return {"moments in transfer": 4 * max(n.largest for n, _ in networks)}, moments


def _times(mesh: _Mesh, work: flops.StepFlops, traffic_seconds: float, floor: float = 0.0) -> tuple[float, float]:
    compute = (work.model + work.recomputed) / (mesh.machine.size * mesh.machine.chip.flops)
    return compute / EFFICIENCY[0] + traffic_seconds, max(compute / EFFICIENCY[1], traffic_seconds, floor)


def _gradient_seconds(mesh: _Mesh, params: float) -> float:
    """Return the seconds to all-reduce gradients over the data axis, which is outermost."""
    copies, chip = mesh.data, mesh.machine.chip
    crosses_dcn = mesh.machine.size > mesh.machine.ici_size
    return 2 * params * (1 - 1 / copies) / (chip.dcn_bandwidth if crosses_dcn else chip.ici_bandwidth)


def _one_network(recipe: Recipe, stage: str, mesh: _Mesh) -> Estimate:
    role, config = (recipe.teacher, recipe.train_teacher) if stage == "teacher" else (recipe.student, recipe.train_init)
    net, frames = Network(role, recipe, mesh), recipe.video.latent_frames
    local = config.batch_size / mesh.ways / config.accumulate
    moments, host = _moments([(net, config.optimizer)], recipe)
    parts = {
        "parameters": net.params,
        "running mean": net.updated,
        **moments,
        "gradients": net.updated * (2 if config.accumulate > 1 else 1),
        "kept for the backward pass": local * net.saved(frames),
        "layer at work": local * net.working(frames),
        "gathered layers": net.gathered,
    }
    gathered, exchanged = net.trained(frames, local)
    gathered, exchanged = config.accumulate * gathered, config.accumulate * exchanged
    seconds = (
        gathered / mesh.gather_rate + exchanged / mesh.machine.chip.ici_bandwidth + _gradient_seconds(mesh, net.updated)
    )
    work = flops.training_step(recipe, stage)
    return Estimate(parts, host + local * net.on_host(frames), work, gathered + exchanged, _times(mesh, work, seconds))


class _Phase(NamedTuple):
    """Bytes on one device in a part of a distillation step, in addition to the state, which all parts hold.

    Attributes:
        gradients: of parameters.
        arrays: kept by forward passes, caches, and temporary arrays of the current layer.
        gathered: layers of the running networks, gathered along fsdp.
    """

    gradients: float
    arrays: float
    gathered: float


def _differentiated(recipe: Recipe) -> int:
    """Return the latent frames of one backward pass of the student: a block, a clip, or its copies and its past."""
    config, causal, frames = recipe.train_distill, recipe.causal, recipe.video.latent_frames
    if config.gradient == "replay":
        return frames * (1 + causal.context_pass) + (causal.context_frames() if config.continuation_prob else 0)
    return frames if config.rollout == "data" else causal.frames_per_block


def _distill_phases(recipe: Recipe, student: Network, fake: Network, teacher: Network) -> dict[str, _Phase]:
    """Return the memory of each part of a step of distillation; arrays of one part are not alive in the others.

    - ``rollout``: the cache, which the loops over blocks and steps update in place, and in two of the loops the block's
      own keys and values. Nothing else of its passes is kept.
    - ``critic``: the arrays that the fake score keeps for its backward pass, and this pass. A discriminator adds its
      passes.
    - ``scores``: the arrays that the student keeps during this part (its cache; with ``replay`` or rollouts on data
      those of its layers) and the forward pass of one score. The teacher has a batch of two per clip, with and without
      the prompt. SiD and a discriminator differentiate the scores.
    - ``student``: its backward pass. With ``stop`` it goes block by block and holds two gradients, the sum and that of
      one block. With ``replay`` it goes over all noisy frames and, with a context pass, over their clean copies.

    With ``accumulate``, all parts hold the sum of the gradients of earlier examples. On a mesh of GPUs, XLA also keeps
    the zeros with which loops begin: a cache, a gradient, and the arrays that the fake score will keep.
    """
    config, frames, mesh = recipe.train_distill, recipe.video.latent_frames, student.mesh
    block, passed, by_block = recipe.causal.frames_per_block, _differentiated(recipe), config.rollout == "self"
    summed, zeros = int(config.accumulate > 1), int(student.gpu_mesh)
    # A causal score sees clean copies of the clip too.
    seen, shown = (frames * (1 + (mode == "causal")) for mode in (config.critic_mode, config.teacher))
    judged = 2 + bool(config.gan_r1_weight) + bool(config.gan_r2_weight) if config.objective == "dmd_gan" else 0

    cache = student.cache() + student.text()
    criticised = fake.kept(seen) + judged * fake.kept(frames)
    rolling = cache + 2 * student.cache(block) + student.forward(block) if by_block else student.forward(frames)
    begun = zeros * by_block * student.cache()
    stops = by_block and config.gradient == "stop"
    waiting = cache if stops else student.kept(passed)
    back = student.working(passed) + stops * student.kept(passed)
    scores = max(fake.forward(seen, 1 + (config.fake_guidance_scale != 1)), teacher.forward(shown, 2))
    if config.objective == "sid":
        scores = fake.kept(seen) + 2 * teacher.kept(shown) + max(fake.working(seen), 2 * teacher.working(shown))
    elif judged:
        scores = max(scores, fake.kept(frames) + fake.working(frames))

    local = config.batch_size / mesh.ways / config.accumulate
    sums, both = summed + zeros, max(fake.updated, student.updated)
    layer = max(net.gathered for net in (student, fake, teacher)) / 2  # a forward pass gathers no gradient
    return {
        "rollout": _Phase(summed * both, local * (rolling + begun + zeros * criticised), layer),
        "critic": _Phase((1 + sums) * fake.updated, local * (begun + criticised + fake.working(seen)), fake.gathered),
        "scores": _Phase(sums * student.updated, local * (waiting + scores), layer),
        "student": _Phase((1 + stops + sums) * student.updated, local * (waiting + back), student.gathered),
    }


def _distill(recipe: Recipe, mesh: _Mesh) -> Estimate:
    config, frames = recipe.train_distill, recipe.video.latent_frames
    student, fake, teacher = (Network(n, recipe, mesh) for n in (recipe.student, recipe.fake_score, recipe.teacher))
    # Both experts of a teacher of two run on the whole batch, since its timesteps fall on both sides of the boundary.
    scorers = 2 if recipe.experts.boundary else 1
    local = config.batch_size / mesh.ways / config.accumulate
    self_rollout = config.rollout == "self"
    blocks = len(recipe.causal.block_sizes(frames))
    moments, host = _moments([(student, config.optimizer), (fake, config.critic_optimizer)], recipe)
    most = max(_distill_phases(recipe, student, fake, teacher).values(), key=sum)
    parts = {
        "student": student.params,
        "running mean": student.updated,
        "fake score": fake.updated if dmd_scores.shares_base(recipe) else fake.params,
        "teacher": teacher.params * scorers,
        **moments,
        "gradients": most.gradients,
        "caches and activations": most.arrays,
        "gathered layers": most.gathered,
    }
    if self_rollout:
        passes = flops.denoising_passes(recipe, blocks)
        passes += (blocks - 1) * recipe.causal.context_pass  # no block reads the last block's context
        sent = local * student.exchanged(frames) * passes / blocks
        roll = passes * student.gather(), sent
        back = blocks * 2 * student.gather(), 2 * local * student.exchanged(frames)
    else:
        roll = student.gather(), local * student.exchanged(frames)
        back = 2 * student.gather(), 2 * local * student.exchanged(frames)
    trained = fake.trained(frames, local)
    scored = (
        fake.gather() + scorers * teacher.gather(),
        local * (fake.exchanged(frames) + 2 * scorers * teacher.exchanged(frames)),
    )
    updates, parts_of_batch = config.critic_steps, config.accumulate
    gathered, exchanged = (
        parts_of_batch * (updates * (roll[i] + trained[i]) + roll[i] + back[i] + scored[i]) for i in (0, 1)
    )
    seconds = gathered / mesh.gather_rate + exchanged / mesh.machine.chip.ici_bandwidth
    seconds += updates * _gradient_seconds(mesh, fake.updated) + _gradient_seconds(mesh, student.updated)
    work = flops.training_step(recipe, "distill")
    on_host = host + local * max(fake.on_host(frames), student.on_host(_differentiated(recipe)))
    return Estimate(parts, on_host, work, gathered + exchanged, _times(mesh, work, seconds))


def _stream(recipe: Recipe, mesh: _Mesh) -> Estimate:
    """Estimate one block of data x fsdp parallel streams."""
    net, block = Network(recipe.student, recipe, mesh), recipe.causal.frames_per_block
    passes, spec = passes_per_block(recipe), transformer.inference_spec(net.net)
    weights = param_bytes(spec, mesh.axes, net.net.rules, transformer.inference(net.net))
    cache = net.cache()
    causal = recipe.causal
    context_frames = causal.window + causal.sink if causal.window else recipe.video.latent_frames
    # GPUs and TPUs have a kernel for attention, which keeps no scores.
    layer = memory.layer_work(net.net, 1, block, context_frames, *recipe.latent_size, backend="kernel")
    parts = {
        "parameters": weights,
        "caches": cache,
        "layer at work": sum(layer.values()) / (mesh.context * mesh.tensor),
        "gathered layers": net.gathered,
    }
    work = flops.StepFlops(flops.stream_block(recipe) * mesh.ways)
    gathered, exchanged = passes * net.gather() * weights / net.params, passes * net.exchanged(block)
    seconds = gathered / mesh.gather_rate + exchanged / mesh.machine.chip.ici_bandwidth
    read = passes * (weights + cache) / mesh.machine.chip.bandwidth
    timed = work
    if net.net.linear == "int8":
        linear = passes * flops.linear_layers(net.net, block * flops.tokens_per_frame(recipe, net.net)) * mesh.ways
        timed = flops.StepFlops(work.model - linear * (1 - 1 / INT8_RATE))
    return Estimate(parts, 0.0, work, gathered + exchanged, _times(mesh, timed, seconds, read), streams=mesh.ways)


def estimate(recipe: Recipe, stage: str, machine: TopologySpec) -> Estimate:
    """Estimate one step of ``stage`` ("teacher", "init", "distill") or one block of "stream".

    The mesh is that of ``recipe.parallel`` over ``machine``.

    Raises:
        ConfigError: a mesh that does not fit the devices.
    """
    mesh = make_mesh(recipe.parallel, machine)
    if stage == "stream":
        return _stream(recipe, mesh)
    return _distill(recipe, mesh) if stage == "distill" else _one_network(recipe, stage, mesh)
