"""Attention kernels and masks. Each forward mode defines which tokens a query attends to.

A mask is a static plan: a list of (queries, keys) as ranges of frames. A block-causal mask is then a few dense calls
over slices of the keys (block i attends to all frames before its end). Every backend can use its fastest dense kernel,
and no T x T mask is needed. Tensors are ``[B, F, n, N, D]``: F frames of n tokens, N heads of size D.

On a mesh the n tokens of every frame are split over the context axis. Every device holds a part of each frame, so the
work of a block is balanced. :func:`attend` exchanges tokens for heads by an all-to-all before and after the kernel
(DeepSpeed-Ulysses, arXiv 2309.14509). If the heads are not divisible, it passes keys and values around a ring instead
(arXiv 2310.01889). Kernels run on local arrays inside ``jax.shard_map``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float

from causvid_jax.config import CausalConfig, ShardingRules, require
from causvid_jax.models import int8_attention
from causvid_jax.models.layers import dot_precision, einsum
from causvid_jax.sharding import constraints

Range = tuple[int, int]  # half-open, in frames
Plan = list[tuple[Range, list[Range]]]  # consecutive runs of queries, each with the keys they attend to
RESULT = "attention"  # checkpoint name of the results of self-attention, for rematerialization policies


def resolve(backend: str, dtype: str) -> str:
    """Return ``backend``, or for ``"auto"`` the kernel: splash on TPU and cuDNN on GPU in bfloat16, otherwise XLA."""
    if backend != "auto":
        return backend
    kernels = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # their float32 products would not be float32
    return kernels.get(constraints.platform(), "xla") if dtype == "bfloat16" else "xla"


def dense(
    q: Float[jax.Array, "B T N D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    *,
    dtype: str,
    backend: str = "xla",
    mask: Bool[jax.Array, "S"] | None = None,
    used: jax.Array | None = None,
    name: str | None = None,
) -> Float[jax.Array, "B T N D"]:
    """Return ``softmax(q k^T / sqrt(D)) v``, float32 ``[B, T, N, D]``, over all keys or those where ``mask`` is true.

    Args:
        q: ``[B, T, N, D]``.
        k: ``[B, S, N, D]``.
        v: ``[B, S, N, D]``.
        dtype: type of the operands of both products.
        backend: ``"xla"`` (any device; stores all T x S scores), ``"late"`` (the same, but divides by the softmax's sum
            after the last product, which rounds bfloat16 as flash attention does), ``"cudnn"`` (bfloat16 on GPU),
            ``"splash"`` (TPU), ``"blockwise"`` (any device, for ``jax.jvp``), ``"int8"`` (GPU, TPU; sampling only,
            :mod:`causvid_jax.models.int8_attention`) or ``"auto"`` (:func:`resolve`).
        mask: bool ``[S]``, the same for all queries.
        used: scalar count for a mask that is true exactly for the first ``used`` keys. cuDNN then skips the other keys;
            any other mask becomes a T x S bias array. Splash skips blocks of keys that a mask hides completely.
        name: checkpoint name of the result, rounded to ``dtype``, for rematerialization. The splash kernel names its
            softmax sums too, so its backward pass recomputes nothing.
    """
    backend = resolve(backend, dtype)
    if backend == "int8":  # it rounds the arrays before any rounding to ``dtype``
        return _named(int8_attention.attention(q, k, v, dtype, mask, used), dtype, name)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    if backend == "splash":
        from causvid_jax.models import splash

        return splash.attention(q, k, v, mask, name)
    if backend == "blockwise":
        return _named(_blockwise(q, k, v, mask), dtype, name)
    if backend == "cudnn":
        masking: dict[str, Any] = {}
        if used is not None:
            masking["key_value_seq_lengths"] = jnp.full((q.shape[0],), used, jnp.int32)
        elif mask is not None:
            masking["mask"] = jnp.broadcast_to(mask, (1, 1, q.shape[1], k.shape[1]))
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **masking)
        return _named(out, dtype, name)
    if constraints.platform() == "cpu" and q.shape[1] * k.shape[1] > CHUNKED:
        return _named(_by_head(q, k, v, mask), dtype, name)
    scores = einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    late = backend == "late"
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) if late else jax.nn.softmax(scores, axis=-1)
    out = einsum("bnts,bsnd->btnd", weights.astype(dtype), v)
    out = out / jnp.swapaxes(weights.sum(-1), 1, 2)[..., None] if late else out
    return _named(out, dtype, name)


CHUNKED = 1 << 18
"""Scores of a head above which a CPU computes attention by :func:`_by_head`; fewer fit the processor's cache."""
QUERIES, KEYS = 400, 512
"""Most queries and keys of a part of :func:`_by_head`: its scores fit the cache of a core."""


def _even(length: int, most: int) -> tuple[int, int]:
    """Return the number and the size of equal parts of at most ``most`` that cover ``length``."""
    parts = -(-length // most)
    return parts, -(-length // parts)


def _by_head(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Compute :func:`dense` on a CPU: one head and one part of the queries after the other, with a running softmax.

    XLA's product over heads in the middle axis runs at a seventh of the speed of a product of matrices. The T x S
    scores of all heads together do not fit the processor's cache and would leave it three times.
    """
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    (parts, rows), (blocks, columns) = _even(length, QUERIES), _even(keys, KEYS)
    options: dict[str, Any] = {"precision": dot_precision(v.dtype), "preferred_element_type": jnp.float32}
    lowest = jnp.finfo(jnp.float32).min

    def padded(x: jax.Array, size: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))

    queries = padded(q * q.dtype.type(q.shape[-1] ** -0.5), parts * rows)
    queries = rearrange(queries, "b (p c) n d -> (b n p) c d", p=parts)
    k = rearrange(padded(k, blocks * columns), "b (s c) n d -> (b n) s d c", c=columns)
    v = rearrange(padded(v, blocks * columns), "b (s c) n d -> (b n) s c d", c=columns)
    hidden = mask is not None or blocks * columns > keys
    visible = jnp.ones((keys,), bool) if mask is None else mask
    visible = jnp.pad(visible, (0, blocks * columns - keys)).reshape(blocks, columns)

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        chunk, head = inputs

        def add(carry: Any, block: jax.Array) -> tuple[Any, None]:
            scores = jnp.matmul(chunk, k[head, block], **options)
            # A part whose keys are all hidden has the lowest maximum, so the next part with a visible key erases it.
            scores = jnp.where(visible[block], scores, lowest) if hidden else scores
            top = jax.lax.stop_gradient(scores.max(-1))
            weights = jnp.exp(scores - top[:, None])
            out = jnp.matmul(weights.astype(v.dtype), v[head, block], **options)
            return _merge(carry, (out, top, weights.sum(-1))), None

        zero = jnp.zeros(chunk.shape, jnp.float32)
        (out, _, total), _ = jax.lax.scan(add, (zero, jnp.full(rows, lowest), zero[:, 0]), jnp.arange(blocks))
        return out / total[:, None]

    out = jax.lax.map(one, (queries, jnp.arange(batch * heads).repeat(parts)))
    return rearrange(out, "(b n p) c d -> b (p c) n d", b=batch, n=heads)[:, :length]


BLOCK = 1024
"""Queries and keys of a block of scores of :func:`_blockwise`."""


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Compute :func:`dense` block by block with a running softmax, so that ``jax.jvp`` of it holds no T x S array.

    The kernels for accelerators have no forward derivative. The running maximum is a constant, because it cancels.
    """
    length, keys = q.shape[1], k.shape[1]
    queries_in, keys_in = min(BLOCK, length), min(BLOCK, keys)

    def split(x: jax.Array, size: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
        return rearrange(x, "b (p c) n d -> p b c n d", c=size)

    visible = jnp.ones((keys,), bool) if mask is None else mask
    visible = jnp.pad(visible, (0, -keys % keys_in)).reshape(-1, keys_in)
    parts = (split(k, keys_in), split(v, keys_in), visible)

    def one(queries: jax.Array) -> jax.Array:
        def add(carry: Any, part: tuple[jax.Array, ...]) -> tuple[Any, None]:
            return _merge(carry, _partial(queries, *part, dtype=v.dtype)), None

        zero = jnp.zeros(queries.shape, jnp.float32)
        start = (zero, jnp.full(queries.shape[:-1], jnp.finfo(jnp.float32).min), zero[..., 0])
        (out, _, total), _ = jax.lax.scan(add, start, parts)
        return out / total[..., None]

    out = jax.lax.map(one, split(q, queries_in))
    return rearrange(out, "p b c n d -> b (p c) n d")[:, :length]


def _named(x: jax.Array, dtype: str, name: str | None) -> jax.Array:
    """Return ``x`` in float32; with ``name``, round it to ``dtype`` and name it for rematerialization."""
    # The output projection rounds its input to this type in any case.
    return (x if name is None else checkpoint_name(x.astype(dtype), name)).astype(jnp.float32)


# ---- masks ----------------------------------------------------------------------------------------------------------


def bidirectional(frames: int) -> Plan:
    """Return the plan in which every token attends to every token (teacher and fake score)."""
    return [((0, frames), [(0, frames)])]


def visible_frames(end: int, causal: CausalConfig) -> list[Range]:
    """Return the ranges of latent frames that a block ending at frame ``end`` attends to: the sink and the window.

    They are ``[0, sink)`` and ``[end - window, end)``; without a window all frames before ``end``.
    """
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
    """Return the plan in which each block attends to :func:`visible_frames` of its end (CausVid, eq. 5).

    Raises:
        ConfigError: ``frames`` latent frames are not a whole number of blocks.
    """
    return [(block, visible_frames(block[1], causal)) for block in _blocks(frames, causal)]


def teacher_forcing(frames: int, causal: CausalConfig, past: int = 0) -> Plan:
    """Return the plan for the clean copies of ``frames`` latent frames, followed by the noisy frames from ``past`` on.

    A noisy block attends to its own frames and to earlier *clean* blocks. A clean block attends to clean blocks up to
    and including its own. Source: Self-Forcing's code (``_prepare_teacher_forcing_mask``).

    Raises:
        ConfigError: ``frames`` are not a whole number of blocks, or no block begins at frame ``past``.
    """
    starts = [start for start, _ in _blocks(frames, causal)]
    require(
        past in starts,
        f"{frames} clean frames with {frames - past} noisy ones: the noisy ones begin at frame {past}; blocks begin at "
        f"{', '.join(map(str, starts))}",
    )
    noisy: Plan = []
    for start, end in _blocks(frames, causal):
        if start < past:
            continue
        # The window includes the block, so remove its clean copy.
        context = [(a, min(b, start)) for a, b in visible_frames(end, causal)]
        own = (frames - past + start, frames - past + end)
        noisy.append((own, [*((a, b) for a, b in context if b > a), own]))
    return block_causal(frames, causal) + noisy


# ---- running a plan -------------------------------------------------------------------------------------------------


def flatten_frames(x: jax.Array) -> jax.Array:
    """Reshape ``[B, F, n, N, D]`` to ``[B, F n, N, D]``."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _select_frames(x: jax.Array, ranges: Sequence[Range]) -> jax.Array:
    """Return the frames of ``x`` in ``ranges``, flattened to tokens."""
    parts = [x[:, a:b] for a, b in ranges]
    return flatten_frames(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1))


def run(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, *, dtype: str, backend: str) -> jax.Array:
    """Return the attention of ``plan`` on one device, float32 ``[B, F, n, N, D]``, for q, k and v of that shape."""
    outputs = []
    for queries, keys in plan:
        keys_values = (_select_frames(k, keys), _select_frames(v, keys))
        out = dense(_select_frames(q, [queries]), *keys_values, dtype=dtype, backend=backend, name=RESULT)
        outputs.append(out.reshape(q.shape[0], queries[1] - queries[0], *q.shape[2:]))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _partial(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None = None, *, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend to a part of the keys: unnormalized output ``[B, T, N, D]``, maximum and sum ``[B, T, N]``.

    With ``visible [S]`` hidden keys do not count, and the maximum has no derivative, as :func:`_blockwise` needs.
    """
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    scores = einsum("btnd,bsnd->btns", q, k) * q.shape[-1] ** -0.5
    if visible is None:
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
    else:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        top = jax.lax.stop_gradient(scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0.0)
    return einsum("btns,bsnd->btnd", weights.astype(dtype), v), top, weights.sum(-1)


def _merge(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Combine two results of :func:`_partial` over different keys."""
    (out, top, total), (out_, top_, total_) = one, other
    highest = jnp.maximum(top, top_)
    a, b = jnp.exp(top - highest), jnp.exp(top_ - highest)
    return a[..., None] * out + b[..., None] * out_, highest, a * total + b * total_


def run_ring(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, *, axis: str, size: int, dtype: str) -> jax.Array:
    """Return :func:`run` of tokens that are split over ``size`` devices along mesh ``axis``, inside ``shard_map``.

    Keys and values pass every device of the ring once. Each device accumulates the softmax of its own queries.
    Source: ring attention, arXiv 2310.01889.
    """
    following = [(i, (i + 1) % size) for i in range(size)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def parts(k: jax.Array, v: jax.Array) -> list[tuple[jax.Array, ...]]:
        return [
            _partial(_select_frames(q, [queries]), _select_frames(k, keys), _select_frames(v, keys), dtype=dtype)
            for queries, keys in plan
        ]

    def turn(carry: Any, _: None) -> tuple[Any, None]:
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
    """Sharding of attention tensors ``[B, F, n, N, D]`` on the current mesh, outside and inside attention."""

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
        """Sharding of a cache: tokens are not split; heads are split as inside the kernel."""
        return PartitionSpec(self.batch or None, None, None, (*self.heads, *self.context) or None, None)


def _layout(shape: Sequence[int], rules: ShardingRules) -> _Layout | None:
    """Return the layout of an array of ``shape`` on the current mesh; None without a mesh."""
    mesh = constraints.mesh_shape()
    if not mesh:
        return None
    axes = ("batch", None, "tokens", "heads", None)
    batch, _, context, heads, _ = constraints.mesh_axes(axes, shape, mesh, rules)
    size = math.prod(mesh[a] for a in context)
    local_heads = shape[3] // math.prod(mesh[a] for a in heads)
    return _Layout(batch, context, heads, size, ring=local_heads % size != 0)


def _to_heads(x: jax.Array, layout: _Layout) -> jax.Array:
    """Exchange a split of tokens for a split of heads."""
    return jax.lax.all_to_all(x, layout.context, 3, 2, tiled=True) if layout.context else x


def _to_tokens(x: jax.Array, layout: _Layout) -> jax.Array:
    """Exchange a split of heads for a split of tokens."""
    return jax.lax.all_to_all(x, layout.context, 2, 3, tiled=True) if layout.context else x


def attend(
    plan: Plan,
    q: Float[jax.Array, "B F n N D"],
    k: Float[jax.Array, "B F n N D"],
    v: Float[jax.Array, "B F n N D"],
    *,
    dtype: str,
    backend: str,
    rules: ShardingRules,
) -> Float[jax.Array, "B F n N D"]:
    """Return the attention of ``plan`` on arrays with any sharding, float32 of the same shape and sharding."""
    kernel = functools.partial(run, plan, dtype=dtype, backend=backend)
    layout = _layout(q.shape, rules)
    if layout is None:
        return kernel(q, k, v)

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if layout.ring:
            return run_ring(plan, q, k, v, axis=layout.context[0], size=layout.context_size, dtype=dtype)
        # Round to the kernel's type before the exchange, which halves the traffic; the kernel rounds in any case.
        out = kernel(*(_to_heads(x.astype(dtype), layout) for x in (q, k, v)))
        return _to_tokens(out.astype(dtype), layout).astype(jnp.float32)

    return jax.shard_map(local, in_specs=(layout.outside,) * 3, out_specs=layout.outside, check_vma=False)(q, k, v)


def attend_cache(
    kernel: Callable[..., tuple[jax.Array, Any]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: tuple[jax.Array, ...],
    *replicated: Any,
    dtype: str,
    rules: ShardingRules,
) -> tuple[jax.Array, Any]:
    """Run ``kernel(q, k, v, cache, *replicated) -> (output, cache)`` on all tokens of each device's heads.

    The arrays ``[B, S, n, N, D]`` or ``[B, N, T, D]`` of a cache (of an int8 one also the scales) stay split by heads
    between calls. Only queries, keys, values and output of the new block, ``[B, K, n, N, D]``, are exchanged, values
    and output in ``dtype``. ``replicated`` are pytrees of arrays that are equal on all devices.

    Returns:
        The output, float32 ``[B, K, n, N, D]``, and the cache of ``kernel``.

    Raises:
        ConfigError: tensor x context does not divide the heads.
    """
    layout = _layout(q.shape, rules)
    if layout is None:
        return kernel(q, k, v, cache, *replicated)
    require(
        not layout.ring,
        f"{q.shape[3]} attention heads cannot be split over tensor x context in a stream; the product must divide them",
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, *replicated: Any) -> tuple[jax.Array, Any]:
        # Queries and keys are rotated before they are rounded.
        q, k, v = (_to_heads(x, layout) for x in (q, k, v.astype(dtype)))
        out, cache = kernel(q, k, v, cache, *replicated)
        return _to_tokens(out.astype(dtype), layout).astype(jnp.float32), cache

    # A cache of four axes is head-major, [B, N, T, D].
    head_major = PartitionSpec(layout.inside[0], layout.inside[3])
    inside = tuple(head_major if x.ndim == 4 else layout.inside for x in cache)
    return jax.shard_map(
        local,
        in_specs=(layout.outside, layout.outside, layout.outside, inside, *(PartitionSpec() for _ in replicated)),
        out_specs=(layout.outside, inside),
        check_vma=False,
    )(q, k, v, cache, *replicated)


def attend_text(
    q: Float[jax.Array, "B F n N D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    *,
    dtype: str,
    backend: str,
    rules: ShardingRules,
) -> Float[jax.Array, "B F n N D"]:
    """Return the attention of video tokens ``q`` to text ``k, v``, float32 with the shape of q.

    Devices exchange nothing, because the text is not split.
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dense(flatten_frames(q), k, v, dtype=dtype, backend=backend).reshape(q.shape)

    layout = _layout(q.shape, rules)
    if layout is None:
        return local(q, k, v)
    text = PartitionSpec(layout.batch or None, None, layout.heads or None, None)
    return jax.shard_map(local, in_specs=(layout.outside, text, text), out_specs=layout.outside, check_vma=False)(
        q, k, v
    )
