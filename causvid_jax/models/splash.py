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
    (_, t, n, d), s = q.shape, k.shape[1]
    block_q, block_kv = block_size(t), block_size(s)
    padded_t, padded_s = -(-t // block_q) * block_q, -(-s // block_kv) * block_kv

    def pad(x: jax.Array, length: int) -> jax.Array:  # [B, T, N, D] -> [B, N, T', D']
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -d % 128)))
        return jnp.swapaxes(x, 1, 2)

    segment = jnp.ones((s,), jnp.int32) if mask is None else mask.astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones((padded_t,), jnp.int32), kv=jnp.pad(segment, (0, padded_s - s)))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((padded_t, padded_s))] * n),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=gradient_keys(padded_s, block_kv),
            block_kv_dkv_compute=block_kv,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=name,
        interpret=constraints.platform() == "cpu",
    )
    if mask is not None:
        kernel = _skipping(kernel, visible_blocks(mask), padded_t // block_q)
    scaled = pad(q * q.shape[-1] ** -0.5, padded_t)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(scaled, pad(k, padded_s), pad(v, padded_s), segments)
    return jnp.swapaxes(out, 1, 2)[:, :t, :, :d].astype(jnp.float32)


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
