"""Solvers of the probability-flow ODE ``dx / dsigma = v(x, 1000 sigma)``, from noise (sigma 1) down to data (sigma 0).

Each solver is one ``lax.scan`` over the steps. The host computes all coefficients beforehand in float64.

Sources: Euler steps as in CausVid's generation of ODE pairs (``generate_ode_pairs.py``). UniPC, arXiv 2302.04867
(multistep, B2(h), data prediction), with ``alpha = 1 - sigma`` and ``lambda = log(alpha / sigma)`` as in the published
Wan2.1 sampler (``wan/utils/fm_solvers_unipc.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from causvid_jax.config import DiffusionConfig, require
from causvid_jax.diffusion import checks, flow

VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x [B, F, h, w, C], timestep [B, F]) -> velocity

UNIPC_FIRST_U = float(np.float32(0.999))
"""First nominal time of the published grid, which is a float32.

It is below 1 because the log-SNR at sigma 1 is infinite.
"""


def _check(sigmas: np.ndarray, noise: jax.Array) -> np.ndarray:
    sigmas = np.asarray(sigmas, np.float64)
    descend = sigmas.ndim == 1 and len(sigmas) >= 2 and bool(np.all(np.diff(sigmas) < 0))
    require(
        descend and sigmas[0] <= 1 and sigmas[-1] >= 0,
        f"solver sigmas are {np.array2string(sigmas, threshold=8)}; they must be at least two, strictly descending, in "
        "[0, 1]",
    )
    require(jnp.issubdtype(noise.dtype, jnp.floating), f"the noise is of type {noise.dtype}; accepted: floats")
    return sigmas


def euler(
    velocity_fn: VelocityFn,
    noise: Float[jax.Array, "B F h w C"],
    sigmas: np.ndarray,
    *,
    record: Sequence[int] | None = None,
) -> Float[jax.Array, "*states B F h w C"]:
    """Integrate by Euler's method: ``x <- x + (sigma_{i+1} - sigma_i) v(x, 1000 sigma_i)``.

    Args:
        velocity_fn: ``(x, timestep [B, F]) -> velocity``.
        noise: the state at ``sigmas[0]``, ``[B, F, h, w, C]``.
        sigmas: static ``[n + 1]``, descending; the solver makes n network passes.
        record: static indices into ``sigmas`` of the states to return, strictly ascending.

    Returns:
        The state at ``sigmas[-1]``, ``[B, F, h, w, C]``. With ``record``: the states at those indices,
        ``[len(record), B, F, h, w, C]``; index 0 is the noise, index n the result.

    Raises:
        ConfigError: ``sigmas`` does not descend in [0, 1], noise that is not of floats, a velocity of another shape, or
            ``record`` is not ascending within [0, n].
    """
    sigmas = _check(sigmas, noise)
    steps = len(sigmas) - 1
    indices = (steps,) if record is None else tuple(record)
    require(
        len(indices) > 0
        and all(0 <= i <= steps for i in indices)
        and all(a < b for a, b in zip(indices, indices[1:], strict=False)),
        f"record is {indices}; it must be ascending indices within [0, {steps}]",
    )
    # slots[i] is the output index of the state at sigmas[i]; a slot past the end is dropped, so memory does not grow
    # with n.
    slots = np.full(steps + 1, len(indices), np.int32)
    slots[np.asarray(indices, int)] = np.arange(len(indices))

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, states = carry
        timestep, change, slot = inputs
        velocity = velocity_fn(x, jnp.full(x.shape[:2], timestep))
        checks.same_shape(x=x, velocity=velocity)
        x = (x + change * velocity).astype(x.dtype)
        return (x, states.at[slot].set(x, mode="drop")), None

    states = jnp.zeros((len(indices), *noise.shape), noise.dtype).at[slots[0]].set(noise, mode="drop")
    table = (
        jnp.asarray(flow.timestep_from_sigma(sigmas[:-1]), jnp.float32),
        jnp.asarray(np.diff(sigmas), noise.dtype),
        jnp.asarray(slots[1:]),
    )
    (_, states), _ = jax.lax.scan(step, (noise, states), table)
    return states[0] if record is None else states


def unipc_sigmas(steps: int, shift: float) -> np.ndarray:
    """Return the published UniPC grid ``sigma(0.999 (1 - i / steps))``, descending to 0; float64 ``[steps + 1]``."""
    return flow.sigma_from_u(UNIPC_FIRST_U * (1 - np.arange(steps + 1) / steps), shift)


def _unipc_tables(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the corrector weights ``[n, 5]`` and predictor weights ``[n, 3]`` of every step, float64.

    Let m_i be the x0 prediction of step i. The corrected x_i is a weighted sum of
    ``(predicted x_i, corrected x_{i-1}, m_i, m_{i-1}, m_{i-2})``. The predicted x_{i+1} is a weighted sum of
    ``(corrected x_i, m_i, m_{i-1})``.
    """
    steps = len(sigmas) - 1
    alpha = 1 - sigmas
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigmas)  # +inf at the final sigma 0
    order = [min(2, i + 1, steps - i) for i in range(steps)]  # order 1 at the first and at the last step
    corrector, predictor = np.zeros((steps, 5)), np.zeros((steps, 3))
    corrector[0, 0] = 1.0  # the first state is the noise and is not corrected
    for i in range(steps):
        h = lam[i + 1] - lam[i]
        b = np.expm1(-h)
        predictor[i] = sigmas[i + 1] / sigmas[i], -alpha[i + 1] * b, 0.0
        if order[i] == 2:
            ratio = (lam[i - 1] - lam[i]) / h
            weight = -alpha[i + 1] * b * 0.5 / ratio
            predictor[i] += 0.0, -weight, weight
        if i == 0:
            continue
        h = lam[i] - lam[i - 1]
        b = np.expm1(-h)
        scale = -alpha[i] * b
        previous, last = 0.0, 0.5
        if order[i - 1] == 2:
            ratio = (lam[i - 2] - lam[i - 1]) / h
            phi2 = -b / h - 1
            phi3 = -phi2 / h - 0.5
            previous, last = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi2 / b, 2 * phi3 / b])
            previous /= ratio
        corrector[i, 1:] = (
            sigmas[i] / sigmas[i - 1],
            scale * last,
            scale * (1 - last - previous),
            scale * previous,
        )
    return corrector, predictor


def unipc(
    velocity_fn: VelocityFn,
    noise: Float[jax.Array, "B F h w C"],
    sigmas: np.ndarray,
    *,
    integer_timesteps: bool = False,
) -> Float[jax.Array, "B F h w C"]:
    """Integrate by UniPC of order 2 with B2(h), x0 prediction and corrector. The first and last step have order 1.

    Step i makes one network pass. With ``m_i = x_i - sigma_i v_i``, ``h = lambda_{i+1} - lambda_i``,
    ``B = expm1(-h)`` and ``r = (lambda_{i-1} - lambda_i) / h`` it predicts

        x_{i+1} = (sigma_{i+1} / sigma_i) x_i - alpha_{i+1} B (m_i + (m_{i-1} - m_i) / (2 r))

    When m_{i+1} is known, the corrector repeats the step with ``m_{i+1}`` among the differences. All weights are static
    (:func:`_unipc_tables`), so each step is two short weighted sums.

    Args:
        velocity_fn: ``(x, timestep [B, F]) -> velocity``.
        noise: ``[B, F, h, w, C]``.
        sigmas: static ``[n + 1]``, descending, below 1 and ending in 0, e.g. of :func:`unipc_sigmas`.
        integer_timesteps: condition the network on ``floor(1000 sigma)``, as the published sampler does.

    Returns:
        x0, ``[B, F, h, w, C]``.

    Raises:
        ConfigError: ``sigmas`` does not descend in [0, 1], begins at 1 or does not end in 0; noise and velocities as in
            :func:`euler`.
    """
    sigmas = _check(sigmas, noise)
    require(sigmas[0] < 1 and sigmas[-1] == 0, f"UniPC sigmas run from {sigmas[0]} to {sigmas[-1]}; accepted: <1 to 0")
    corrector, predictor = _unipc_tables(sigmas)
    timesteps = flow.timestep_from_sigma(sigmas[:-1])
    if integer_timesteps:
        timesteps = np.floor(timesteps)

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, corrected, m1, m2 = carry
        timestep, sigma, c, p = inputs
        m0 = flow.x0_from_velocity(x, velocity_fn(x, jnp.full(x.shape[:2], timestep)), sigma)
        corrected = c[0] * x + c[1] * corrected + c[2] * m0 + c[3] * m1 + c[4] * m2
        return (p[0] * corrected + p[1] * m0 + p[2] * m1, corrected, m0, m1), None

    table = tuple(jnp.asarray(a, jnp.float32) for a in (timesteps, sigmas[:-1], corrector, predictor))
    zero = jnp.zeros_like(noise)
    (x, *_), _ = jax.lax.scan(step, (noise, zero, zero, zero), table)
    return x


def solve(
    config: DiffusionConfig,
    velocity_fn: VelocityFn,
    noise: Float[jax.Array, "B F h w C"],
    *,
    integer_timesteps: bool = False,
) -> Float[jax.Array, "B F h w C"]:
    """Return x0 ``[B, F, h, w, C]`` from noise, by ``config.solver`` in ``config.num_inference_steps`` network passes.

    ``integer_timesteps`` applies to :func:`unipc` only. The published Euler sampler does not round timesteps.
    """
    if config.solver == "euler":
        return euler(velocity_fn, noise, flow.teacher_sigmas(config))
    sigmas = unipc_sigmas(config.num_inference_steps, config.shift)
    return unipc(velocity_fn, noise, sigmas, integer_timesteps=integer_timesteps)
