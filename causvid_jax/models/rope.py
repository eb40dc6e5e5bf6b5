"""Three-dimensional rotary position embedding of the Wan DiT, computed from positions: no table, no length limit.

The head dimension D is D/2 complex pairs, interleaved ``(x[2j], x[2j+1])``, split over (time, row, column) as
``D/2 - 2 floor(D/6)``, ``floor(D/6)``, ``floor(D/6)`` pairs (22, 21, 21 at D = 128). An axis with p pairs turns pair
j by ``position * theta^(-j / p)``.
"""

import jax
import jax.numpy as jnp
import numpy as np


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs given to time, rows and columns."""
    side = head_dim // 2 // 3
    return head_dim // 2 - 2 * side, side, side


def angles(frames: jax.Array, rows: int, columns: int, *, head_dim: int, theta: float) -> jax.Array:
    """Rotation angles of every token of ``frames`` (time positions ``[F]``) on a rows x columns grid.

    Returns float32 ``[F, rows * columns, D / 2]``. Only differences of positions matter to attention, so a caller
    with a long stream passes positions relative to the current block, which float32 holds exactly.
    """
    pairs = axis_pairs(head_dim)
    frequencies = [jnp.asarray(theta ** (-np.arange(p) / max(p, 1)), jnp.float32) for p in pairs]
    time, row, column = (
        position.astype(jnp.float32)[:, None] * frequency
        for position, frequency in zip((frames, jnp.arange(rows), jnp.arange(columns)), frequencies, strict=True)
    )
    shape = (frames.shape[0], rows, columns)
    grid = jnp.concatenate(
        [
            jnp.broadcast_to(time[:, None, None], (*shape, pairs[0])),
            jnp.broadcast_to(row[None, :, None], (*shape, pairs[1])),
            jnp.broadcast_to(column[None, None, :], (*shape, pairs[2])),
        ],
        axis=-1,
    )
    return grid.reshape(shape[0], rows * columns, head_dim // 2)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """``x [B, F, n, N, D]`` turned by ``angle [F, n, D / 2]``; float32."""
    x = x.astype(jnp.float32)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]  # [F, n, 1, D/2]
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
