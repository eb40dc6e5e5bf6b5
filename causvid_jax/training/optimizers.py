"""Make optax optimizers from their configuration."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from causvid_jax.config import OptimizerConfig

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
"""Root mean square of an orthogonalised step at rate 1: about AdamW's, so that its learning rates carry over."""


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer ``config.kind`` after clipping by the global norm, for a run of ``steps`` steps.

    Its learning rate warms up linearly from 0, then is constant or half a cosine down to 0. Each of ``restarts`` begins
    warm-up and cosine again (SGDR, arXiv 1608.03983, section 3), the i-th with the peak ``learning_rate
    restart_factor^i``. A run that ended with the first cycle can be continued, because the longer run begins with the
    same steps.

    ``"adamw"`` is AdamW, arXiv 1711.05101. ``"muon"`` (Jordan 2024; scaled as in arXiv 2502.16982, section 2.2) updates
    every kernel ``W [in, out]`` of every layer, and every kernel of a convolution as one matrix ``[k k k in, out]``, by
    ``-rate (0.2 sqrt(max(in, out)) O + weight_decay W)``. O is the Nesterov momentum of its gradient, whose singular
    values five Newton-Schulz steps bring near 1. Embeddings, head, norms, biases, modulation and adapters (LoRA) take
    AdamW steps with Nesterov momentum (Nadam).
    """
    if config.schedule == "cosine":
        starts = [0, *(step for step in config.restarts if step < steps)]
        lengths = np.diff([*starts, steps])
        cycles = [
            _cycle(config.learning_rate * config.restart_factor**i, config.warmup_steps, int(length))
            for i, length in enumerate(lengths)
        ]
        schedule = optax.join_schedules(cycles, starts[1:])
    elif config.warmup_steps:
        schedule = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    else:
        schedule = optax.constant_schedule(config.learning_rate)
    if config.kind == "muon":
        method = optax.contrib.muon(
            schedule,
            beta=MUON_MOMENTUM,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        method = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), method)


def _cycle(peak: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Return a linear warm-up from 0 and half a cosine wave down to 0, ``steps`` long."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(steps, warmup_steps + 1))


def is_layer_kernel(path: Sequence[Any]) -> bool:
    """Return whether the parameter at ``path`` (JAX tree keys) is a matrix of a transformer layer."""
    return path[0].key == "blocks" and path[-1].key == "kernel"


def _matrices(params: Any) -> Any:
    """Return the matrix axes of every kernel of a layer or a convolution, and None for other parameters."""

    def axes(path: Sequence[Any], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if is_layer_kernel(path):
            return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        if path[-1].key == "kernel" and len(leaf.shape) >= 4:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(range(len(leaf.shape) - 1)), output_axis=-1)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def frozen(optimizer: optax.GradientTransformation, groups: Collection[str]) -> optax.GradientTransformation:
    """Return ``optimizer`` without updates, not even weight decay, of the top-level ``groups`` of a parameter dict.

    Their gradients are zeroed first, so the global norm for clipping does not count them. The state has the structure
    of ``optimizer``'s, so a run can continue with part of its parameters frozen.
    """

    def without(tree: Any) -> Any:
        return {k: jax.tree.map(jnp.zeros_like, v) if k in groups else v for k, v in tree.items()}

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        change, state = optimizer.update(without(gradient), state, params)
        return without(change), state

    return optax.GradientTransformation(optimizer.init, update)
