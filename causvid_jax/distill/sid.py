"""Score identity distillation (SiD, arXiv 2404.04057) as the student's loss, in the form of Self-Forcing (2506.08009).

Let x be the student's output and ``x_t = (1 - sigma) x + sigma noise``. At x_t, let f be the x0 prediction of the fake
score and r that of the guided teacher. With ``a = train_distill.sid_alpha``:

    L_G = mean (r - f) ((r - x) - a (r - f)) / mean |x - r|      the divisor is per sample and a constant

The gradient passes through x and, unlike in DMD, also through x_t into r and f. The parameters of both scores are
constants. The fake score has the loss of :func:`~causvid_jax.distill.dmd.critic_loss`.

If f is the exact score of the student's own distribution, ``E (f - x) g(x_t) = 0`` for every function g. The expected
numerator is then ``(1 - a) E (r - f)^2``: the Fisher divergence of the two distributions times
``(1 - a) sigma^4 / (1 - sigma)^2``. With constant parameters of f the gradient does not vanish at a = 1. For Gaussians
of one width, with the gain ``k`` of ``E[x0 | x_t]``, the derivative of L_G with respect to the student's mean is
``-(1 - (1 - sigma) k)^2 (mean_real - mean)``, which moves the mean to that of the data.
"""

from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.distill import scores


def generator_loss(
    x0: jax.Array,
    prompt_embeds: jax.Array,
    negative_prompt_embeds: jax.Array,
    key: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return L_G (module docstring) and the metrics ``loss``, ``gradient`` (mean ``|r - f|``) and ``timestep`` (mean).

    Arguments and errors are those of :func:`causvid_jax.distill.dmd.generator_loss`. With a mask there is also the
    metric ``weight`` (frames counted). A sample with x = r (0 / 0) counts as 0. NaN and infinity in a prediction stay
    in the loss.
    """
    x = x0.astype(jnp.float32)
    f, r, timestep = scores.predictions(x, prompt_embeds, negative_prompt_embeds, key, **options)
    axes = tuple(range(1, x.ndim))
    scale = jax.lax.stop_gradient(jnp.mean(jnp.abs(x - r), axis=axes, keepdims=True))
    values = (r - f) * ((r - x) - options["distill"].sid_alpha * (r - f))
    # A sample that the teacher predicts exactly (0 / 0) counts as 0. A safe divisor also gives it the gradient 0.
    values = jnp.where(scale == 0, 0.0, values / jnp.where(scale == 0, 1.0, scale))
    loss = scores.masked_mean(values, mask)
    difference = scores.masked_mean(jnp.abs(r - f), mask)
    metrics = {"loss": loss, "gradient": difference, "timestep": jnp.mean(timestep)}
    return loss, metrics | scores.mask_weight(mask)
