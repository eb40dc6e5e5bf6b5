"""Attention: one dense kernel, and what each reading of the network lets a token see.

A block-causal mask is a handful of dense calls over static slices of the keys (block i attends to what precedes its
end), so every backend's fastest dense kernel applies and nothing of size T x T exists. Tensors are
``[B, F, n, N, D]``: F frames of n tokens, N heads of size D.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from causvid_jax.config import CausalConfig


def dense(
    q: jax.Array, k: jax.Array, v: jax.Array, *, dtype: str, backend: str = "xla", mask: jax.Array | None = None
) -> jax.Array:
    """``softmax(q k^T / sqrt(D)) v`` over all keys, or over those where ``mask [S]`` (shared by all queries) is true.

    ``q [B, T, N, D]``, ``k, v [B, S, N, D]``; returns float32 ``[B, T, N, D]``. ``backend`` is ``"xla"`` (any
    device) or ``"cudnn"`` (``jax.nn.dot_product_attention``, bfloat16 on GPU).
    """
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    if backend == "cudnn":
        full = None if mask is None else jnp.broadcast_to(mask, (1, 1, q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=full, implementation="cudnn").astype(jnp.float32)
    scores = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnts,bsnd->btnd", weights.astype(dtype), v, preferred_element_type=jnp.float32)


def _frames_dense(q, k, v, *, dtype, backend):
    """:func:`dense` on ``[B, F, n, N, D]`` tensors."""
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v)]
    return dense(*flat, dtype=dtype, backend=backend).reshape(q.shape)


def bidirectional(q: jax.Array, k: jax.Array, v: jax.Array, *, dtype: str, backend: str) -> jax.Array:
    """Every token sees every token."""
    return _frames_dense(q, k, v, dtype=dtype, backend=backend)


def visible_frames(end: int, causal: CausalConfig) -> list[tuple[int, int]]:
    """Half-open ranges of frames that a block ending at frame ``end`` sees: the sink and the window."""
    start = max(0, end - causal.window) if causal.window else 0
    sink = min(causal.sink, start)
    return [(0, sink), (start, end)] if sink else [(start, end)]


def _take(x: jax.Array, ranges: Sequence[tuple[int, int]]) -> jax.Array:
    parts = [x[:, a:b] for a, b in ranges if b > a]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def block_causal(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: CausalConfig, dtype: str, backend: str
) -> jax.Array:
    """Each block sees itself and what :func:`visible_frames` gives (paper, eq. 5)."""
    outputs, end = [], 0
    for size in causal.block_sizes(q.shape[1]):
        start, end = end, end + size
        ranges = visible_frames(end, causal)
        outputs.append(_frames_dense(q[:, start:end], _take(k, ranges), _take(v, ranges), dtype=dtype, backend=backend))
    return jnp.concatenate(outputs, axis=1)


def teacher_forcing(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: CausalConfig, dtype: str, backend: str
) -> jax.Array:
    """Frames are ``[clean F ; noisy F]``: a noisy block sees itself and earlier *clean* blocks, a clean block the clean
    blocks up to itself."""
    frames = q.shape[1] // 2
    clean = block_causal(q[:, :frames], k[:, :frames], v[:, :frames], causal=causal, dtype=dtype, backend=backend)
    outputs, end = [clean], 0
    for size in causal.block_sizes(frames):
        start, end = end, end + size
        # The window counts the noisy block itself, whose clean copy must stay hidden.
        ranges = [(a, min(b, start)) for a, b in visible_frames(end, causal)]
        ranges.append((frames + start, frames + end))
        outputs.append(
            _frames_dense(
                q[:, frames + start : frames + end], _take(k, ranges), _take(v, ranges), dtype=dtype, backend=backend
            )
        )
    return jnp.concatenate(outputs, axis=1)
