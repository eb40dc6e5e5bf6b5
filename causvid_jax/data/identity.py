"""Digests of the weights that made a dataset, for its identity."""

from typing import Any

from causvid_jax.checkpoints import store
from causvid_jax.config import Recipe, to_json
from causvid_jax.models import experts


def weights_digest(params: dict[str, Any]) -> str:
    """Return a short digest of a parameter tree, for the identity of a dataset."""
    return store.checksum(store.flatten(params), {})[:16]


def teacher_identity(params: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Return the teacher's type and digest, or the digests of its two experts and how they share the timesteps."""
    dtype = {"dtype": recipe.teacher.dtype}
    if not recipe.experts.boundary:
        return dtype | {"teacher": weights_digest(params)}
    digests = {name: weights_digest(params[name]) for name in experts.NAMES}
    return {**dtype, **digests, "experts": to_json(recipe.experts)}
