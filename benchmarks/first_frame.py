"""Measure how much the first latent frame of a continued rollout changes the teacher's velocity of the other frames.

A continued rollout starts in the middle of a stream, where a latent frame holds four frames. The teacher was trained on
clips whose first latent frame holds one. ``python benchmarks/first_frame.py`` takes the second clip of streams of the
digits student and runs the teacher on it twice: with the clip's first latent frame from the stream, and with the last
pixel frame of this latent frame, encoded as the first frame of a clip. Noise and all other latent frames are the same.
It prints, for each timestep, the relative difference of the two velocities on the other latent frames, on the second
and on the last one, and for both inputs the mean square of ``velocity - (noise - x0)`` over the other latent frames.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import causvid_jax as cv
from causvid_jax.data import digits
from causvid_jax.diffusion.guidance import guided_velocity
from causvid_jax.models import transformer
from causvid_jax.text import encoder

TIMESTEPS = (250.0, 500.0, 750.0, 900.0)


def clips(prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return latents ``[B, F, h, w, C]`` of the second clip of streams, and the latent of its first frame alone."""
    pipe = cv.load("digits")
    frames = pipe.config.latent_shape[0]
    blocks = 2 * frames // pipe.config.causal.frames_per_block
    state = pipe.stream(prompts, seed=0)
    latents = np.concatenate([np.asarray(x) for x, _ in pipe.latents(state, blocks)], axis=1)
    shown = pipe.decode(jnp.asarray(latents))[:, 4 * frames : 4 * frames + 1]
    return latents[:, frames:], np.asarray(pipe.encode(shown))


def main(count: int) -> None:
    """Print a line for each timestep, over ``count`` prompts."""
    teacher = cv.load_teacher("digits")
    recipe = teacher.config
    prompts = list(digits.captions(recipe.data, "train"))[:: max(1, 500 // count)][:count]
    x0, first = clips(prompts)
    text, negative = teacher.encode_prompt(prompts), encoder.negative_prompt_embeds(teacher.encoder)
    noise = np.asarray(jax.random.normal(jax.random.key(0), x0.shape))

    @jax.jit
    def velocity(x, timestep):
        def network(x, timestep, text):
            return transformer.bidirectional(teacher.params["teacher"], x, timestep, text, config=recipe.teacher)

        return guided_velocity(network, x, timestep, text, negative, recipe.train_distill.guidance_scale)

    moved = x0.copy()
    moved[:, :1] = first
    for t in TIMESTEPS:
        timestep = jnp.full(x0.shape[:2], t)
        one, other = (np.asarray(velocity((1 - t / 1000) * x + t / 1000 * noise, timestep)) for x in (x0, moved))

        def difference(frames, one=one, other=other):
            return np.linalg.norm((one - other)[:, frames]) / np.linalg.norm(other[:, frames])

        errors = [np.mean(((v - (noise - x0))[:, 1:]) ** 2) for v in (one, other)]
        print(
            f"t = {t:.0f}: velocities differ by {difference(slice(1, None)):.4f} ({difference(slice(1, 2)):.4f} on the "
            f"second frame, {difference(slice(-1, None)):.4f} on the last); mean square error {errors[0]:.4f} with the "
            f"stream's first frame, {errors[1]:.4f} with one frame's",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
