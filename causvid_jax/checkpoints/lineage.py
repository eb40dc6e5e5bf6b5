"""Check that weights and datasets belong together by digests of parameters and statistics of latents.

The metadata of weights contain the digest of their VAE (:data:`VAE_DIGEST`) and its latent statistics. If both sides
have statistics, these are compared. Statistics change when the encoder is trained. They do not change when only the
decoder is trained or when weights are stored in another type, and then latents stay valid.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from causvid_jax.checkpoints import safetensors_io
from causvid_jax.checkpoints.checkpoint import Checkpoint, read_array
from causvid_jax.checkpoints.table import OURS
from causvid_jax.config import VAEConfig, require

VAE_DIGEST = "vae"
"""Key of the VAE's digest in the metadata of weights that were trained on its latents."""
DIGITS = 16
TOLERANCE = 1e-4
"""Largest difference of latent statistics that were measured twice on one encoder."""


def weights_digest(opened: Checkpoint) -> str:
    """Return a short SHA-256 of the parameters in float32, read layer by layer; it does not depend on the format."""
    digest = safetensors_io.Digest({})
    rows = opened.network.layers(opened.config, opened.format)
    for path, shape in sorted(opened.network.shapes(opened.config, OURS).items()):
        digest.begin(path, np.dtype(np.float32), shape)
        for row in rows[path]:
            digest.update(read_array(opened, [row], np.dtype(np.float32), ()))
    return digest.hexdigest()[:DIGITS]


def check_latents(opened: Checkpoint, vae: Checkpoint) -> None:
    """Check that the weights ``opened`` were trained on the latents of ``vae``; without metadata they are accepted.

    Raises:
        ConfigError: they were trained on the latents of another VAE.
    """
    metadata = opened.source.metadata
    other = vae.source.metadata
    own = vae.config if isinstance(vae.config, VAEConfig) else None  # a tiny codec has metadata of its VAE only
    same = _equal(
        _statistics(_vae_fields(metadata)),
        (own.latent_mean, own.latent_std) if own else _statistics(_vae_fields(other)),
        metadata.get(VAE_DIGEST),
        (lambda: weights_digest(vae)) if own else (lambda: other.get(VAE_DIGEST)),
    )
    require(
        same,
        f"{opened.path} was trained on the latents of another VAE than {vae.path}; give the VAE that it was trained "
        "with, or train it again",
    )


def check_dataset(
    folder: str | os.PathLike, identity: Mapping[str, Any], made_with: Mapping[str, Checkpoint], command: str
) -> None:
    """Check that a dataset was made with the weights ``made_with``.

    Args:
        folder: of the dataset.
        identity: of the dataset, with a digest of every network that made it.
        made_with: key of ``identity`` to the weights that it must name.
        command: the command that makes the dataset again, for the error message.

    Raises:
        ConfigError: the dataset was made with other weights.
    """
    for key, opened in made_with.items():
        digest = identity.get(key)
        statistics: Sequence[Sequence[float]] = ((), ())
        if key == "vae" and isinstance(opened.config, VAEConfig):
            statistics = opened.config.latent_mean, opened.config.latent_std
        fields = json.loads(identity["config"]) if key == "vae" and identity.get("config") else {}
        require(
            _equal(_statistics(fields), statistics, digest, functools.partial(weights_digest, opened)),
            f"{folder} was made with another {key} than {opened.path}; remove {folder} and run {command}",
        )


def _vae_fields(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the fields of the VAE's configuration in the metadata of weights."""
    try:
        fields = json.loads(metadata.get("config", "{}"))["vae"]
        return fields if isinstance(fields, Mapping) else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _statistics(fields: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    return fields.get("latent_mean") or (), fields.get("latent_std") or ()


def _equal(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    digest: str | None,
    other_digest: Callable[[], str | None],
) -> bool:
    """Return whether two latent spaces are the same: by statistics, else by digests, else unknown."""
    if all(first) and all(second):
        return all(
            np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=0, atol=TOLERANCE)
            for a, b in zip(first, second, strict=True)
        )
    other = None if digest is None else other_digest()
    return other is None or digest == other
