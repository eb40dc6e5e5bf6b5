"""Run a :class:`~causvid_jax.sampling.request.SampleRequest`: read its inputs, generate, write while generating."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from causvid_jax import media as files
from causvid_jax.config import CLIPConfig, Recipe, require
from causvid_jax.models import decoder, precision
from causvid_jax.models.image_branch import Picture
from causvid_jax.sampling import blocks, exported, image_to_video, player, schedule, weights
from causvid_jax.sampling.request import SampleRequest, teacher_recipe
from causvid_jax.sampling.script import MOST_INPUT, Event, Script, from_json, pack, size_of
from causvid_jax.sampling.state import seeds_of
from causvid_jax.sampling.teacher import sample_clip
from causvid_jax.text import encoder

Embeds = Mapping[str, np.ndarray]  # prompt to embeddings [S, E]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """A checked request: its inputs are read, and its weights files are open.

    Attributes:
        request: of the user.
        recipe: with the VAE's latent statistics and, for a teacher, the clip's length.
        frames: number of pixel frames of each video.
        switches: ``{block: (first pixel frame, prompt)}``.
        image: uint8 ``[H, W, 3]`` of the video's size, to start from; None without a picture.
        picture: the same picture uncropped, uint8, for CLIP.
        video: uint8 ``[T, H, W, 3]`` to follow; None without a video.
        encoder: the text encoder of the prompts.
        weights: name of a network to its checkpoint.
        program: a compiled sampler to run instead of the model.
    """

    request: SampleRequest
    recipe: Recipe
    frames: int
    switches: dict[int, tuple[int, str]]
    image: np.ndarray | None
    picture: np.ndarray | None
    video: np.ndarray | None
    encoder: encoder.Encoder
    weights: weights.Opened
    program: exported.Programs | None = None

    @functools.cached_property
    def clip(self) -> CLIPConfig | None:
        """Sizes of the image encoder, if one is needed."""
        return weights.clip_of(self.weights)

    @property
    def texts(self) -> list[str]:
        """All prompts, including the negative prompt of a teacher."""
        negative = [self.recipe.text.negative_prompt] if self.request.teacher else []
        return [*self.request.prompt, *(prompt for _, prompt in self.switches.values()), *negative]


def open_session(request: SampleRequest) -> Session:
    """Read the inputs of ``request`` and check them against the weights' headers; nothing is computed.

    Raises:
        ConfigError: an input that cannot be read or does not fit.
    """
    recipe = precision.exact(request.config, request.teacher) if request.exact else request.config
    reader = encoder.open_encoder(recipe, request.checkpoint)
    encoder.check(reader, request.prompt)
    available = len(jax.local_devices()) if request.decode_device is not None else 0
    require(
        request.decode_device is None or request.decode_device < available,
        f"--decode_device is {request.decode_device}; this machine has devices 0 to {available - 1}",
    )
    size = recipe.video.height, recipe.video.width
    image = files.read_image(request.image, *size) if request.image else None
    picture = files.read_picture(request.image) if request.image and request.has_image_branch else None
    frames, video = request.length, None
    if request.video:
        schedule.strength_step(recipe.diffusion, _strength(request))
        video = files.read_video(request.video, *size, frames=request.frames, fps=recipe.video.fps)
        frames = request.frames or len(video)
        require(len(video) >= frames, f"--frames is {frames}, but --video has only {len(video)} to follow")
    if request.teacher:
        recipe = teacher_recipe(recipe, frames)
    switches = request.switches(frames)
    encoder.check(reader, [prompt for _, prompt in switches.values()])
    for path in request.outputs:
        files.check_output(path, frames)
    role, encodes = "teacher" if request.teacher else "student", image is not None or video is not None
    opened, recipe = weights.find(recipe, role, request.checkpoint, encodes=encodes, files=request.files)
    names = weights.networks(recipe, role)
    require(
        not request.lora or len(names) == 1,
        "--lora is given with a teacher of two experts, each of which would need its own; leave it out",
    )
    opened |= {name: weights.with_loras(opened[name], request.lora) for name in names}
    program = None
    if request.program:
        latents = blocks.covering_latents(frames, recipe)
        program = exported.load(request.program, recipe, batch=len(request.prompt), latents=latents)
    return Session(request, recipe, frames, switches, image, picture, video, reader, opened, program)


def _strength(request: SampleRequest) -> float:
    return schedule.DEFAULT_STRENGTH if request.strength is None else request.strength


def run(session: Session, say: Say = print) -> player.Timing:
    """Generate the videos of a session, write them block by block in a thread, and return the timing.

    Args:
        session: of :func:`open_session`.
        say: called with each line of progress.

    Raises:
        ConfigError: an output that another program is writing, or frames that are not finite.
        RunError: an output that cannot be written any more, for example on a full disk.
    """
    request, timing = session.request, player.Timing()
    fps, several = session.recipe.video.fps, len(request.prompt) > 1
    with contextlib.ExitStack() as stack:
        # Open the files first, to refuse an output that another sampler writes before anything is computed.
        writers = [stack.enter_context(files.VideoWriter(p, fps, request.pixel_size)) for p in request.outputs]
        for i, writer in enumerate(writers):
            writer.comment = comment_of(session, i)
        stack.push(functools.partial(_keep, session.recipe, writers, say))
        ahead = None
        if not request.teacher:
            say("Compiling while weights are read (once for each shape; the result is kept for later runs) ...")
            ahead = stack.enter_context(compile_ahead(session, timing))
        texts = dict(zip(session.texts, encoder.encode(session.encoder, session.texts), strict=True))
        for block, (frame, prompt) in sorted(session.switches.items()):
            say(f"From frame {frame} on (block {block}): {prompt}")
        if request.teacher:
            clips = teacher_clips(session, texts, timing, say)
            say("Compiling (once for each shape; the result is kept for later runs) ...")
        else:
            clips = student_blocks(session, texts, timing, ahead)
        out = stack.enter_context(files.BackgroundWriter(writers))
        bar = stack.enter_context(tqdm(total=session.frames, unit="frame", disable=None))
        for part in clips:
            if timing.frames == part.shape[1]:
                say(f"First frame after {timing.first:.2f} s, and {timing.compile:.1f} s of compilation.")
            out.append(part)
            bar.update(part.shape[1])
    say(
        f"{timing.frames} frames{f' of each of {len(writers)} videos' if several else ''} in {timing.total:.2f} s; "
        f"{timing.fps:.1f} frames/s, {timing.fps / fps:.2f} times real time ({fps} frames/s)."
    )
    say(f"Wrote {', '.join(map(str, request.outputs))}")
    return timing


def _keep(
    recipe: Recipe, writers: list[files.VideoWriter], say: Say, kind: type[BaseException] | None, *_: Any
) -> None:
    """Report the frames that an interrupted session has written, and limit the scripts to them."""
    for writer in writers if kind is not None else ():
        if writer.frames:
            if writer.comment:
                count = blocks.block_of(writer.frames - 1, recipe) + 1
                short = dataclasses.replace(from_json(writer.comment), blocks=count, length=writer.frames)
                writer.comment = short.to_json()
            say(f"Kept the first {writer.frames} frames in {writer.path}")


def comment_of(session: Session, index: int) -> str:
    """Return the script of a video for its metadata.

    It is "" for a teacher's clip, for blocks that are denoised jointly, and for a video that is too long. It is also ""
    for a picture that CLIP reads whole and the VAE cropped, because a script holds only one of them.
    """
    request, recipe = session.request, session.recipe
    image, whole = session.image, session.picture
    cropped = image is not None and whole is not None and not np.array_equal(whole, image)
    if request.teacher or cropped or recipe.rolling_blocks:
        return ""
    latents = blocks.covering_latents(session.frames, recipe)
    count = len(recipe.causal.block_sizes(latents))
    events = [Event(0, prompt=request.prompt[index])]
    context = recipe.causal.on_prompt_switch
    events += [Event(block, prompt=prompt, context=context) for block, (_, prompt) in session.switches.items()]
    if session.image is not None:
        events.append(Event(0, frames=pack(session.image[None])))
    video = session.video
    for block in range(count) if video is not None else ():
        assert video is not None
        ends = blocks.first_frame(block, recipe), blocks.first_frame(block + 1, recipe)
        chunk = video[np.minimum(np.arange(*ends), len(video) - 1)]
        events.append(Event(block, frames=pack(chunk), strength=_strength(request)))
        if sum(len(event.frames or "") for event in events) > MOST_INPUT:
            return ""
    return Script(
        recipe=recipe.name,
        weights=weights.checksum(session.weights, recipe),
        seed=(request.seed + index) % 2**32,
        events=tuple(sorted(events, key=lambda event: event.block)),
        blocks=count,
        latents=None if recipe.causal.window else latents,
        length=session.frames,
        size=size_of(recipe),
        fps=recipe.video.fps,
    ).to_json()


def _pictures(session: Session) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the picture for a network with an image branch, whole and cropped; None without such a network."""
    whole, cropped = session.picture, session.image
    return None if whole is None or cropped is None else (whole, cropped)


def _picture_shapes(session: Session) -> Picture | None:
    """Return the shapes of :func:`_encode_picture`."""
    recipe, sizes, count = session.recipe, session.clip, len(session.request.prompt)
    pictures = _pictures(session)
    if pictures is None:
        return None
    params = decoder.vae_shapes(recipe)
    if sizes is not None:
        params["image_encoder"] = decoder.image_encoder_shapes(sizes)
    read = functools.partial(image_to_video.picture_of, config=recipe, clip=sizes)
    pixels = (jax.ShapeDtypeStruct((1, *x.shape), jnp.float32) for x in pictures)
    one = jax.eval_shape(read, params, *pixels)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), one)


def _encode_picture(session: Session) -> Picture | None:
    """Return the encoded picture for a network with an image branch; None without a picture.

    As in the published code, CLIP reads the whole picture resized to a square, and the VAE reads the picture cropped to
    the video's size. Each encoder is freed before the next is loaded. Without an image encoder (Wan2.2's I2V) the
    embeds are None.
    """
    recipe, sizes = session.recipe, session.clip
    pictures = _pictures(session)
    if pictures is None:
        return None
    whole, cropped = (jnp.asarray(files.to_float(x))[None] for x in pictures)
    embeds = None
    if sizes is not None:
        params = weights.load(session.weights, {"image_encoder": decoder.image_encoder_shapes(sizes)})
        embeds = jax.block_until_ready(image_to_video.image_embeds(params["image_encoder"], whole, config=sizes))
        weights.free(params)
    params = weights.load(session.weights, decoder.vae_shapes(recipe))
    latents = jax.block_until_ready(image_to_video.image_latents(params["vae"], cropped, config=recipe))
    weights.free(params)
    count = len(session.request.prompt)
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), Picture(latents, embeds))


def teacher_clips(session: Session, texts: Embeds, timing: player.Timing, say: Say = print) -> Iterator[np.ndarray]:
    """Yield the teacher's clips in parts, uint8 ``[B, n, H, W, 3]``: denoised all at once, then decoded.

    ``texts`` has the embeddings of every prompt, ``timing`` is updated, and ``say`` is called with a line before
    denoising. The teacher is freed before the decoder is loaded.
    """
    recipe, request = session.recipe, session.request
    prompts = jnp.asarray(np.stack([texts[p] for p in request.prompt]))
    negative = jnp.asarray(texts[recipe.text.negative_prompt])
    seeds = seeds_of(request.seed, len(prompts))
    picture = _encode_picture(session)
    arguments = prompts, negative, *(() if picture is None else (picture.embeds, picture.latents))
    params = weights.load(session.weights, weights.shapes(recipe, "teacher"))
    begin = time.perf_counter()
    sample = sample_clip.lower(params["teacher"], *arguments, seeds=seeds, config=recipe).compile()
    timing.compile = time.perf_counter() - begin
    say(f"Denoising in {recipe.diffusion.num_inference_steps} steps ...")
    begin = time.perf_counter()
    latents = jax.block_until_ready(sample(params["teacher"], *arguments, seeds=seeds))
    weights.free(params)
    params = weights.load(session.weights, decoder.codec_shapes(recipe, encodes=False))
    for part in decoder.decode_clip(params, latents, config=recipe):
        clips = files.to_uint8(part)
        timing.add(clips.shape[1], time.perf_counter() - begin)
        yield clips


def _stream_inputs(session: Session) -> dict[str, Any]:
    """Return the inputs of ``player.play`` that a session holds before anything is computed."""
    device = session.request.decode_device
    return {
        "config": session.recipe,
        "frames": session.frames,
        "image": session.image if _pictures(session) is None else None,
        "video": session.video,
        "strength": _strength(session.request),
        "loaded": session.program,
        "decode_device": None if device is None else jax.local_devices()[device],
    }


def _encodes(session: Session) -> bool:
    """Return whether the stream encodes pixels."""
    return _pictures(session) is None and (session.image is not None or session.video is not None)


def compile_ahead(
    session: Session, timing: player.Timing
) -> contextlib.AbstractContextManager[Callable[[], player.Programs]]:
    """Compile the programs of :func:`student_blocks` in a thread, for its ``ahead``; see ``player.compile_ahead``."""
    recipe, count = session.recipe, len(session.request.prompt)
    return player.compile_ahead(
        weights.stream_shapes(recipe, encodes=_encodes(session)),
        jax.ShapeDtypeStruct((count, recipe.text.length, recipe.text.dim), jnp.float32),
        timing=timing,
        switches=bool(session.switches),
        picture=_picture_shapes(session),
        **_stream_inputs(session),
    )


def student_blocks(
    session: Session, texts: Embeds, timing: player.Timing, ahead: Callable[[], player.Programs] | None = None
) -> Iterator[np.ndarray]:
    """Load the student and return the frames of its streams, uint8 ``[B, n, H, W, 3]`` block by block.

    ``texts`` has the embeddings of every prompt; ``timing`` is updated while the result is iterated. ``ahead`` is of
    :func:`compile_ahead`; None compiles after the weights are read.
    """
    recipe, request = session.recipe, session.request
    count = len(request.prompt)
    picture = _encode_picture(session)
    return player.play(
        weights.load_student(session.weights, recipe, encodes=_encodes(session)),
        np.stack([texts[p] for p in request.prompt]),
        seed=request.seed,
        switches={block: np.stack([texts[p]] * count) for block, (_, p) in session.switches.items()},
        picture=picture,
        timing=timing,
        ahead=ahead,
        **_stream_inputs(session),
    )
