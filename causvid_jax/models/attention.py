"""Attention: one dense kernel, and what each reading of the network lets a token see.

What is seen is a static plan, a list of (queries, keys) in ranges of frames. A block-causal mask is then a handful of
dense calls over slices of the keys (block i attends to what precedes its end), so every backend's fastest dense kernel
applies and nothing of size T x T exists. Tensors are ``[B, F, n, N, D]``: F frames of n tokens, N heads of size D.

On a mesh the n tokens of every frame are split over the context axis, so that each device holds its part of every frame
and every block costs all of them the same. :func:`attend` then exchanges tokens for heads by an all-to-all around the
kernel (DeepSpeed-Ulysses, arXiv 2309.14509) or, where heads do not divide, passes keys and values round a ring
(arXiv 2310.01889). Kernels see local arrays only, inside ``jax.shard_map``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from causvid_jax.config import CausalConfig, ShardingRules, require
from causvid_jax.sharding import constraints

Range = tuple[int, int]  # half-open, in frames
Plan = list[tuple[Range, list[Range]]]  # for each run of queries, in order, the keys they see
RESULT = "attention"  # what the results of self-attention are called where rematerialisation chooses what to keep


def resolve(backend: str, dtype: str) -> str:
    """The kernel that ``"auto"`` stands for: splash on TPU, cuDNN on GPU in bfloat16, else XLA's own."""
    if backend != "auto":
        return backend
    platform = constraints.platform()
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform in ("gpu", "cuda") and dtype == "bfloat16" else "xla"


def dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    dtype: str,
    backend: str = "xla",
    mask: jax.Array | None = None,
    used: jax.Array | None = None,
    name: str | None = None,
) -> jax.Array:
    """``softmax(q k^T / sqrt(D)) v`` over all keys, or over those where ``mask [S]`` (shared by all queries) is true.

    ``q [B, T, N, D]``, ``k, v [B, S, N, D]``; returns float32 ``[B, T, N, D]``. ``backend`` is ``"xla"`` (any device;
    holds all T x S scores), ``"late"`` (the same, divided by the softmax's sum after the last product, as flash
    attention does, which shows in bfloat16), ``"cudnn"`` (``jax.nn.dot_product_attention``, bfloat16 on GPU),
    ``"splash"`` (TPU) or ``"auto"`` (:func:`resolve`). The result is called ``name`` in rematerialisation, rounded to
    ``dtype``; of splash the softmax's sums are too, so that its backward pass needs nothing computed again.

    ``used``, a scalar, may be given beside a mask that holds for the first ``used`` keys and no others. cuDNN then
    stops there; any other mask it reads as a T x S array of biases.
    """
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    backend = resolve(backend, dtype)
    if backend == "splash":
        return _splash(q, k, v, mask, name)
    if backend == "cudnn":
        seen: dict[str, Any] = {}
        if used is not None:
            seen["key_value_seq_lengths"] = jnp.full((q.shape[0],), used, jnp.int32)
        elif mask is not None:
            seen["mask"] = jnp.broadcast_to(mask, (1, 1, q.shape[1], k.shape[1]))
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **seen)
        return _named(out, dtype, name)
    scores = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    late = backend == "late"
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) if late else jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bnts,bsnd->btnd", weights.astype(dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.swapaxes(weights.sum(-1), 1, 2)[..., None] if late else out
    return _named(out, dtype, name)


def _named(x: jax.Array, dtype: str, name: str | None) -> jax.Array:
    """``x`` in float32; with a name, the array of ``dtype`` that rematerialisation may keep under it."""
    # The output projection rounds its input to this type anyway.
    return (x if name is None else checkpoint_name(x.astype(dtype), name)).astype(jnp.float32)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, name: str | None = None) -> jax.Array:
    """:func:`dense` by JAX's splash kernel for TPU; interpreted, slowly, elsewhere.

    The kernel takes lengths that its blocks divide and heads of whole 128 lanes. Everything is padded with zeros;
    padded keys and masked ones get a segment of their own, which no query is in.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, t, n, d), s = q.shape, k.shape[1]
    block_q, block_kv = (min(512, -(-length // 128) * 128) for length in (t, s))
    padded_t, padded_s = -(-t // block_q) * block_q, -(-s // block_kv) * block_kv

    def ready(x: jax.Array, length: int) -> jax.Array:  # [B, T, N, D] -> [B, N, T', D']
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -d % 128)))
        return jnp.swapaxes(x, 1, 2)

    seen = jnp.ones((s,), jnp.int32) if mask is None else mask.astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones((padded_t,), jnp.int32), kv=jnp.pad(seen, (0, padded_s - s)))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((padded_t, padded_s))] * n),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=block_kv,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=name,
        interpret=constraints.platform() == "cpu",
    )
    scaled = ready(q * q.shape[-1] ** -0.5, padded_t)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(scaled, ready(k, padded_s), ready(v, padded_s), segments)
    return jnp.swapaxes(out, 1, 2)[:, :t, :, :d].astype(jnp.float32)


# ---- what a token sees ----------------------------------------------------------------------------------------------


def everything(frames: int) -> Plan:
    """Every token sees every token (teacher and fake score)."""
    return [((0, frames), [(0, frames)])]


def visible_frames(end: int, causal: CausalConfig) -> list[Range]:
    """Ranges of frames that a block ending at frame ``end`` sees: the sink and the window."""
    start = max(0, end - causal.window) if causal.window else 0
    sink = min(causal.sink, start)
    return [(0, sink), (start, end)] if sink else [(start, end)]


def _blocks(frames: int, causal: CausalConfig) -> list[Range]:
    ranges, end = [], 0
    for size in causal.block_sizes(frames):
        ranges.append((end, end + size))
        end += size
    return ranges


def block_causal(frames: int, causal: CausalConfig) -> Plan:
    """Each block sees itself and what :func:`visible_frames` gives (paper, eq. 5)."""
    return [(block, visible_frames(block[1], causal)) for block in _blocks(frames, causal)]


def teacher_forcing(frames: int, causal: CausalConfig) -> Plan:
    """For ``2 frames``, clean ones then noisy ones: a noisy block sees itself and earlier *clean* blocks, a clean block
    the clean blocks up to itself."""
    noisy: Plan = []
    for start, end in _blocks(frames, causal):
        # The window counts the noisy block itself, whose clean copy must stay hidden.
        seen = [(a, min(b, start)) for a, b in visible_frames(end, causal)]
        own = (frames + start, frames + end)
        noisy.append((own, [*((a, b) for a, b in seen if b > a), own]))
    return block_causal(frames, causal) + noisy


# ---- running a plan -------------------------------------------------------------------------------------------------


def flatten_frames(x: jax.Array) -> jax.Array:
    """``[B, F, n, N, D]`` -> ``[B, F n, N, D]``."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _take(x: jax.Array, ranges: Sequence[Range]) -> jax.Array:
    """These frames of ``x``, flattened."""
    parts = [x[:, a:b] for a, b in ranges]
    return flatten_frames(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1))


def run(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, *, dtype: str, backend: str) -> jax.Array:
    """The plan on arrays of one device; float32 ``[B, F, n, N, D]``."""
    outputs = []
    for queries, keys in plan:
        seen = (_take(k, keys), _take(v, keys))
        out = dense(_take(q, [queries]), *seen, dtype=dtype, backend=backend, name=RESULT)
        outputs.append(out.reshape(q.shape[0], queries[1] - queries[0], *q.shape[2:]))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _partial(q: jax.Array, k: jax.Array, v: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention over part of the keys: unnormalised output ``[B, T, N, D]``, and maximum and sum ``[B, T, N]``."""
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    scores = jnp.einsum("btnd,bsnd->btns", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("btns,bsnd->btnd", weights.astype(dtype), v, preferred_element_type=jnp.float32)
    return out, top, weights.sum(-1)


def _merge(one, other):
    """Two results of :func:`_partial` over different keys as one."""
    (out, top, total), (out_, top_, total_) = one, other
    highest = jnp.maximum(top, top_)
    a, b = jnp.exp(top - highest), jnp.exp(top_ - highest)
    return a[..., None] * out + b[..., None] * out_, highest, a * total + b * total_


def run_ring(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, *, axis: str, size: int, dtype: str) -> jax.Array:
    """The plan where each of ``size`` devices along mesh ``axis`` holds its tokens of every frame.

    Keys and values go round the ring once; every device keeps a running softmax for its own queries.
    """
    following = [(i, (i + 1) % size) for i in range(size)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def parts(k, v):
        return [_partial(_take(q, [queries]), _take(k, keys), _take(v, keys), dtype) for queries, keys in plan]

    def turn(carry, _):
        k, v, results = carry
        k, v = (jax.lax.ppermute(x, axis, following) for x in (k, v))
        return (k, v, [_merge(*pair) for pair in zip(results, parts(k, v), strict=True)]), None

    (_, _, results), _ = jax.lax.scan(turn, (k, v, parts(k, v)), length=size - 1)
    outputs = [
        (out / total[..., None]).reshape(q.shape[0], b - a, *q.shape[2:])
        for (out, _, total), ((a, b), _) in zip(results, plan, strict=True)
    ]
    return _named(jnp.concatenate(outputs, axis=1), dtype, RESULT)


# ---- on a mesh ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How attention tensors ``[B, F, n, N, D]`` lie on the current mesh, outside and inside attention."""

    batch: tuple[str, ...]
    context: tuple[str, ...]  # mesh axes over which tokens are split outside
    heads: tuple[str, ...]  # mesh axes over which heads are split outside
    context_size: int
    ring: bool

    @property
    def outside(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, None, self.context or None, self.heads or None, None)

    @property
    def inside(self) -> PartitionSpec:
        """Of a cache: whole tokens, heads split over all that they are split over while attention runs."""
        return PartitionSpec(self.batch or None, None, None, (*self.heads, *self.context) or None, None)


def _layout(shape: Sequence[int], rules: ShardingRules) -> _Layout | None:
    """Of an array of ``shape`` on the current mesh; None without a mesh."""
    mesh = constraints.mesh_shape()
    if not mesh:
        return None
    axes = ("batch", None, "tokens", "heads", None)
    batch, _, context, heads, _ = constraints.mesh_axes(axes, shape, mesh, rules)
    size = math.prod(mesh[a] for a in context)
    local_heads = shape[3] // math.prod(mesh[a] for a in heads)
    return _Layout(batch, context, heads, size, ring=local_heads % size != 0)


def _to_heads(x: jax.Array, layout: _Layout) -> jax.Array:
    """All tokens of fewer heads, from all heads of fewer tokens."""
    return jax.lax.all_to_all(x, layout.context, 3, 2, tiled=True) if layout.context else x


def _to_tokens(x: jax.Array, layout: _Layout) -> jax.Array:
    return jax.lax.all_to_all(x, layout.context, 2, 3, tiled=True) if layout.context else x


def attend(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, *, dtype: str, backend: str, rules: ShardingRules
) -> jax.Array:
    """The plan on ``[B, F, n, N, D]`` tensors, wherever they lie; float32 of the same shape and place."""
    kernel = functools.partial(run, plan, dtype=dtype, backend=backend)
    layout = _layout(q.shape, rules)
    if layout is None:
        return kernel(q, k, v)

    def local(q, k, v):
        if layout.ring:
            return run_ring(plan, q, k, v, axis=layout.context[0], size=layout.context_size, dtype=dtype)
        # Rounded to the type of the kernel before they travel: the kernel would do it after, at twice the traffic.
        out = kernel(*(_to_heads(x.astype(dtype), layout) for x in (q, k, v)))
        return _to_tokens(out.astype(dtype), layout).astype(jnp.float32)

    return jax.shard_map(local, in_specs=(layout.outside,) * 3, out_specs=layout.outside, check_vma=False)(q, k, v)


def attend_cache(
    kernel: Callable[..., tuple[jax.Array, Any]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    *whole: jax.Array,
    rules: ShardingRules,
) -> tuple[jax.Array, Any]:
    """``kernel(q, k, v, cache, *whole) -> (output, cache)`` with whole tokens of the heads that a device holds.

    A cache ``[B, S, n, N, D]`` stays split by heads between calls; only the new block's queries, keys, values and
    output are exchanged. ``whole`` arrays are the same everywhere.
    """
    layout = _layout(q.shape, rules)
    if layout is None:
        return kernel(q, k, v, cache, *whole)
    require(
        not layout.ring,
        f"{q.shape[3]} attention heads cannot be split over tensor x context in a stream; the product must divide them",
    )

    dtype = cache[0].dtype

    def local(q, k, v, cache, *whole):
        # Keys and values travel as they will lie; queries are rotated first and rounded after.
        k, v = (_to_heads(x.astype(dtype), layout) for x in (k, v))
        out, cache = kernel(_to_heads(q, layout), k, v, cache, *whole)
        return _to_tokens(out.astype(dtype), layout).astype(jnp.float32), cache

    inside = (layout.inside, layout.inside)
    return jax.shard_map(
        local,
        in_specs=(layout.outside, layout.outside, layout.outside, inside, *(PartitionSpec() for _ in whole)),
        out_specs=(layout.outside, inside),
        check_vma=False,
    )(q, k, v, cache, *whole)


def attend_text(
    q: jax.Array, k: jax.Array, v: jax.Array, *, dtype: str, backend: str, rules: ShardingRules
) -> jax.Array:
    """Cross-attention of tokens ``q [B, F, n, N, D]`` to ``k, v [B, S, N, D]``: a device needs its own tokens only."""

    def local(q, k, v):
        return dense(flatten_frames(q), k, v, dtype=dtype, backend=backend).reshape(q.shape)

    layout = _layout(q.shape, rules)
    if layout is None:
        return local(q, k, v)
    text = PartitionSpec(layout.batch or None, None, layout.heads or None, None)
    return jax.shard_map(local, in_specs=(layout.outside, text, text), out_specs=layout.outside, check_vma=False)(
        q, k, v
    )
