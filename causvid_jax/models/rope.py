"""Three-dimensional rotary position embedding (RoPE) of the Wan transformer, computed without a table or length limit.

The head dimension D is D/2 complex pairs, interleaved ``(x[2j], x[2j+1])``, split over (time, row, column) as
``D/2 - 2 floor(D/6)``, ``floor(D/6)``, ``floor(D/6)`` pairs (22, 21, 21 at D = 128). An axis with p pairs rotates
pair j by ``position * theta^(-j / p)`` radians.

Source: Wan2.1, ``wan/modules/model.py``, which has a table of 1024 positions for each axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped


class Rotation(NamedTuple):
    """Cosines and sines of the rotation angles of all tokens, float32 ``[F, n, D / 2]``."""

    cos: Float[jax.Array, "F n pairs"]
    sin: Float[jax.Array, "F n pairs"]


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return the number of complex pairs for time, rows and columns."""
    side = head_dim // 2 // 3
    return head_dim // 2 - 2 * side, side, side


def rotation(frames: Shaped[jax.Array, "F"], rows: int, columns: int, *, head_dim: int, theta: float) -> Rotation:
    """Return the rotation of all tokens at the time positions ``frames [F]``: ``n = rows * columns`` tokens a frame.

    Positions of a clip are small enough for float32. :func:`stream_rotation` serves a stream of any length.
    """
    time = frames.astype(jnp.float32)[:, None] * _frequencies(axis_pairs(head_dim)[0], theta).astype(np.float32)
    return _grid(time, rows, columns, head_dim, theta)


def stream_rotation(
    frames: Shaped[jax.Array, "F"], rows: int, columns: int, *, head_dim: int, theta: float
) -> Rotation:
    """Return :func:`rotation` by angles modulo 2 pi, for int32 ``frames [F]`` of any size.

    A full turn is 2^32 in unsigned integers, so ``position * frequency`` wraps around exactly. The angle between two
    frames then depends on their distance alone (to 2 pi 2^-33 per frame) in a stream of any length, so keys can be
    stored rotated. A float32 product loses this beyond some thousand frames.
    """
    turns = _frequencies(axis_pairs(head_dim)[0], theta) / (2.0 * np.pi)
    step = jnp.asarray(np.round(turns * 2.0**32).astype(np.uint32))
    wrapped = jax.lax.bitcast_convert_type(frames.astype(jnp.uint32)[:, None] * step, jnp.int32)
    return _grid(wrapped.astype(jnp.float32) * np.float32(2.0 * np.pi / 2.0**32), rows, columns, head_dim, theta)


def _frequencies(pairs: int, theta: float) -> np.ndarray:
    return theta ** (-np.arange(pairs) / max(pairs, 1))


def _grid(time: jax.Array, rows: int, columns: int, head_dim: int, theta: float) -> Rotation:
    """Return the rotation of all tokens from the angles of the time axis, ``time [F, pairs]``.

    Cosines and sines are computed before they are spread over the tokens. XLA would else compute them again for every
    head of every example, inside the rotation of the cached keys.
    """
    pairs = axis_pairs(head_dim)
    row, column = (
        jnp.arange(size).astype(jnp.float32)[:, None] * jnp.asarray(_frequencies(count, theta), jnp.float32)
        for size, count in zip((rows, columns), pairs[1:], strict=True)
    )
    shape = (time.shape[0], rows, columns)

    def spread(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        grid = jnp.concatenate(
            [
                jnp.broadcast_to(function(time)[:, None, None], (*shape, pairs[0])),
                jnp.broadcast_to(function(row)[None, :, None], (*shape, pairs[1])),
                jnp.broadcast_to(function(column)[None, None, :], (*shape, pairs[2])),
            ],
            axis=-1,
        )
        return grid.reshape(shape[0], rows * columns, head_dim // 2)

    return Rotation(spread(jnp.cos), spread(jnp.sin))


def rotate(
    x: Float[jax.Array, "B F n N D"],
    rotation: Rotation,
    *,
    halves: bool = False,
    exchange: bool = False,
) -> Float[jax.Array, "B F n N D"]:
    """Return ``x [B, F, n, N, D]`` rotated, in float32.

    Pair (a, b) becomes ``(a cos - b sin, a sin + b cos)``.

    ``halves``: pair j is ``(x[j], x[D / 2 + j])`` instead of ``(x[2 j], x[2 j + 1])`` (``models.unstacked``). With
    ``exchange`` they are rotated as ``x [cos, cos] + roll(x) [-sin, sin]``: half a head fills half of a TPU's register.
    """
    x = x.astype(jnp.float32)
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]  # [F, n, 1, D/2]
    if halves and exchange:
        exchanged = jnp.roll(x, x.shape[-1] // 2, axis=-1)
        return x * jnp.concatenate([cos, cos], axis=-1) + exchanged * jnp.concatenate([-sin, sin], axis=-1)
    if halves:
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
