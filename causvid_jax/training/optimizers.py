"""optax optimizers from configuration."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from causvid_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after global-norm clipping; linear warm-up, then constant or cosine to zero at ``steps``."""
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, max(steps, config.warmup_steps + 1)
        )
    else:
        schedule = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def frozen(optimizer: optax.GradientTransformation, groups: Collection[str]) -> optax.GradientTransformation:
    """``optimizer`` that leaves the top-level ``groups`` of a parameter dict as they are, weight decay included.

    Their gradients count for nothing, in the norm that is clipped neither. Its state has the structure of
    ``optimizer``'s, so that a run can go on with part of its parameters frozen.
    """

    def without(tree):
        return {k: jax.tree.map(jnp.zeros_like, v) if k in groups else v for k, v in tree.items()}

    def update(gradient, state, params=None):
        change, state = optimizer.update(without(gradient), state, params)
        return without(change), state

    return optax.GradientTransformation(optimizer.init, update)
