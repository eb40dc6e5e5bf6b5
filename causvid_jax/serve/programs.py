"""The compiled programs of one recipe's streams, each with a batch of one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import media
from causvid_jax.config import Recipe, require
from causvid_jax.models import decoder, transformer, vae
from causvid_jax.sampling import stream, weights
from causvid_jax.sampling.pipeline import StudentPipeline, begins, encode_chunk, visible
from causvid_jax.sampling.script import CONTEXTS
from causvid_jax.sampling.stream import StreamState
from causvid_jax.text import encoder


class Programs:
    """Steps of a stream with the past kept, recomputed or reset at every change of prompt.

    A recipe fixes one of the three in ``causal.on_prompt_switch``. Here each change chooses, and blocks are decoded as
    "reset" decodes them: that differs from the others only where a clip begins after a cut.
    """

    def __init__(self, pipe: StudentPipeline, weights: str):
        self.pipe, self.weights = pipe, weights
        self._of = {context: _with_context(pipe.config, context) for context in CONTEXTS}
        self._play = self._of["reset"]

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was loaded."""
        return self.pipe.config

    @property
    def has_encoder(self) -> bool:
        """Whether pictures and videos can become latents."""
        return "encoder" in self.pipe.params.get("vae", {})

    def start(self, embeds: np.ndarray, seed: int, latents: int | None = None) -> StreamState:
        """Return the state before the first block; ``latents`` is the most latent frames of a recipe without window."""
        return stream.init_stream(
            self.pipe.params, jnp.asarray(embeds)[None], config=self._play, seed=seed, frames=latents
        )

    def next(self, state: StreamState) -> tuple[np.ndarray, StreamState]:
        """Return the uint8 frames ``[n, H, W, 3]`` of the next block and the state after it."""
        first = begins(state)
        _, frames, state = stream.next_frames(self.pipe.params, state, config=self._play)
        return visible(frames, first)[0], state

    def switch(self, state: StreamState, embeds: np.ndarray, context: str) -> StreamState:
        """Return the state under the prompt embeddings ``[S, E]``."""
        return stream.change_prompt(self.pipe.params, state, jnp.asarray(embeds)[None], config=self._of[context])

    def show(self, state: StreamState, picture: np.ndarray) -> tuple[np.ndarray, StreamState]:
        """Make the picture uint8 ``[H, W, 3]`` the first block; its first frame is the picture itself."""
        latents = stream.encode_image(self.pipe.params, jnp.asarray(media.to_float(picture))[None], config=self._play)
        state = stream.append(self.pipe.params, state, latents, config=self._play)
        frames, state = self._decode(state, latents, True)
        frames[0] = picture
        return frames, state

    def input_frames(self, state: StreamState, coder: Any) -> int:
        """Return how many frames of a video the next block follows; ``coder`` None: the video begins."""
        latents = stream.block_frames(state, self._play)
        factor = vae.time_factor(self._play.vae)
        return factor * latents if coder is not None else 1 + factor * (latents - 1)

    def follow(
        self, state: StreamState, video: np.ndarray, strength: float, coder: Any
    ) -> tuple[np.ndarray, StreamState, Any]:
        """Return frames and state of a block that follows ``video``, and the encoder's past for the next one."""
        first, new = coder is None, begins(state)
        config, size = self._play.vae, {"height": video.shape[1], "width": video.shape[2]}
        coder = vae.init_encode_cache(config, batch=1, **size) if first else coder
        chunk = jnp.asarray(media.to_float(video))[None]
        latents, coder = encode_chunk(self.pipe.params["vae"], chunk, coder, config=config, first=first)
        step = jnp.int32(stream.strength_step(self._play.diffusion, strength))
        x, state = stream.next_block_from(self.pipe.params, state, latents, step, config=self._play)
        frames, state = self._decode(state, x, new)
        return frames, state, coder

    def _decode(self, state: StreamState, latents: jax.Array, first: bool) -> tuple[np.ndarray, StreamState]:
        frames, state = stream.decode_block(self.pipe.params, state, latents, config=self._play)
        return visible(frames, first)[0], state

    def warm_up(self) -> None:
        """Compile every program, or read it from the compilation cache, by running it once."""
        text = self.pipe.encode_prompt("")[0]
        state = self.start(np.asarray(text), 0)
        for _ in range(2):
            _, state = self.next(state)
        for context in CONTEXTS:
            state = self.switch(state, np.asarray(text), context)
        jax.block_until_ready(state)
        if not self.has_encoder:
            return
        size = self.recipe.video.height, self.recipe.video.width, 3
        _, state = self.show(self.start(np.asarray(text), 0), np.zeros(size, np.uint8))
        coder = None
        for _ in range(2):
            video = np.zeros((self.input_frames(state, coder), *size), np.uint8)
            _, state, coder = self.follow(state, video, 1.0, coder)
        jax.block_until_ready(state)


def open_programs(
    recipe: Recipe, checkpoint: str | None = None, files: Mapping[str, str | None] | None = None
) -> Programs:
    """Load the student of a recipe, its decoder and, where it is to be had, the VAE's encoder for pictures.

    Args:
        recipe: of the networks.
        checkpoint: as in :func:`causvid_jax.load`.
        files: network to a weights file that goes before ``checkpoint``.

    Raises:
        ConfigError: weights that are missing or do not fit.
    """
    own = {name: file for name, file in (files or {}).items() if file is not None}
    found, recipe = weights.find(recipe, "student", checkpoint, encodes=None, files=own)
    shapes = {"student": transformer.inference(recipe.student), **decoder.codec_shapes(recipe, encodes="vae" in found)}
    params = weights.load(found, {name: shape for name, shape in shapes.items() if name in found})
    params = weights.for_stream(params, recipe, free=True)
    pipe = StudentPipeline(recipe, params, encoder.open_encoder(recipe, checkpoint))
    return Programs(pipe, weights.checksum(found, recipe))


def _with_context(recipe: Recipe, context: Any) -> Recipe:
    return dataclasses.replace(recipe, causal=dataclasses.replace(recipe.causal, on_prompt_switch=context))


def require_endless(recipe: Recipe) -> None:
    """Refuse a recipe whose streams end.

    Raises:
        ConfigError: no ``causal.window``.
    """
    require(
        bool(recipe.causal.window),
        f"recipe {recipe.name!r} has no causal.window, so its streams end; add for example --config.causal.window=21",
    )
