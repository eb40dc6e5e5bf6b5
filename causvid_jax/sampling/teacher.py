"""The teacher's way to a video: the whole clip at once, by a many-step solver."""

import jax
import jax.numpy as jnp

from causvid_jax.config import Recipe
from causvid_jax.diffusion import solvers
from causvid_jax.sampling import stream


def solve_clip(velocity: solvers.VelocityFn, seeds: jax.Array, *, config: Recipe) -> jax.Array:
    """Latents ``[B, F, h, w, C]`` at the end of the recipe's ODE under ``velocity``, guidance included.

    Args:
        velocity: of the whole clip.
        seeds: uint32 ``[B]``, one per clip; the noise is that of a stream's first block, F frames long.
        config: the recipe. With the published code's numerics the network is told whole timesteps.
    """
    noise = stream.block_noise(seeds, jnp.int32(0), jnp.int32(0), config.latent_shape)
    return solvers.solve(config.diffusion, velocity, noise, integer_timesteps=config.teacher.precision == "wan")
