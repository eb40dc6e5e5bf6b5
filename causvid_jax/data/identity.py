"""Compute digests of the weights that make a dataset, for its identity."""

from typing import Any

from causvid_jax.checkpoints import store
from causvid_jax.config import Recipe, to_json
from causvid_jax.models import experts


def weights_digest(params: dict[str, Any]) -> str:
    """Return 16 digits of the SHA-256 of a parameter tree; equal to ``lineage.weights_digest`` for float32."""
    return store.checksum(store.flatten(params), {})[:16]


def teacher_identity(params: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Return the teacher's compute type and digest; of two experts both digests and their configuration."""
    dtype = {"dtype": recipe.teacher.dtype}
    if not recipe.experts.boundary:
        return dtype | {"teacher": weights_digest(params)}
    digests = {name: weights_digest(params[name]) for name in experts.NAMES}
    return {**dtype, **digests, "experts": to_json(recipe.experts)}
