"""Pictures for networks with an image branch: the first frames of the clips that they are trained on, encoded.

Examples and batches have the picture as ``image_latents [F, h, w, 4 + C]`` (``models.image_branch.image_condition`` of
a video of the first frame followed by grey) and, for networks that read CLIP, as ``image_embeds [tokens, width]``.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from causvid_jax.checkpoints import lineage, load, workdir
from causvid_jax.config import CLIPConfig, Recipe, to_json
from causvid_jax.data.identity import weights_digest
from causvid_jax.models import vae
from causvid_jax.models.image_branch import Picture
from causvid_jax.sampling import image_to_video

LATENTS, EMBEDS = "image_latents", "image_embeds"


def shapes(recipe: Recipe, frames: int = 0) -> dict[str, tuple[int, ...]]:
    """Return name to shape of an example's picture, of ``frames`` latent frames (0: all); {} without image branch."""
    if not recipe.reads_picture:
        return {}
    length, height, width, channels = recipe.latent_shape
    sizes: dict[str, tuple[int, ...]] = {LATENTS: (min(frames or length, length), height, width, 4 + channels)}
    for net in (recipe.teacher, recipe.student):
        if net.image_dim:
            sizes[EMBEDS] = net.image_tokens, net.image_dim
    return sizes


def picture_of(batch: Mapping[str, Any]) -> Picture | None:
    """Return the pictures of a batch as the networks read them; None if it has none."""
    return Picture(batch[LATENTS], batch.get(EMBEDS)) if LATENTS in batch else None


def of_example(example: Mapping[str, Any], frames: int = 0) -> dict[str, np.ndarray]:
    """Return an example's picture in float32, cut to ``frames`` latent frames (0: all); {} if it has none."""
    arrays = {name: example[name].astype(np.float32) for name in (LATENTS, EMBEDS) if name in example}
    return arrays | ({LATENTS: arrays[LATENTS][: frames or None]} if LATENTS in arrays else {})


def of_numbers(clips: Any, numbers: range, recipe: Recipe, frames: int = 0) -> list[dict[str, Any]]:
    """Return the pictures of the clips ``numbers``, modulo the number of clips, as :func:`of_example` does.

    They are empty for a recipe without image branches.
    """
    if not recipe.reads_picture:
        return [{} for _ in numbers]
    assert clips is not None, "a network with an image branch reads the pictures of clips"
    return [of_example(clips[i % len(clips)], frames) for i in numbers]


def stacked(examples: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Return the pictures of a batch as stacked arrays: latents, then embeddings of CLIP if there are any."""
    return [np.stack([example[name] for example in examples]) for name in examples[0]]


def half(picture: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a picture in float16, the type of datasets."""
    return {name: x.astype(np.float16) for name, x in picture.items()}


@dataclasses.dataclass(frozen=True)
class ClipEncoder:
    """The encoders of clips: the VAE and, for networks with an image branch, those of their first frames.

    Attributes:
        recipe: recipe with the VAE's latent statistics.
        params: ``{"vae"}``, and ``"image_encoder"`` if a network reads CLIP.
        clip: configuration of CLIP; None if no network reads it.
        pictures: entries of a dataset's identity that depend on the encoders of first frames.
    """

    recipe: Recipe
    params: dict[str, Any]
    clip: CLIPConfig | None = None
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """Return the entries of a dataset's identity that depend on the encoders."""
        return {"vae": weights_digest(self.params["vae"]), "config": to_json(self.recipe.vae), **self.pictures}

    def encode(self, params: Any, video: jax.Array) -> dict[str, jax.Array]:
        """Return ``latents``, and pictures for an image branch, of clips float32 ``[B, T, H, W, 3]`` in [-1, 1].

        ``params`` is :attr:`params`, an argument so that ``jax.jit`` does not make constants of it.
        """
        arrays = {"latents": vae.encode(params["vae"], video, config=self.recipe.vae)}
        if self.recipe.reads_picture:
            arrays[LATENTS] = image_to_video.image_latents(params["vae"], video[:, 0], config=self.recipe)
        if self.clip is not None:
            arrays[EMBEDS] = image_to_video.image_embeds(params["image_encoder"], video[:, 0], config=self.clip)
        return arrays


def open_encoder(recipe: Recipe, vae_params: Any, folder: str | os.PathLike) -> ClipEncoder:
    """Load the encoders of clips and, for networks with an image branch, of their pictures.

    Raises:
        ConfigError: CLIP's weights are missing in ``folder``, or do not fit the network that reads them.
    """
    params, sizes, identity = {"vae": vae_params}, None, {}
    if recipe.reads_picture:
        identity["pictures"] = "first frame"
    for net in (recipe.teacher, recipe.student):
        if net.image_dim:
            opened = workdir.open_image_encoder(folder, net)
            params["image_encoder"], sizes = load(opened)
            identity["image_encoder"] = lineage.weights_digest(opened)
    return ClipEncoder(recipe, params, sizes, identity)
