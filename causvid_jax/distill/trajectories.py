"""ODE trajectories of the teacher, for the student's initialisation (paper section 4.3).

The student is trained at a few timesteps only, so only the teacher's states there are kept, and they must be *at*
those timesteps: a state at a neighbouring noise level would teach the student a wrong scale. The student's sigmas are
therefore inserted into the teacher's Euler grid where they are not on it already: 50 steps and 1000/750/500/250 make 52
(750 and 250 are the halves 12.5 and 37.5), while 48 steps stay 48.
"""

import jax
import numpy as np

from causvid_jax.config import DiffusionConfig
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.solvers import VelocityFn, euler


def trajectory_grid(config: DiffusionConfig) -> tuple[np.ndarray, tuple[int, ...]]:
    """The Euler grid through every student timestep, and where those are on it.

    Returns:
      Sigmas, float64 ``[n + 1]``, descending from 1 to 0, and the Q + 1 indices of the student's Q timesteps and of
      the final 0. The teacher needs n passes per trajectory.
    """
    wanted = np.asarray(flow.student_timesteps(config)) / 1000.0
    grid = flow.teacher_sigmas(config)
    apart = np.abs(wanted[:, None] - grid[None, :]).min(axis=1)
    missing = wanted[apart > 1e-9]
    sigmas = np.sort(np.concatenate([grid, missing]))[::-1]
    indices = [int(np.abs(sigmas - sigma).argmin()) for sigma in wanted]
    return sigmas, (*indices, len(sigmas) - 1)


def network_passes(config: DiffusionConfig) -> int:
    """Teacher evaluations per trajectory (each a conditional and an unconditional one, if guided)."""
    return len(trajectory_grid(config)[0]) - 1


def teacher_trajectory(velocity_fn: VelocityFn, noise: jax.Array, config: DiffusionConfig) -> jax.Array:
    """The teacher's states at the student's timesteps, ending in its x0.

    Args:
      velocity_fn: the (guided) teacher, ``(x, timestep [B, F]) -> velocity``.
      noise: ``[B, F, h, w, C]``.
      config: the grid (``shift``, ``num_inference_steps``) and the Q ``denoising_timesteps``. Always Euler, as in the
      paper.

    Returns:
      ``[Q + 1, B, F, h, w, C]``, state q being at ``flow.student_timesteps(config)[q]``, the last one at 0.
    """
    sigmas, indices = trajectory_grid(config)
    return euler(velocity_fn, noise, sigmas, record=indices)
