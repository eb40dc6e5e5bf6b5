"""The compiled programs of one recipe's streams, each with a batch of one."""

import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import media
from causvid_jax.config import Recipe, require
from causvid_jax.models import transformer, vae
from causvid_jax.models.image_branch import has_branch
from causvid_jax.sampling import schedule, stream, weights
from causvid_jax.sampling.pipeline import StudentPipeline, begins, visible
from causvid_jax.sampling.script import CONTEXTS
from causvid_jax.sampling.stream import StreamState
from causvid_jax.serve.functions import compile_all, functions, has_fixed_shapes, load, with_context
from causvid_jax.sharding.placement import Placement, place, stream_params
from causvid_jax.text import encoder


class Programs:
    """Steps of a stream with the context kept, recomputed or reset at every change of prompt.

    A recipe fixes one of the three in ``causal.on_prompt_switch``. Here each change chooses one. Blocks are decoded as
    with "reset", which differs from the others only at the start of a clip after a reset.

    Args:
        pipe: recipe, weights and text encoder.
        weights: their checksum.
        placement: the mesh that the weights are on.
        compiled: compiled functions of :mod:`causvid_jax.serve.functions`; the others compile at their first call.
    """

    def __init__(
        self,
        pipe: StudentPipeline,
        weights: str,
        placement: Placement | None = None,
        compiled: Mapping[str, Callable[..., Any]] | None = None,
    ):
        self.pipe, self.weights = pipe, weights
        self.placement = placement or Placement()
        self._compiled = dict(compiled or {})
        self._functions = functions(pipe.config)
        self._play = with_context(pipe.config, "reset")

    @property
    def recipe(self) -> Recipe:
        """The loaded recipe."""
        return self.pipe.config

    @property
    def has_encoder(self) -> bool:
        """Whether pictures and videos can become latents."""
        return "encoder" in self.pipe.params.get("vae", {})

    @property
    def has_branch(self) -> bool:
        """Whether the student has an image branch: every stream starts from a picture, and none follows a video."""
        return has_branch(self.recipe.student)

    def _run(self, name: str, *arrays: Any) -> Any:
        function = self._functions[name]
        with self.placement.current():
            return self._compiled.get(name, function)(function.of(self.pipe.params), *arrays)

    def start(
        self, embeds: np.ndarray, seed: int, latents: int | None = None, picture: np.ndarray | None = None
    ) -> StreamState:
        """Return the state before the first block.

        Args:
            embeds: of the prompt, ``[S, E]``.
            seed: of the noise.
            latents: the maximum number of latent frames for a recipe without a window; None: that of its clip.
            picture: uint8 ``[H, W, 3]``, for a student with an image branch; CLIP and the VAE both read all of it.
        """
        text = jnp.asarray(embeds)[None]
        with self.placement.current():
            read = self.pipe.picture(picture, 1)
        if latents is None or self.recipe.causal.window:
            return self._run("start", text, stream.seeds_of(seed, 1), *(() if read is None else (read,)))
        with self.placement.current():
            return stream.init_stream(
                self.pipe.params, text, config=self._play, seed=seed, frames=latents, picture=read
            )

    def next(self, state: StreamState) -> tuple[np.ndarray, StreamState]:
        """Return the uint8 frames ``[n, H, W, 3]`` of the next block and the state after it."""
        first = begins(state)
        _, frames, state = self._run("next_frames", state)
        return visible(frames, first)[0], state

    def switch(self, state: StreamState, embeds: np.ndarray, context: str) -> StreamState:
        """Return the state under the prompt embeddings ``[S, E]``; ``context`` is keep, recompute or reset."""
        return self._run(f"change_prompt_{context}", state, jnp.asarray(embeds)[None])

    def show(self, state: StreamState, picture: np.ndarray) -> tuple[np.ndarray, StreamState]:
        """Make the picture uint8 ``[H, W, 3]`` the first block; return its frames ``[n, H, W, 3]`` and the next state.

        The first frame is the picture itself.
        """
        latents = self._run("encode_image", jnp.asarray(media.to_float(picture))[None])
        state = self._run("append", state, latents)
        frames, state = self._decode(state, latents, True)
        frames[0] = picture
        return frames, state

    def input_frames(self, state: StreamState, coder: Any) -> int:
        """Return the number of frames of a video that the next block follows; ``coder`` None: the video begins."""
        latents = stream.block_frames(state, self._play)
        factor = vae.time_factor(self._play.vae)
        return factor * latents if coder is not None else 1 + factor * (latents - 1)

    def follow(
        self, state: StreamState, video: np.ndarray, strength: float, coder: Any
    ) -> tuple[np.ndarray, StreamState, Any]:
        """Generate a block that follows ``video``, uint8 ``[n, H, W, 3]``, at ``strength``.

        ``n`` is :meth:`input_frames`; ``coder`` is the encoder's cache after the previous block, None at the start of
        the video.

        Returns:
            uint8 frames ``[n, H, W, 3]``, the next state, and the encoder's cache.

        Raises:
            ConfigError: a strength out of bounds.
        """
        first, new = coder is None, begins(state)
        config, size = self._play.vae, {"height": video.shape[1], "width": video.shape[2]}
        coder = vae.init_encode_cache(config, batch=1, **size) if first else coder
        chunk = jnp.asarray(media.to_float(video))[None]
        latents, coder = self._run("encode_first" if first else "encode_next", chunk, coder)
        step = jnp.int32(schedule.strength_step(self._play.diffusion, strength))
        x, state = self._run("follow", state, latents, step)
        frames, state = self._decode(state, x, new)
        return frames, state, coder

    def _decode(self, state: StreamState, latents: jax.Array, first: bool) -> tuple[np.ndarray, StreamState]:
        frames, state = self._run("decode_block", state, latents)
        return visible(frames, first)[0], state

    def put(self, state: Any, like: Any) -> Any:
        """Copy a state from the host to the device, or to the mesh with the shardings ``like``."""
        return jax.device_put(state) if self.placement.mesh is None else jax.device_put(state, like)

    def warm_up(self) -> None:
        """Compile every program, or read it from the compilation cache, by running it once."""
        text = self.pipe.encode_prompt("")[0]
        size = self.recipe.video.height, self.recipe.video.width, 3
        state = self.start(np.asarray(text), 0, picture=np.zeros(size, np.uint8) if self.has_branch else None)
        for _ in range(2):
            _, state = self.next(state)
        for context in CONTEXTS:
            state = self.switch(state, np.asarray(text), context)
        jax.block_until_ready(state)
        if not self.has_encoder or self.has_branch:
            return
        _, state = self.show(self.start(np.asarray(text), 0), np.zeros(size, np.uint8))
        coder = None
        for _ in range(2):
            video = np.zeros((self.input_frames(state, coder), *size), np.uint8)
            _, state, coder = self.follow(state, video, 1.0, coder)
        jax.block_until_ready(state)


def open_programs(
    recipe: Recipe,
    checkpoint: str | None = None,
    files: Mapping[str, str | None] | None = None,
    *,
    program: str | os.PathLike | None = None,
    loras: Sequence[str] = (),
    compiles: bool = False,
) -> Programs:
    """Load the student of a recipe, its decoder and, if available, the encoders of pictures.

    Weights are read while programs compile.

    Args:
        recipe: gives the sizes of the networks; ``parallel`` is the mesh that the student is split over.
        checkpoint: as in :func:`causvid_jax.load`.
        files: network to a weights file that replaces that of ``checkpoint``.
        program: a file of ``causvid compile --stage=serve``, run instead of tracing the model.
        loras: ``FILE`` or ``FILE:STRENGTH`` each, added to the student's weights as they are read.
        compiles: whether to compile every program at once, if all have one shape on one device.

    Raises:
        ConfigError: weights or a program that are missing or do not fit.
    """
    schedule.check_single_blocks(recipe)
    encodes = True if has_branch(recipe.student) else None  # an image branch needs the encoders
    opened, recipe = weights.find(recipe, "student", checkpoint, encodes=encodes, files=files)
    opened["student"] = weights.with_loras(opened["student"], loras)
    placement = place(recipe.parallel, recipe.student.rules)
    require(
        program is None or placement.mesh is None,
        "a program of causvid compile runs on one device; leave --program or the mesh out",
    )
    loaded = None if program is None else load(program, recipe)
    reader = encoder.open_encoder(recipe, checkpoint)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        reading = pool.submit(weights.load, opened, weights.opened_shapes(opened, recipe, "student"))
        ready: Callable[[], dict[str, Callable[..., Any]]] = dict
        if loaded or (compiles and placement.mesh is None and has_fixed_shapes(recipe)):
            ready = compile_all(recipe, "vae" in opened, loaded, pool)
        try:
            params = reading.result()
        except BaseException:  # programs that wait for a thread are not begun for a server that will not start
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        compiled = ready()
    params = stream_params(params, transformer.inference_spec(recipe.student), recipe.student.rules, placement)
    params = weights.for_stream(params, recipe, free=True)
    pipe = StudentPipeline(recipe, params, reader, clip=weights.clip_of(opened))
    return Programs(pipe, weights.checksum(opened, recipe), placement, compiled)


def require_endless(recipe: Recipe) -> None:
    """Refuse a recipe whose streams end.

    Raises:
        ConfigError: no ``causal.window``.
    """
    require(
        bool(recipe.causal.window),
        f"recipe {recipe.name!r} has no causal.window, so its streams end; add for example --config.causal.window=21",
    )
