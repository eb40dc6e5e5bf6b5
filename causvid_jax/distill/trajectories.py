"""ODE trajectories of the teacher, for the initialisation of the student (CausVid, section 4.3).

The student is trained at a few timesteps only, so only the teacher's states at these timesteps are kept. Their noise
levels must be exact: a state at a neighbouring level would teach the student a wrong scale. Sigmas of the student that
the teacher's Euler grid lacks are therefore inserted. For example, 50 steps become 52 with the timesteps
1000/750/500/250, because 750 and 250 lie at steps 12.5 and 37.5. 48 steps stay 48.
"""

import jax
import numpy as np

from causvid_jax.config import DiffusionConfig
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.solvers import VelocityFn, euler


def trajectory_grid(config: DiffusionConfig) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the Euler grid that contains every denoising timestep, and the indices of these in it.

    Returns:
        Sigmas, float64 ``[n + 1]`` from 1 to 0 (n passes), and the Q + 1 indices of the timesteps and of the final 0.
    """
    levels = np.asarray(flow.student_timesteps(config)) / 1000.0
    grid = flow.teacher_sigmas(config)
    distance = np.abs(levels[:, None] - grid[None, :]).min(axis=1)
    inserted = levels[distance > 1e-9]
    sigmas = np.sort(np.concatenate([grid, inserted]))[::-1]
    indices = [int(np.abs(sigmas - sigma).argmin()) for sigma in levels]
    return sigmas, (*indices, len(sigmas) - 1)


def network_passes(config: DiffusionConfig) -> int:
    """Return the number of the teacher's passes per trajectory. A guided pass evaluates the network twice."""
    return len(trajectory_grid(config)[0]) - 1


def teacher_trajectory(velocity_fn: VelocityFn, noise: jax.Array, config: DiffusionConfig) -> jax.Array:
    """Return the teacher's states at the denoising timesteps, and its x0 at the end.

    Args:
        velocity_fn: the (guided) teacher, ``(x, timestep [B, F]) -> velocity``.
        noise: ``[B, F, h, w, C]``.
        config: the grid and the Q ``denoising_timesteps``. The solver is always Euler, as in the paper.

    Returns:
        ``[Q + 1, B, F, h, w, C]``: state q is at ``flow.student_timesteps(config)[q]``, the last state at 0.
    """
    sigmas, indices = trajectory_grid(config)
    return euler(velocity_fn, noise, sigmas, record=indices)
