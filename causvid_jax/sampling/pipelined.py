"""Pipeline the denoising steps of a stream over devices: device j runs step j of every block (docs/pipeline.md).

In one round every device works on a different block. Only latents then move to the next device::

    round r:   device 0: block r, step 0 | device 1: block r - 1, step 1 | ... | device Q - 1: block r - Q + 1

A step cannot attend to the earlier blocks in finished form, because most of them are not finished yet. So every device
has its own KV cache, of all blocks at its own step:

- With ``causal.context_pass`` a device writes a block to its cache as the ordinary sampler does: by one more pass at
  ``causal.context_noise``, on the x0 that its step has computed. A round has two passes.
- Without it the cache keeps keys and values of the noisy block that the step has read, as in LiveAvatar (arXiv
  2512.04677). A round has one pass, and the student should be trained with such a cache.

With one step the result is that of the ordinary sampler. With more steps it is not: in the ordinary sampler every step
reads finished blocks, here only the last step does.

    mesh = step_mesh(config, jax.devices()[:4])  # one device per denoising step
    params = replicated(params, mesh)
    state = init_pipeline(params, text, config=config, mesh=mesh, seed=0)
    for latents, state in blocks(params, state, 20, config=config, mesh=mesh):
        ...  # [B, K, h, w, C]
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from causvid_jax.config import Recipe, require
from causvid_jax.diffusion import flow
from causvid_jax.models import precision, transformer
from causvid_jax.models.kv_cache import KVCache, TextCache
from causvid_jax.sampling import schedule, stream
from causvid_jax.sampling.stream import Params

AXIS = "step"
"""The mesh axis of the devices."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PipelineState:
    """The state between two rounds. Arrays of ``x`` and ``cache`` have a leading axis of the Q devices.

    Attributes:
        x: ``[Q, B, K, h, w, C]``, the input of each device in the next round. Device 0 starts from noise instead.
        cache: of every device.
        text: the prompt, on every device.
        seed: uint32 ``[B]``.
        round: int32, rounds done.
    """

    x: jax.Array
    cache: KVCache
    text: TextCache
    seed: jax.Array
    round: jax.Array


_EACH, _ALL = PartitionSpec(AXIS), PartitionSpec()
_SPECS = PipelineState(_EACH, _EACH, _ALL, _ALL, _ALL)  # type: ignore[arg-type]


def step_mesh(config: Recipe, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of one device per denoising step, in their order; ``devices`` default to all.

    Raises:
        ConfigError: another number of devices, or a recipe whose blocks are not all denoised by the same steps, one
            block at a time, from text alone.
    """
    schedule.check_single_blocks(config)
    for name, given in (
        ("causal.independent_first_frame", config.causal.independent_first_frame),
        ("diffusion.first_block_timesteps", bool(config.diffusion.first_block_timesteps)),
        ("causal.add_context_noise='always'", config.causal.add_context_noise == "always"),
        ("student.image_dim or image_channels", config.student.image_dim + config.student.image_channels > 0),
    ):
        require(not given, f"{name} is set, which a pipeline of denoising steps does not support")
    devices = list(jax.devices() if devices is None else devices)
    steps = len(config.diffusion.denoising_timesteps)
    require(
        len(devices) == steps,
        f"{len(devices)} devices are given for {steps} denoising steps; accepted: {steps}, one per step",
    )
    return Mesh(np.asarray(devices), (AXIS,))


def replicated(params: Params, mesh: Mesh) -> Params:
    """Return ``{"student"}`` of ``params`` on every device of ``mesh``; do this once, not in every round."""
    return {"student": jax.device_put(params["student"], NamedSharding(mesh, _ALL))}


def init_pipeline(
    params: Params,
    text: jax.Array,
    *,
    config: Recipe,
    mesh: Mesh,
    seed: int | Sequence[int] = 0,
    frames: int | None = None,
) -> PipelineState:
    """Return the state before the first round.

    Args:
        params: of :func:`replicated`.
        text, config, seed, frames: as in :func:`stream.init_stream`.
        mesh: of :func:`step_mesh`.

    Raises:
        ConfigError: as :func:`step_mesh` and :func:`stream.init_stream`.
    """
    step_mesh(config, list(mesh.devices.flat))
    capacity = stream.capacity_of(config, frames)
    seeds = stream.seeds_of(seed, text.shape[0])
    return _start(params, *jax.device_put((text, seeds), NamedSharding(mesh, _ALL)), config, mesh, capacity)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _start(
    params: Params, text: jax.Array, seeds: jax.Array, config: Recipe, mesh: Mesh, capacity: int | None
) -> PipelineState:
    alone = stream.first_state(params, text, seeds, config=config, capacity=capacity)
    shape = (text.shape[0], config.causal.frames_per_block, *config.latent_size, config.vae.z_dim)

    def of_each(leaf: jax.Array) -> jax.Array:
        copies = jnp.broadcast_to(leaf, (mesh.size, *leaf.shape))
        return jax.lax.with_sharding_constraint(copies, NamedSharding(mesh, _EACH))

    x, cache = jax.tree.map(of_each, (jnp.zeros(shape, jnp.float32), alone.cache))
    return PipelineState(x, cache, alone.text, seeds, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("state",))
def next_round(params: Params, state: PipelineState, *, config: Recipe, mesh: Mesh) -> tuple[jax.Array, PipelineState]:
    """Run one step of a block on every device, and move its latents on by one device.

    Args:
        params: of :func:`replicated`.
        state: of :func:`init_pipeline` or the round before. It is donated.
        config, mesh: as in :func:`init_pipeline`.

    Returns:
        The result of every device, ``[Q, B, K, h, w, C]``, and the next state. In round r (from 0) entry Q - 1 is the
        finished block r - Q + 1. In the first Q - 1 rounds there is no such block; ignore the entry.
    """
    one = functools.partial(_round, config=config)
    # Kernels of Pallas and cuDNN do not declare how their results vary over devices, so this is not checked.
    run = jax.shard_map(one, mesh=mesh, in_specs=(_ALL, _SPECS), out_specs=(_EACH, _SPECS), check_vma=False)
    return run(params, state)


def _round(params: Params, state: PipelineState, *, config: Recipe) -> tuple[jax.Array, PipelineState]:
    """Run a round on this device, whose ``x`` and ``cache`` have a leading axis of 1."""
    x, before = jax.tree.map(lambda leaf: leaf[0], (state.x, state.cache))
    student, causal = config.student, config.causal
    times, levels, _ = schedule.tables(None, config)
    j = jax.lax.axis_index(AXIS)
    block = state.round - j  # negative while the pipeline fills: the passes run, and their frames are not kept

    def noise(step: jax.Array) -> jax.Array:
        return precision.round_all(stream.block_noise(state.seed, block, step, x.shape[1:]), student)

    def one_pass(turn: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        """Denoise in turn 0; in turn 1 write x0, which does not change because its noise level is 0."""
        x, cache = carry
        time, level = (jnp.where(turn == 0, *pair) for pair in ((times[j], causal.context_noise), (levels[j], 0.0)))
        timesteps = jnp.full(x.shape[:2], time, jnp.float32)
        velocity, cache = transformer.cached(
            params["student"], x, timesteps, state.text, cache, config=student, causal=causal
        )
        return precision.round_all(flow.x0_from_velocity(x, velocity, level), student), cache

    start = schedule.schedule(config, None)[1][0]
    x = jnp.where(j == 0, start * noise(jnp.int32(0)), x)
    cache = dataclasses.replace(before, position=causal.frames_per_block * jnp.maximum(block, 0))
    x0, cache = jax.lax.fori_loop(0, 1 + causal.context_pass, one_pass, (x, cache))
    cache = dataclasses.replace(cache, frame=jnp.where(block >= 0, cache.frame, before.frame))
    x = precision.round_all(flow.add_noise(x0, noise(j + 1), levels[j + 1]), student)
    moved = jax.lax.ppermute(x, AXIS, [(i, i + 1) for i in range(jax.lax.axis_size(AXIS) - 1)])
    x, moved, cache = jax.tree.map(lambda leaf: leaf[None], (x, moved, cache))
    return x, PipelineState(moved, cache, state.text, state.seed, state.round + 1)


def blocks(
    params: Params, state: PipelineState, count: int, *, config: Recipe, mesh: Mesh
) -> Iterator[tuple[jax.Array, PipelineState]]:
    """Yield the latents ``[B, K, h, w, C]`` of the next ``count`` finished blocks, and the state after each.

    The latents are on the device of the last step. Before the first block Q - 1 rounds fill the pipeline. At the end
    Q - 1 further blocks are begun: another call finishes them, or they are dropped. ``state`` is consumed.

    Raises:
        ConfigError: the blocks do not fit the caches of a stream without a window.
    """
    steps, done = mesh.size, int(state.round)
    slots, causal = state.cache.frame.shape[1], config.causal
    end = causal.frames_per_block * (max(done - steps + 1, 0) + count)
    require(
        causal.window > 0 or end <= slots,
        f"the stream has room for {slots} latent frames, and {end} are asked for; give frames={end} to "
        "init_pipeline(), or a recipe with causal.window",
    )
    last = max(done, steps - 1) + count
    for number in range(done, last):
        each, state = next_round(params, state, config=config, mesh=mesh)
        if number >= steps - 1:
            yield _of_last(each), state


def _of_last(each: jax.Array) -> jax.Array:
    """Return the result of the last device, on that device; nothing is exchanged."""
    return max(each.addressable_shards, key=lambda part: part.index[0].start or 0).data[0]


def generate(
    params: Params,
    text: jax.Array,
    *,
    config: Recipe,
    mesh: Mesh,
    frames: int | None = None,
    seed: int | Sequence[int] = 0,
) -> jax.Array:
    """Generate a whole clip; return its latents ``[B, F, h, w, C]``, on the device of the last step.

    Args:
        params: ``{"student"}`` is read, on any device.
        text, config, seed: as in :func:`stream.init_stream`.
        mesh: of :func:`step_mesh`.
        frames: latent frames F, which must fit the blocks; None: those of the recipe's clip.

    Raises:
        ConfigError: as :func:`init_pipeline`, or latent frames that do not fit the blocks.
    """
    frames = config.video.latent_frames if frames is None else frames
    count = len(config.causal.block_sizes(frames))
    everywhere = replicated(params, mesh)
    state = init_pipeline(everywhere, text, config=config, mesh=mesh, seed=seed, frames=frames)
    parts = [latents for latents, _ in blocks(everywhere, state, count, config=config, mesh=mesh)]
    return jnp.concatenate(parts, axis=1)
