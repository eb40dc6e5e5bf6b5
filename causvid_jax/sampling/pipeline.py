"""Student and teacher as objects with their weights and text encoder, over the pure functions of this room.

    pipe = load("digits")
    state = pipe.stream("a red 3 moving left", seed=0)
    for frames, state in pipe.frames(state, blocks=20):
        ...  # uint8 [B, n, H, W, 3]
    state = pipe.switch(state, "a blue 7 moving up")

Every method that takes a ``state`` consumes it: use the returned state from then on.

Letters: B streams or clips, F latent frames ``[h, w, C]`` of a clip, K of a block, ``[H, W]`` pixels, S tokens of width
E. Frames are pixel frames: latent frame 0 is one of them, every later one four.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import media
from causvid_jax.checkpoints import lora_factors
from causvid_jax.config import CLIPConfig, Recipe, require
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import decoder, vae
from causvid_jax.models.image_branch import Picture, has_branch
from causvid_jax.sampling import blocks, image_to_video, schedule, stream, weights
from causvid_jax.sampling.state import check_text
from causvid_jax.sampling.stream import StreamState
from causvid_jax.sampling.teacher import clip_noise, sample_clip
from causvid_jax.text import encoder as text_encoder

Prompts = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Base:
    """Attributes and methods of both student and teacher, which describe the attributes."""

    config: Recipe
    params: dict[str, Any]
    encoder: text_encoder.Encoder
    clip: CLIPConfig | None = dataclasses.field(default=None, kw_only=True)

    def encode_prompt(self, prompt: Prompts) -> jax.Array:
        """Return prompt embeddings ``[B, S, E]`` of one prompt or B of them.

        Raises:
            ConfigError: a word outside the vocabulary of a recipe of words, or a text encoder that is missing.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return jnp.asarray(text_encoder.encode(self.encoder, prompts))

    def _embeds(self, prompt: Prompts | jax.Array) -> jax.Array:
        """Return the embeddings of texts, or checked embeddings."""
        given = self.encode_prompt(prompt) if isinstance(prompt, (str, list, tuple)) else jnp.asarray(prompt)
        check_text(given, self.config)
        return given

    def decode(self, latents: jax.Array) -> np.ndarray:
        """Decode a clip's latents ``[B, F, h, w, C]`` to uint8 frames ``[B, 1 + 4 (F - 1), H, W, 3]``."""
        parts = decoder.decode_clip(self.params, latents, config=self.config)
        return np.concatenate([media.to_uint8(part) for part in parts], axis=1)

    def encode(self, video: np.ndarray) -> jax.Array:
        """Encode uint8 frames ``[B, 1 + 4 (F - 1), H, W, 3]`` as a clip's latents ``[B, F, h, w, C]``.

        Raises:
            ConfigError: the weights of the VAE were not found.
        """
        return _encode(self._vae(), jnp.asarray(media.to_float(video)), config=self.config.vae)

    def picture(self, image: np.ndarray | None, batch: int) -> Picture | None:
        """Encode the image for a network with an image branch; return None without an image.

        The image is uint8 ``[H, W, 3]`` or ``[B, H, W, 3]`` of the recipe's size; CLIP and the VAE both read all of it.

        Raises:
            ConfigError: an image of another size, or no weights of the VAE.
        """
        if image is None:
            return None
        blocks.check_pixels(image, self.config)
        pixels = jnp.asarray(np.broadcast_to(media.to_float(image), (batch, *image.shape[-3:])))
        params = {**self.params, "vae": self._vae()}
        return image_to_video.picture_of(params, pixels, pixels, config=self.config, clip=self.clip)

    def _vae(self) -> Any:
        require("vae" in self.params, "the VAE encodes pixels, and its weights were not found; give vae=FILE")
        return self.params["vae"]


_encode = jax.jit(vae.encode, static_argnames=("config",))
encode_chunk = jax.jit(vae.encode_chunk, static_argnames=("config", "first"))


@dataclasses.dataclass(frozen=True)
class StudentPipeline(_Base):
    """The few-step causal student: streams of any length, block by block. Made by :func:`load`.

    With ``causal.window`` a stream has no end. Without it a stream has at most the latent frames that :meth:`stream`
    reserves; methods that generate refuse more (ConfigError).

    Attributes:
        config: the recipe, with the VAE's latent statistics.
        params: name of a network to its parameters: ``"student"``, the decoder's, and ``"vae"`` if it was found.
        encoder: the text encoder of the prompts.
        clip: sizes of the image encoder, for a student that reads CLIP.
        loras: names and columns of the LoRAs; None without LoRAs.
    """

    loras: lora_factors.Factors | None = None

    def stream(
        self,
        prompt: Prompts | jax.Array,
        *,
        seed: int | Sequence[int] = 0,
        frames: int | None = None,
        image: np.ndarray | None = None,
    ) -> StreamState:
        """Return the state before the first block of one stream, or of B parallel streams.

        Args:
            prompt: one text, B texts, or embeddings ``[B, S, E]``.
            seed: of the noise; stream b of one seed s has seed s + b.
            frames: maximum number of latent frames of the stream; None: that of the recipe's clip. Only a recipe
                without ``causal.window`` needs it.
            image: the picture for a student with an image branch, uint8 ``[H, W, 3]`` or ``[B, H, W, 3]``. Other
                students start from a picture by :meth:`show`.

        Raises:
            ConfigError: an unknown word, not as many seeds as prompts, an image for a student without an image branch,
                or none for one with it.
        """
        embeds = self._embeds(prompt)
        options: dict[str, Any] = {"seed": seed, "frames": frames}
        if image is not None or has_branch(self.config.student):
            options["picture"] = self.picture(image, len(embeds))
        state = stream.init_stream(self.params, embeds, config=self.config, **options)
        if self.loras is None:
            return state
        return stream.set_adapters(self.params, state, jnp.asarray(self.loras.scale({})), embeds, config=self.config)

    def lora(self, state: StreamState, strengths: Mapping[str, float]) -> StreamState:
        """Return the state with other strengths of its LoRAs, such as ``{"style": 0.8}``, from the next block on.

        A strength s adds s times the LoRA's update to the weights; 0 turns it off. LoRAs that are not named keep their
        strength; the first strength is 1. Strengths are inputs of one compiled program, so a change costs no
        compilation. Keys and values in the cache do not change.

        Raises:
            ConfigError: a LoRA that was not loaded, or a strength that is no number.
        """
        require(self.loras is not None, "this student was loaded without LoRAs; give loras={name: FILE} to load()")
        assert self.loras is not None and state.adapters is not None
        scale = self.loras.scale(strengths, np.asarray(state.adapters.scale))
        return stream.set_adapters(self.params, state, jnp.asarray(scale), config=self.config)

    def frames(
        self, state: StreamState, blocks: int = 1, *, noise: Sequence[jax.Array] | None = None
    ) -> Iterator[tuple[np.ndarray, StreamState]]:
        """Generate ``blocks`` blocks and yield uint8 frames ``[B, n, H, W, 3]`` and the next state for each.

        A block has ``n = 4 K`` frames, the first block of a stream 4 K - 3. ``noise[i] [steps, B, K, h, w, C]`` is the
        noise of block i; None draws it from the state's seeds.

        Raises:
            ConfigError: the blocks do not fit the cache of a stream without a window, or ``noise`` has too few entries.
        """
        self._check_room(state, blocks, noise)
        start = begins(state)
        for i in range(blocks):
            given = {} if noise is None else {"noise": noise[i]}  # the program of load(streams=...) has no noise
            _, frames, state = stream.next_frames(self.params, state, config=self.config, **given)
            yield visible(frames, start and i == 0), state

    def latents(
        self, state: StreamState, blocks: int = 1, *, noise: Sequence[jax.Array] | None = None
    ) -> Iterator[tuple[jax.Array, StreamState]]:
        """Generate ``blocks`` blocks without decoding; yield latents ``[B, K, h, w, C]`` and the next state for each.

        No VAE is needed. ``noise`` and errors are those of :meth:`frames`.
        """
        self._check_room(state, blocks, noise)
        for i in range(blocks):
            block_noise = None if noise is None else noise[i]
            latents, state = stream.next_block(self.params, state, config=self.config, noise=block_noise)
            yield latents, state

    def switch(self, state: StreamState, prompt: Prompts | jax.Array) -> StreamState:
        """Return the state with another prompt from the next block on (cache: ``causal.on_prompt_switch``).

        ``prompt`` is one text for all streams, B texts, or embeddings ``[B, S, E]`` or ``[1, S, E]``.

        Raises:
            ConfigError: an unknown word, or neither 1 nor B prompts.
        """
        embeds = self._embeds(prompt)
        streams = state.seed.shape[0]
        embeds = jnp.broadcast_to(embeds, (streams, *embeds.shape[1:])) if len(embeds) == 1 else embeds
        require(
            len(embeds) == streams, f"{len(embeds)} prompts are given for {streams} streams; accepted: 1 or {streams}"
        )
        return stream.change_prompt(self.params, state, embeds, config=self.config)

    def show(self, state: StreamState, image: np.ndarray) -> tuple[np.ndarray, StreamState]:
        """Make a picture the first block (image to video; paper, section 5.3); return its frames and the next state.

        The frames are uint8 ``[B, 4 K - 3, H, W, 3]``: the first is the picture itself, the others are its decoded
        latents.

        Args:
            state: of :meth:`stream`, before its first block.
            image: uint8 ``[H, W, 3]`` for all streams, or ``[B, H, W, 3]``, of the recipe's size.

        Raises:
            ConfigError: a stream that has begun, or no weights of the VAE.
        """
        require(begins(state), "a picture can only be the first block of a stream")
        blocks.check_pixels(image, self.config)
        self._check_room(state, 1)
        shape = (state.seed.shape[0], *image.shape[-3:])
        picture = jnp.asarray(np.broadcast_to(media.to_float(image), shape))
        latents = stream.encode_image({"vae": self._vae()}, picture, config=self.config)
        state = stream.append(self.params, state, latents, config=self.config)
        decoded, state = stream.decode_block(self.params, state, latents, config=self.config)
        frames = visible(decoded, True)
        frames[:, 0] = image
        return frames, state

    def extend(self, state: StreamState, video: np.ndarray) -> Iterator[tuple[np.ndarray, StreamState]]:
        """Make a clip the first blocks of a stream, so that the next block continues it.

        Yield the frames of the clip and the next state for each block. The clip's latents are written to the cache.

        Args:
            state: of :meth:`stream`, before its first block.
            video: uint8 ``[T, H, W, 3]`` for all streams, or ``[B, T, H, W, 3]``, of whole blocks: with blocks of K
                latent frames T is ``1 + 4 (n K - 1)`` (9, 21, 33, ... for K = 3).

        Raises:
            ConfigError: a stream that has begun, a clip that is no whole number of blocks or does not fit the cache of
                a stream without a window, or no weights of the VAE.
        """
        require(begins(state), "a clip can only be continued from the first block of a stream")
        blocks.check_pixels(video, self.config, axes=4)
        length = video.shape[-4]
        last = blocks.block_of(length - 1, self.config)
        shorter, end = blocks.first_frame(last, self.config), blocks.first_frame(last + 1, self.config)
        require(end == length, f"the clip to continue has {length} frames; whole blocks have {shorter or end} or {end}")
        for part, latents in self._encoded(state, video):
            state = stream.append(self.params, state, latents, config=self.config)
            # Decode to fill the decoder's cache, but return the frames of the clip, which have no decoder error.
            _, state = stream.decode_block(self.params, state, latents, config=self.config)
            yield part, state

    def follow(
        self, state: StreamState, video: np.ndarray, strength: float = schedule.DEFAULT_STRENGTH
    ) -> Iterator[tuple[np.ndarray, StreamState]]:
        """Video to video (paper, section 5.3): yield frames and the next state of each block until ``video`` ends.

        The frames are uint8 ``[B, n, H, W, 3]``, T in all.

        Args:
            state: of :meth:`stream`, before its first block.
            video: uint8 ``[T, H, W, 3]`` for all streams, or ``[B, T, H, W, 3]``; the last frame fills the last block.
            strength: distance from the video, from the last denoising timestep over 1000 (close to it) to 1
                (independent of it), see :func:`~causvid_jax.sampling.schedule.strength_step`.

        Raises:
            ConfigError: a stream that has begun, a strength out of bounds, a video that does not fit the cache of a
                stream without a window, or no weights of the VAE.
        """
        require(begins(state), "a video can only be followed from the first block of a stream")
        blocks.check_pixels(video, self.config, axes=4)
        start = jnp.int32(schedule.strength_step(self.config.diffusion, strength))
        remaining = video.shape[-4]
        require(remaining > 0, "the video to follow has no frames")
        for block, (_, latents) in enumerate(self._encoded(state, video)):
            x, state = stream.next_block_from(self.params, state, latents, start, config=self.config)
            decoded, state = stream.decode_block(self.params, state, x, config=self.config)
            frames = visible(decoded, block == 0)[:, :remaining]
            remaining -= frames.shape[1]
            yield frames, state

    def _encoded(self, state: StreamState, video: np.ndarray) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """Yield the pixels and the latents of every block of a video; its last frame fills the last block."""
        length = video.shape[-4]
        count = blocks.block_of(length - 1, self.config) + 1
        self._check_room(state, count)
        pixels = np.broadcast_to(video, (state.seed.shape[0], *video.shape[-4:]))
        size = {"height": self.config.video.height, "width": self.config.video.width}
        cache = vae.init_encode_cache(self.config.vae, batch=len(pixels), **size)
        for block in range(count):
            ends = blocks.first_frame(block, self.config), blocks.first_frame(block + 1, self.config)
            part = pixels[:, np.minimum(np.arange(*ends), length - 1)]
            chunk, first = jnp.asarray(media.to_float(part)), block == 0
            latents, cache = encode_chunk(self._vae(), chunk, cache, config=self.config.vae, first=first)
            yield part, latents

    def _check_room(self, state: StreamState, count: int, noise: Sequence[jax.Array] | None = None) -> None:
        """Refuse ``count`` further blocks for which the cache (without a window) or the noise is too short."""
        require(count >= 0, f"{count} blocks are asked for; accepted: 0 or more")
        if noise is not None:
            require(len(noise) >= count, f"noise is given for {len(noise)} blocks, and {count} are asked for")
        causal = self.config.causal
        end = int(state.cache.position) + count * causal.frames_per_block
        end -= 0 if state.started else causal.frames_per_block - 1
        slots = state.cache.frame.shape[0]
        require(
            causal.window > 0 or end <= slots,
            f"the stream has room for {slots} latent frames, and {end} are asked for; give frames={end} to stream(), "
            "or a recipe with causal.window",
        )


def begins(state: StreamState) -> bool:
    """Return whether a stream is before its first block."""
    return int(state.block) == 0


def visible(frames: jax.Array, first: bool) -> np.ndarray:
    """Return decoded float frames ``[B, 4 K, H, W, 3]`` as uint8, without the padding frames of a first block."""
    return media.to_uint8(frames)[:, stream.LEAD if first else 0 :]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of the teacher, before or after sampling.

    Attributes:
        prompt_embeds: ``[B, S, E]``.
        noise: ``[B, F, h, w, C]``.
        latents: ``[B, F, h, w, C]`` once they are sampled.
        picture: for a teacher with an image branch.
    """

    prompt_embeds: jax.Array
    noise: jax.Array
    latents: jax.Array | None = None
    picture: Picture | None = None


@dataclasses.dataclass(frozen=True)
class TeacherPipeline(_Base):
    """The many-step bidirectional teacher: one clip of the recipe's length. Made by :func:`load_teacher`.

    It has the student's methods::

        clip = teacher.stream("a red 3 moving left", seed=0)
        for frames, clip in teacher.frames(clip): ...

    Attributes:
        config: the recipe, with the VAE's latent statistics.
        params: name of a network to its parameters: ``"teacher"`` (of two experts: a dict of both) and the decoder's.
        encoder: the text encoder of the prompts.
        clip: sizes of the image encoder, for a teacher that reads CLIP.
    """

    def stream(
        self,
        prompt: Prompts | jax.Array,
        *,
        seed: int | Sequence[int] = 0,
        noise: jax.Array | None = None,
        image: np.ndarray | None = None,
    ) -> Clip:
        """Return B clips before sampling.

        Args:
            prompt: one text, B texts, or embeddings ``[B, S, E]``.
            seed: of the noise; clip b of one seed s has seed s + b.
            noise: ``[B, F, h, w, C]`` instead of ``seed``.
            image: the picture for a teacher with an image branch, uint8 ``[H, W, 3]`` or ``[B, H, W, 3]``.

        Raises:
            ConfigError: an unknown word, not as many seeds as prompts, or an image of another size.
        """
        embeds = self._embeds(prompt)
        if noise is None:
            noise = clip_noise(stream.seeds_of(seed, len(embeds)), self.config)
        return Clip(embeds, noise, picture=self.picture(image, len(embeds)))

    def latents(self, clip: Clip, *, timesteps: Sequence[float] | None = None) -> Clip:
        """Solve the guided ODE and return the clip with latents (:func:`~causvid_jax.sampling.teacher.sample_clip`).

        ``timesteps`` are descending, one per step; None: those of ``num_inference_steps`` steps of the recipe.
        """
        negative = jnp.asarray(text_encoder.negative_prompt_embeds(self.encoder))
        pictures = () if clip.picture is None else (clip.picture.embeds, clip.picture.latents)
        latents = sample_clip(
            self.params["teacher"],
            clip.prompt_embeds,
            negative,
            *pictures,
            config=self.config,
            noise=clip.noise,
            timesteps=timesteps,
        )
        return dataclasses.replace(clip, latents=latents)

    def frames(self, clip: Clip, *, timesteps: Sequence[float] | None = None) -> Iterator[tuple[np.ndarray, Clip]]:
        """Sample the clip if it has no latents yet, then yield its uint8 frames ``[B, n, H, W, 3]`` in parts.

        ``timesteps`` are those of :meth:`latents`. Every part comes with the sampled clip.
        """
        clip = self.latents(clip, timesteps=timesteps) if clip.latents is None else clip
        assert clip.latents is not None
        for part in decoder.decode_clip(self.params, clip.latents, config=self.config):
            yield media.to_uint8(part), clip


def _open(
    config: str | Recipe,
    role: str,
    checkpoint: str | os.PathLike | None,
    files: Mapping[str, str | os.PathLike | None],
    streams: int | None = None,
) -> tuple[Recipe, dict[str, Any], text_encoder.Encoder, CLIPConfig | None]:
    recipe = load_recipe(config) if isinstance(config, str) else config
    folder = None if checkpoint is None else os.fspath(checkpoint)
    encodes = True if has_branch(getattr(recipe, role)) else None
    opened, recipe = weights.find(recipe, role, folder, encodes=encodes, files=files)
    shapes = weights.opened_shapes(opened, recipe, role)
    with contextlib.ExitStack() as compiling:
        if streams is not None:
            from causvid_jax.sampling import player  # which imports this module

            compiling.enter_context(player.compile_streams(shapes, recipe, streams))
        params = weights.load(opened, shapes)
    return recipe, params, text_encoder.open_encoder(recipe, folder), weights.clip_of(opened)


def load(
    config: str | Recipe,
    *,
    checkpoint: str | os.PathLike | None = None,
    student: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    taehv: str | os.PathLike | None = None,
    loras: Mapping[str, str | os.PathLike] | None = None,
    streams: int | None = None,
) -> StudentPipeline:
    """Load the student of a recipe with its decoder, its text encoder and, if it is found, the VAE's encoder.

    Published files and folders (Wan, diffusers, CausVid, Self-Forcing and relatives) are read without conversion.

    Args:
        config: a recipe's name (``"digits"``), its file, or a :class:`~causvid_jax.config.Recipe`.
        checkpoint: a folder with the weights of every network, such as a training's working directory or a published
            folder, or one weights file of the student; None: the weights of the package.
        student, vae, taehv: weights files that replace those of ``checkpoint``.
        loras: name to file of LoRAs, kept as adapters; :meth:`StudentPipeline.lora` sets their strengths.
        streams: number of parallel streams whose programs compile in a thread while the weights are read, without
            LoRAs and image branch; None compiles at the first block.

    Returns:
        The student with its weights on the default device.

    Raises:
        ConfigError: no such recipe, weights that are missing or do not fit it, or ``streams`` for other programs.
    """
    require(streams is None or not loras, "streams is given with loras, whose programs differ; leave one out")
    files = {"student": student, "vae": vae, "taehv": taehv}
    recipe, params, encoder, clip = _open(config, "student", checkpoint, files, streams)
    factors = None
    if loras:
        factors = lora_factors.open_factors(loras, recipe.student)
        params["student"] = lora_factors.attach(params["student"], factors)
        factors = dataclasses.replace(factors, tree={})
    return StudentPipeline(recipe, weights.for_stream(params, recipe, free=True), encoder, factors, clip=clip)


def load_teacher(
    config: str | Recipe,
    *,
    checkpoint: str | os.PathLike | None = None,
    teacher: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
) -> TeacherPipeline:
    """Load the teacher of a recipe with its decoder, its text encoder and, if it is found, the VAE's encoder.

    Args:
        config, checkpoint: as in :func:`load`.
        teacher, vae: weights files that replace those of ``checkpoint``. A teacher of two experts
            (``experts.boundary``) is a folder that holds both.

    Returns:
        The teacher with its weights on the default device.

    Raises:
        ConfigError: no such recipe, or weights that are missing or do not fit it.
    """
    recipe, params, encoder, clip = _open(config, "teacher", checkpoint, {"teacher": teacher, "vae": vae})
    return TeacherPipeline(recipe, params, encoder, clip=clip)
