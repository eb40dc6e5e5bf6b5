"""Distribution matching distillation (DMD) of a two-dimensional Gaussian, drawn step by step.

The real score is the exact score of a Gaussian. The student is an affine map of noise, which starts as a small round
cloud elsewhere. The fake score is that of a Gaussian whose mean and covariance are trained to follow the student. The
losses are those that distil a video model: ``causvid_jax.distill.dmd``. A "video" here is one pixel with two channels.

    python examples/dmd_gaussian.py --output=dmd_gaussian.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from causvid_jax.config import DiffusionConfig, DistillStageConfig
from causvid_jax.diffusion import flow
from causvid_jax.distill import dmd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEAN = jnp.array([1.5, -0.5])
COVARIANCE = jnp.array([[1.0, 0.7], [0.7, 0.8]])
DIFFUSION = DiffusionConfig(shift=1.0)
DISTILL = DistillStageConfig(guidance_scale=1.0)
NO_PROMPT = jnp.zeros((1, 1, 1))


def gaussian_velocity(mean: jax.Array, covariance: jax.Array, x_t: jax.Array, timestep: jax.Array) -> jax.Array:
    """Return the exact velocity of the data distribution N(mean, covariance): ``v = (x_t - E[x0 | x_t]) / sigma``.

    ``E[x0 | x_t] = mean + (1 - sigma) C M^-1 (x_t - (1 - sigma) mean)`` with ``M = (1 - sigma)^2 C + sigma^2 I``. Both
    ``x_t`` and the result are ``[..., 2]``; ``timestep`` is one number for all of them.
    """
    sigma = flow.sigma_from_timestep(timestep[0, 0])
    marginal = (1 - sigma) ** 2 * covariance + sigma**2 * jnp.eye(2)
    gain = (1 - sigma) * covariance @ jnp.linalg.inv(marginal)
    x0 = mean + (x_t - (1 - sigma) * mean) @ gain.T
    return (x_t - x0) / sigma


def velocity_per_sample(mean: jax.Array, covariance: jax.Array):
    """Return a score function ``(x [B, 1, 1, 1, 2], timestep [B, 1], prompt_embeds) -> velocity``."""
    per_sample = jax.vmap(lambda x, t: gaussian_velocity(mean, covariance, x[None], t[None])[0])
    return lambda x, timestep, _: per_sample(x, timestep)


def covariance_of(params: dict[str, jax.Array]) -> jax.Array:
    """Return the covariance ``A A^T + 1e-4 I`` of a Gaussian with the trained matrix A."""
    return params["matrix"] @ params["matrix"].T + 1e-4 * jnp.eye(2)


def generate(params: dict[str, jax.Array], key: jax.Array, count: int) -> jax.Array:
    """Return the student's samples ``[count, 1, 1, 1, 2]``."""
    return params["mean"] + jax.random.normal(key, (count, 1, 1, 1, 2)) @ params["matrix"].T


def train(steps: int, batch: int = 256, critic_steps: int = 5, seed: int = 0) -> list[dict[str, jax.Array]]:
    """Distil for ``steps`` student updates and return the student before each of them and at the end."""
    student = {"mean": jnp.array([-2.0, 1.5]), "matrix": 0.3 * jnp.eye(2)}
    critic = jax.tree.map(jnp.copy, student)
    optimizer = optax.adam(2e-2, b1=0.0, b2=0.99)
    states = optimizer.init(student), optimizer.init(critic)
    real = velocity_per_sample(MEAN, COVARIANCE)

    def student_loss(student, critic, key):
        x0 = generate(student, key, batch)
        prompts = jnp.broadcast_to(NO_PROMPT, (batch, 1, 1))
        fake = velocity_per_sample(critic["mean"], covariance_of(critic))
        settings = {"teacher": real, "fake": fake, "diffusion": DIFFUSION, "distill": DISTILL}
        return dmd.generator_loss(x0, prompts, NO_PROMPT[0], jax.random.fold_in(key, 1), **settings)[0]

    def fake_loss(critic, student, key):
        x0 = generate(student, key, batch)
        fake = velocity_per_sample(critic["mean"], covariance_of(critic))
        prompts = jnp.broadcast_to(NO_PROMPT, (batch, 1, 1))
        settings = {"fake": fake, "diffusion": DIFFUSION, "distill": DISTILL}
        return dmd.critic_loss(x0, prompts, jax.random.fold_in(key, 1), **settings)[0]

    @jax.jit
    def step(student, critic, states, key):
        student_state, critic_state = states
        for i in range(critic_steps):
            gradient = jax.grad(fake_loss)(critic, student, jax.random.fold_in(key, i))
            updates, critic_state = optimizer.update(gradient, critic_state)
            critic = optax.apply_updates(critic, updates)
        gradient = jax.grad(student_loss)(student, critic, jax.random.fold_in(key, critic_steps))
        updates, student_state = optimizer.update(gradient, student_state)
        return optax.apply_updates(student, updates), critic, (student_state, critic_state)

    history = [student]
    for key in jax.random.split(jax.random.key(seed), steps):
        student, critic, states = step(student, critic, states, key)
        history.append(student)
    return history


def draw(history: list[dict[str, jax.Array]], path: str) -> None:
    """Draw the student's samples at six steps over samples of the real distribution."""
    factor = jnp.linalg.cholesky(COVARIANCE)
    real = np.asarray(MEAN + jax.random.normal(jax.random.key(1), (500, 2)) @ factor.T)
    figure, axes = plt.subplots(1, 6, figsize=(15, 2.9), sharex=True, sharey=True)
    for axis, step in zip(axes, np.linspace(0, len(history) - 1, 6).astype(int), strict=True):
        samples = np.asarray(generate(history[step], jax.random.key(2), 500)).reshape(-1, 2)
        axis.scatter(*real.T, s=3, color="0.75", label="real")
        axis.scatter(*samples.T, s=3, color="tab:red", label="student")
        axis.set(title=f"student update {step}", xlim=(-4, 5), ylim=(-4, 4), aspect="equal")
    axes[0].legend(loc="lower left", markerscale=3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> dict[str, jax.Array]:
    """Train, draw and return the last student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="student updates")
    parser.add_argument("--output", default="dmd_gaussian.png", help="the picture")
    options = parser.parse_args(arguments)
    history = train(options.steps)
    draw(history, options.output)
    print("mean", np.round(history[-1]["mean"], 2), "covariance", np.round(covariance_of(history[-1]), 2).tolist())
    return history[-1]


if __name__ == "__main__":
    main()
