"""Three-dimensional rotary position embedding (RoPE) of the Wan transformer, computed without a table or length limit.

The head dimension D is D/2 complex pairs, interleaved ``(x[2j], x[2j+1])``, split over (time, row, column) as
``D/2 - 2 floor(D/6)``, ``floor(D/6)``, ``floor(D/6)`` pairs (22, 21, 21 at D = 128). An axis with p pairs rotates
pair j by ``position * theta^(-j / p)``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return the number of complex pairs for time, rows and columns."""
    side = head_dim // 2 // 3
    return head_dim // 2 - 2 * side, side, side


def angles(
    frames: Shaped[jax.Array, "F"], rows: int, columns: int, *, head_dim: int, theta: float
) -> Float[jax.Array, "F n pairs"]:
    """Return the rotation angles of all tokens, float32 ``[F, rows * columns, D / 2]``; ``frames [F]`` are time
    positions.

    Attention depends on differences of positions only. A long stream therefore passes positions relative to the current
    block, which float32 represents exactly.
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


def rotate(x: Float[jax.Array, "B F n N D"], angle: Float[jax.Array, "F n pairs"]) -> Float[jax.Array, "B F n N D"]:
    """Rotate ``x [B, F, n, N, D]`` by ``angle [F, n, D / 2]``; the result is float32."""
    x = x.astype(jnp.float32)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]  # [F, n, 1, D/2]
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
