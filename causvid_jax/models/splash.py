"""Attention by JAX's splash kernel for TPU.

The kernel computes scores in blocks of queries and keys. Blocks of keys that the mask hides completely are neither
fetched nor computed. The device decides this at run time, so one program serves every number of visible keys. While the
window of a stream is not full, the cost is that of the visible frames.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from causvid_jax.sharding import constraints

BLOCK = 512
"""Queries and keys of a block of scores."""
GRADIENT_KEYS = 2048
"""Most keys whose gradients the backward kernel holds in fast memory.

For each part of the keys the kernel writes a gradient of all queries; the sum over the parts is the gradient. With
parts of 512 keys these arrays were a third of the memory of the fake score's backward pass (docs/performance.md).
"""


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, name: str | None = None
) -> jax.Array:
    """Return :func:`causvid_jax.models.attention.dense` (in interpret mode on CPU, which is slow).

    The kernel needs lengths divisible by its block sizes and head sizes divisible by 128 lanes, so all arrays are
    padded with zeros. Padded and masked keys get a segment that contains no query.
    """
    s = k.shape[1]
    segment = jnp.ones((s,), bool) if mask is None else mask

    def pad(x: jax.Array) -> jax.Array:  # [B, S, N, D] -> [B, N, S', D]
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded(s) - s), (0, 0), (0, 0))), 1, 2)

    segment = jnp.pad(segment, (0, padded(s) - s))
    return head_major_attention(q, pad(k), pad(v), segment, name, skips=mask is not None)


def head_major_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, name: str | None = None, *, skips: bool = True
) -> jax.Array:
    """Return :func:`attention` for ``k, v [B, N, S, D]`` and ``mask [S]``, where S is :func:`padded`.

    If ``skips``, blocks of keys that the mask hides completely are skipped.
    """
    (_, t, n, d), s = q.shape, k.shape[2]
    block_q, block_kv, padded_t = block_size(t), block_size(s), padded(t)

    def whole_lanes(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -d % 128))) if d % 128 else x

    segments = splash.SegmentIds(q=jnp.ones((padded_t,), jnp.int32), kv=mask.astype(jnp.int32))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((padded_t, s))] * n),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=gradient_keys(s, block_kv),
            block_kv_dkv_compute=block_kv,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=name,
        interpret=constraints.platform() == "cpu",
    )
    if skips:
        kernel = _skipping(kernel, visible_blocks(mask), padded_t // block_q)
    scaled = jnp.swapaxes(jnp.pad(q * d**-0.5, ((0, 0), (0, padded_t - t), (0, 0), (0, 0))), 1, 2)
    arrays = (whole_lanes(x) for x in (scaled, k, v))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(*arrays, segments)
    return jnp.swapaxes(out, 1, 2)[:, :t, :, :d].astype(jnp.float32)


def padded(length: int) -> int:
    """Return the length rounded up to whole blocks."""
    size = block_size(length)
    return -(-length // size) * size


def block_size(length: int) -> int:
    """Return the size of a block for ``length`` queries or keys."""
    return min(BLOCK, -(-length // 128) * 128)


def gradient_keys(keys: int, block: int) -> int:
    """Return the keys in a part of the backward pass: whole blocks that divide ``keys``, up to ``GRADIENT_KEYS``."""
    blocks = keys // block
    return block * max(n for n in range(1, max(1, GRADIENT_KEYS // block) + 1) if blocks % n == 0)


def visible_blocks(mask: jax.Array) -> jax.Array:
    """Return whether each block of keys has a key where ``mask``, bool ``[S]``, is true: bool ``[ceil(S / block)]``."""
    size = block_size(len(mask))
    return jnp.pad(mask, (0, -len(mask) % size)).reshape(-1, size).any(1)


def _skipping(kernel: splash.SplashAttentionKernel, visible: jax.Array, rows: int) -> splash.SplashAttentionKernel:
    """Return the kernel with a forward pass over only the ``visible`` blocks of keys, for ``rows`` blocks of queries.

    The backward pass computes all blocks.
    """
    # A hidden block gets the index of the block before it, which is in fast memory already.
    fetched = jax.lax.cummax(jnp.where(visible, jnp.arange(len(visible), dtype=jnp.int32), 0))
    whole = jnp.where(visible, jnp.int32(2), jnp.int32(0))  # of splash's block mask: 0 is skipped, 2 is computed
    data_next, block_mask = (jnp.broadcast_to(x, (1, rows, len(visible))) for x in (fetched, whole))
    info = MaskInfo(data_next, None, block_mask, None, None, is_dynamic_mask=True)
    return splash.SplashAttentionKernel(info, kernel.dq_mask_info, kernel.dkv_mask_info, **kernel.kwargs)
