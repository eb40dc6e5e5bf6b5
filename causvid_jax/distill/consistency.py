"""Causal consistency distillation: the student learns to jump to the end of the causal teacher's ODE, on real latents.

Every block of a clip has its own noise level and attends to the clean blocks before it (teacher forcing).

Discrete (Causal Forcing++, arXiv 2605.15141). On a grid ``1 = s_0 > ... > s_n = 0`` the guided teacher takes one Euler
step, ``x' = x + (s_{i+1} - s_i) v_T(x, s_i)``. The student at x and its EMA at x' must predict the same x0:

    L = mean (x0_student(x, s_i) - x0_ema(x', s_{i+1}))^2,      x0(x, s) = x - s v,  x0_ema(x', 0) = x'

Continuous (rCM, arXiv 2510.08431; Causal-rCM, 2606.25473). In TrigFlow, ``x = cos(t) x0 + sin(t) noise`` with
``tan t = s / (1 - s)``, a network predicts ``F = cos(t) noise - sin(t) x0``, the velocity dx/dt. With the teacher's
F_T, ``dF`` the tangent of the student along ``(cos t sin t F_T, cos t sin t)`` and r growing from 0 to 1:

    g = -cos t sqrt(1 - r^2 sin^2 t) (F - F_T) - r (cos t sin t x + dF)
    L = scale * sum (F - stopgrad(F + g / (|g| + 0.1)))^2        sum and norm over one block, mean over blocks

At r = 1, g is ``cos t`` times the derivative of the student's x0 along the teacher's ODE. So g is 0 if the student is
consistent. rCM draws t from a log-normal distribution; here t comes from ``s(u)`` of a uniform u.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.diffusion import flow

VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t, timestep [B, F]) -> velocity
Metrics = dict[str, jax.Array]


class Networks(NamedTuple):
    """Three functions ``(x_t, timestep [B, F]) -> velocity``, for blocks with a clean past.

    Attributes:
        student: the trained network.
        target: the student's EMA (discrete), or the student in a form that ``jax.jvp`` accepts (continuous).
        teacher: the causal teacher, guided.
    """

    student: VelocityFn
    target: VelocityFn
    teacher: VelocityFn


def x0_of(velocity: VelocityFn, x_t: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return ``x0 = x_t - sigma v``, float32 ``[B, F, h, w, C]``, for noise levels ``sigma [B, F]``."""
    predicted = velocity(x_t, flow.timestep_from_sigma(sigma)).astype(jnp.float32)
    return flow.x0_from_velocity(x_t, predicted, sigma)


def discrete_loss(
    networks: Networks, latents: jax.Array, key: jax.Array, *, sigmas: np.ndarray, block_sizes: Sequence[int]
) -> tuple[jax.Array, Metrics]:
    """Return the discrete loss (module docstring) and metrics.

    Args:
        networks: student, its EMA and the teacher.
        latents: real clips, ``[B, F, h, w, C]``.
        key: draws the grid step of every block and the noise.
        sigmas: noise levels of the grid, static ``[n + 1]``, from 1 to 0.
        block_sizes: latent frames of each block.

    Returns:
        The scalar loss and ``{"loss"}``.
    """
    step_key, noise_key = jax.random.split(key)
    step = jax.random.randint(step_key, (len(latents), len(block_sizes)), 0, len(sigmas) - 1)
    grid = jnp.asarray(sigmas, jnp.float32)
    sigma, following = (flow.per_frame(grid[step + i], block_sizes) for i in (0, 1))
    x_t = flow.add_noise(latents, jax.random.normal(noise_key, latents.shape), sigma)
    velocity = networks.teacher(x_t, flow.timestep_from_sigma(sigma)).astype(jnp.float32)
    after = x_t + flow.expand(following - sigma, x_t) * velocity
    target = jax.lax.stop_gradient(x0_of(networks.target, after, following))
    loss = jnp.mean(jnp.square(x0_of(networks.student, x_t, sigma) - target))
    return loss, {"loss": loss}


def trig_velocity(velocity: VelocityFn, x: jax.Array, t: jax.Array) -> jax.Array:
    """Return F of a network at TrigFlow's ``x = cos(t) x0 + sin(t) noise``, for angles ``t [B, F]`` in [0, pi / 2].

    With ``d = 1 / (cos t + sin t)``, ``x_t = d x`` lies on the linear path at ``s = d sin t``, and
    ``F = (cos t - sin t) x_t + d v``.
    """
    cos, sin = jnp.cos(t), jnp.sin(t)
    scale = 1 / (cos + sin)
    x_t = flow.expand(scale, x) * x
    v = velocity(x_t, flow.timestep_from_sigma(scale * sin)).astype(jnp.float32)
    return flow.expand(cos - sin, x) * x_t + flow.expand(scale, x) * v


def continuous_tangent(
    networks: Networks, x: jax.Array, t: jax.Array, student: jax.Array, ratio: jax.Array | float
) -> jax.Array:
    """Return the tangent g (module docstring) at ``x [B, F, h, w, C]``, with the shape of x.

    Args:
        networks: teacher, and the student for the derivative (``target``).
        x: latents on TrigFlow's path.
        t: angles ``[B, F]``.
        student: the student's F at x and t, with the shape of x.
        ratio: r, from 0 to 1.
    """
    cos, sin = (flow.expand(f(t), x) for f in (jnp.cos, jnp.sin))
    teacher = trig_velocity(networks.teacher, x, t)
    along = jax.lax.stop_gradient((cos * sin * teacher, jnp.cos(t) * jnp.sin(t)))
    _, tangent = jax.jvp(lambda x, t: trig_velocity(networks.target, x, t), (x, t), along)
    return -cos * jnp.sqrt(1 - ratio**2 * sin**2) * (student - teacher) - ratio * (cos * sin * x + tangent)


def continuous_loss(
    networks: Networks,
    latents: jax.Array,
    key: jax.Array,
    *,
    shift: float,
    block_sizes: Sequence[int],
    ratio: jax.Array | float,
    scale: float,
) -> tuple[jax.Array, Metrics]:
    """Return the continuous loss (module docstring) and metrics. No gradient passes through the tangent.

    Args:
        networks: student, the student for the tangent, and the teacher.
        latents: real clips, ``[B, F, h, w, C]``.
        key: draws one noise level per block, ``sigma_from_u`` of a uniform number and ``shift``, and the noise.
        shift: of the noise levels.
        block_sizes: latent frames of each block.
        ratio: r, from 0 to 1.
        scale: factor of the loss.

    Returns:
        The scalar loss, and ``{"loss", "tangent"}`` with the mean of ``|g|`` over blocks.
    """
    u_key, noise_key = jax.random.split(key)
    sigma = flow.sigma_from_u(jax.random.uniform(u_key, (len(latents), len(block_sizes))), shift)
    t = flow.per_frame(jnp.arctan2(sigma, 1 - sigma), block_sizes)
    cos, sin = (flow.expand(f(t), latents) for f in (jnp.cos, jnp.sin))
    x = cos * latents + sin * jax.random.normal(noise_key, latents.shape)
    student = trig_velocity(networks.student, x, t)
    g = jax.lax.stop_gradient(continuous_tangent(networks, x, t, student, ratio))
    member = np.repeat(np.eye(len(block_sizes), dtype=np.float32), np.asarray(block_sizes), axis=0)  # [F, n]

    def block_sum(values: jax.Array) -> jax.Array:
        # By default accelerators multiply float32 with less precision.
        return jnp.matmul(jnp.sum(values, axis=(2, 3, 4)), member, precision=jax.lax.Precision.HIGHEST)

    norm = jnp.sqrt(block_sum(jnp.square(g)))
    unit = g / flow.expand(flow.per_frame(norm + 0.1, block_sizes), g)
    # A block whose tangent is not finite is left out, as in the published code.
    finite = flow.expand(flow.per_frame(jnp.isfinite(norm), block_sizes), g) > 0
    error = jnp.where(finite, student - jax.lax.stop_gradient(student) - jnp.where(finite, unit, 0.0), 0.0)
    loss = scale * jnp.mean(block_sum(jnp.square(error)))
    return loss, {"loss": loss, "tangent": jnp.mean(jnp.where(jnp.isfinite(norm), norm, 0.0))}
