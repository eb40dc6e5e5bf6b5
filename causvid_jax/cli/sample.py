"""Generate videos: ``python -m launch.sample --config=configs/digits.py --prompt="a red 3 moving left"``.

Streams with the four-step student, of any length, and writes while it generates. Several ``--prompt`` run side by side
into ``out_0.mp4``, ``out_1.mp4``, .... ``--image`` starts from a picture, ``--video`` follows a video, and
``--switch "405:a blue 7 moving up"`` changes the prompt at the block that holds frame 405. ``--teacher`` samples the
many-step bidirectional model instead, on one clip; one with an image branch (``configs/wan_14b.py:i2v``) starts from
``--image``. Default weights are those of the package.

With published weights: ``--config=configs/wan_1_3b.py --checkpoint=DIR``, DIR being what ``launch.convert`` makes::

    DIR/distill/weights.safetensors          the student, or with --teacher DIR/teacher/weights.safetensors
    DIR/vae/weights.safetensors
    DIR/text_encoder/weights.safetensors     UMT5; beside it tokenizer.json, of google/umt5-xxl
    DIR/image_encoder/weights.safetensors    CLIP, for a teacher with an image branch
    DIR/taehv/weights.safetensors            with --config.decoder=taehv; or DIR/taew2_1.safetensors as published
    DIR/prompts/                             encoded prompts, kept from run to run

``--program=FILE`` runs what ``launch.compile --platform`` built of the same recipe instead of tracing the model. What
the device has to hold, and when, is printed before anything is loaded. ``--exact`` follows the published code's
numerics (``causvid_jax.models.precision``).
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from causvid_jax import checkpoints
from causvid_jax import media as files
from causvid_jax.analysis import sampling_memory
from causvid_jax.checkpoints import workdir as stages
from causvid_jax.cli import common
from causvid_jax.config import CLIPConfig, ConfigError, Recipe, VideoConfig, require
from causvid_jax.models import decoder, precision, transformer, vae
from causvid_jax.sampling import batch, exported, image_to_video, player, stream
from causvid_jax.text import encoder

_CONFIG = common.define_config_flag()
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; give it several times for several videos at once.")
_FRAMES = flags.DEFINE_integer("frames", None, "Frames to make; default: a clip, or as many as --video has.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise; video i of several has seed + i.")
_OUTPUT = flags.DEFINE_string("output", "out.mp4", "The file to write, .mp4 or .gif.")
_IMAGE = flags.DEFINE_string("image", None, "Start from this picture.")
_VIDEO = flags.DEFINE_string("video", None, "Follow this video.")
_STRENGTH = flags.DEFINE_float("strength", 0.5, "With --video: how far from it, up to 1 (free).")
_SWITCH = flags.DEFINE_multi_string("switch", [], "FRAME:PROMPT, another prompt from the block with that frame on.")
_TEACHER = flags.DEFINE_bool("teacher", False, "Sample the many-step teacher instead of the student.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A training's --workdir or what launch.convert made: a folder with distill/weights.safetensors (with --teacher "
    "teacher/weights.safetensors), vae/weights.safetensors and, for UMT5 prompts, text_encoder/weights.safetensors and "
    "text_encoder/tokenizer.json. Or one .safetensors file of the model.",
)
_TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Another folder with text_encoder/; default: --checkpoint.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "The tokenizer.json of google/umt5-xxl, if it lies elsewhere.")
_PROMPT_CACHE = flags.DEFINE_string(
    "prompt_cache", None, "Where encoded prompts are kept; default: prompts/ beside text_encoder/; empty: nowhere."
)
_EXACT = flags.DEFINE_bool("exact", False, "Round as the published code does, and read its tables.")
_PROGRAM = flags.DEFINE_string("program", None, "Run this program of launch.compile instead of tracing the model.")
_UPSCALE = flags.DEFINE_integer("upscale", 0, "Size of a pixel in the file; 0: such that tiny videos can be seen.")

VISIBLE = 256
"""Videos less high than this are enlarged unless --upscale is given."""


def parse_switches(values: Sequence[str], frames: int, recipe: Recipe) -> dict[int, tuple[int, str]]:
    """``FRAME:PROMPT`` strings as {block: (frame it takes effect at, prompt)}."""
    switches: dict[int, tuple[int, str]] = {}
    for value in values:
        number, colon, prompt = value.partition(":")
        require(
            bool(colon) and number.strip().isdigit(), f"--switch is {value!r}; accepted: FRAME:PROMPT, as '40:a red 3'"
        )
        frame = int(number)
        require(0 < frame < frames, f"--switch is at frame {frame}; accepted: 1 to {frames - 1}")
        block = player.block_of(frame, recipe)
        require(
            block > 0,
            f"--switch is at frame {frame}, in the first block; accepted: from frame "
            f"{player.first_frame(1, recipe)} on",
        )
        require(block not in switches, f"two --switch fall into the block that holds frame {frame}; give one")
        switches[block] = player.first_frame(block, recipe), prompt.strip()
    return switches


def output_paths(output: str, count: int) -> list[pathlib.Path]:
    """One writable path per video: the output itself, or numbered."""
    path = pathlib.Path(output)
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}_{i}{path.suffix}") for i in range(count)]
    return [files.check_output(p) for p in paths]


def find_weights(
    recipe: Recipe, role: str, checkpoint: str | None, encodes: bool
) -> tuple[dict[str, checkpoints.Checkpoint], Recipe]:
    """Open the checkpoints of ``role`` and of its codecs; return them and the recipe with the latent statistics.

    ``encodes``: whether pixels have to become latents, which only the VAE does; the teacher also reads them by CLIP.
    """
    stage = "distill" if role == "student" else "teacher"
    given = pathlib.Path(checkpoint) if checkpoint else None
    require(given is None or given.exists(), f"--checkpoint {checkpoint} does not exist")
    workdir = given if given and given.is_dir() else None
    found = {role: stages.open_stage(recipe, stage, workdir, given if given and not workdir else None)}
    if recipe.decoder == "taehv":
        found["taehv"] = stages.open_stage(recipe, "taehv", workdir)
        if not encodes:
            return found, recipe
    if role == "teacher" and encodes:
        found["image_encoder"] = stages.open_image_encoder(workdir or ".", recipe.teacher)
    found["vae"] = stages.open_stage(recipe, "vae", workdir)
    return found, dataclasses.replace(recipe, vae=found["vae"].config)


def load(request: "Request", shapes: Mapping[str, Any]) -> stream.Params:
    """The weights of ``shapes`` on the device, in its types."""
    return {name: checkpoints.load(request.weights[name], dtype=types)[0] for name, types in shapes.items()}


def free(tree: Any) -> None:
    """Give an array's memory back now, whoever still holds a name for it."""
    jax.tree.map(lambda leaf: leaf.delete(), tree)


@dataclasses.dataclass(frozen=True)
class Request:
    """All that the flags ask for, read and checked."""

    recipe: Recipe
    frames: int
    prompts: list[str]
    outputs: list[pathlib.Path]
    switches: dict[int, tuple[int, str]]
    image: np.ndarray | None  # [H, W, 3], of the video's size
    picture: np.ndarray | None  # the same, whole: what CLIP reads
    video: np.ndarray | None
    encoder: encoder.Encoder
    weights: dict[str, checkpoints.Checkpoint]
    program: exported.Programs | None = None

    @functools.cached_property
    def clip(self) -> CLIPConfig | None:
        """Sizes of the image encoder, if one is needed."""
        opened = self.weights.get("image_encoder")
        return opened.config if opened else None

    @property
    def texts(self) -> list[str]:
        """Every prompt that will be needed; the teacher has an unconditional branch."""
        negative = [self.recipe.text.negative_prompt] if "teacher" in self.weights else []
        return [*self.prompts, *(prompt for _, prompt in self.switches.values()), *negative]


def read_request() -> Request:
    """The flags as a Request; whatever cannot work is refused here, before any compute."""
    recipe, prompts = common.load_recipe(_CONFIG), _PROMPT.value
    require(bool(prompts), 'no --prompt is given; for example --prompt="a red 3 moving left"')
    require(not (_IMAGE.value and _VIDEO.value), "--image and --video are both given; accepted: one of them")
    for name, given in (("teacher", _TEACHER.value), ("image", _IMAGE.value), ("video", _VIDEO.value)):
        require(
            not (given and _PROGRAM.value),
            f"--{name} is given with --program, which holds text to video only; leave one of them out",
        )
    require(_UPSCALE.value >= 0, f"--upscale is {_UPSCALE.value}; it must not be negative")
    require(0 <= _SEED.value < 2**32, f"--seed is {_SEED.value}; accepted: 0 to {2**32 - 1}")
    require(_FRAMES.value is None or _FRAMES.value >= 1, f"--frames is {_FRAMES.value}; it must be at least 1")
    frames = _FRAMES.value or recipe.video.frames
    if _EXACT.value:
        recipe = precision.exact(recipe, _TEACHER.value)
    place = _TEXT_ENCODER.value or _CHECKPOINT.value
    reader = encoder.open_encoder(recipe, place, cache=_PROMPT_CACHE.value, tokenizer=_TOKENIZER.value)
    encoder.check(reader, prompts)
    size = recipe.video.height, recipe.video.width
    image = files.read_image(_IMAGE.value, *size) if _IMAGE.value else None
    branch = (recipe.teacher if _TEACHER.value else recipe.student).image_dim > 0
    picture = files.read_picture(_IMAGE.value) if _IMAGE.value and branch else None
    require(
        not branch or (_TEACHER.value and _IMAGE.value),
        f"recipe {recipe.name!r} has an image branch; accepted: --teacher and --image, both",
    )
    video = None
    if _VIDEO.value:
        stream.strength_step(recipe.diffusion, _STRENGTH.value)
        video = files.read_video(_VIDEO.value, *size, frames=_FRAMES.value, fps=recipe.video.fps)
        frames = _FRAMES.value or len(video)
        require(len(video) >= frames, f"--frames is {frames}, but --video has only {len(video)} to follow")
    if _TEACHER.value:
        shown = "" if branch else _IMAGE.value
        for name, value in (("image", shown), ("video", _VIDEO.value), ("switch", _SWITCH.value)):
            require(not value, f"--{name} is given with --teacher, which cannot stream; leave one of them out")
        recipe = dataclasses.replace(recipe, video=teacher_video(frames, recipe))
    switches = parse_switches(_SWITCH.value, frames, recipe)
    encoder.check(reader, [prompt for _, prompt in switches.values()])
    outputs = output_paths(_OUTPUT.value, len(prompts))
    role, encodes = "teacher" if _TEACHER.value else "student", image is not None or video is not None
    weights, recipe = find_weights(recipe, role, _CHECKPOINT.value, encodes)
    loaded = None
    if _PROGRAM.value:
        latents = player.covering_latents(frames, recipe)
        loaded = exported.load(_PROGRAM.value, recipe, batch=len(prompts), latents=latents)
    return Request(recipe, frames, prompts, outputs, switches, image, picture, video, reader, weights, loaded)


def teacher_video(frames: int, recipe: Recipe) -> VideoConfig:
    """The size of a teacher's clip, which unlike a stream must be whole latent frames and whole blocks."""
    time_factor = vae.time_factor(recipe.vae)
    try:
        clip = dataclasses.replace(recipe.video, frames=frames)
        recipe.causal.block_sizes(clip.latent_frames)
    except ConfigError as error:
        block = time_factor * recipe.causal.frames_per_block
        near = {1 + time_factor * (player.covering_latents(max(1, n), recipe) - 1) for n in (frames - block, frames)}
        raise ConfigError(
            f"--frames is {frames}, which no block structure of the teacher fits; nearest: "
            f"{' and '.join(map(str, sorted(near)))}"
        ) from error
    return clip


def memory_plan(request: Request) -> tuple[sampling_memory.Phase, ...]:
    """What the device will hold, phase by phase."""
    recipe, teacher = request.recipe, _TEACHER.value
    latents = recipe.video.latent_frames if teacher else player.covering_latents(request.frames, recipe)
    return sampling_memory.plan(
        recipe,
        "teacher" if teacher else "student",
        batch=len(request.prompts),
        latents=latents,
        prompts=len(encoder.missing(request.encoder, request.texts)),
        image=request.image is not None,
        video=request.video is not None,
        clip=request.clip,
        state=request.program.shapes() if request.program else None,
    )


Texts = Mapping[str, np.ndarray]  # prompt to rows [S, E]


def encode_texts(request: Request) -> Texts:
    """Rows of every prompt, by an encoder that is gone afterwards."""
    return dict(zip(request.texts, encoder.encode(request.encoder, request.texts), strict=True))


def encode_picture(request: Request) -> tuple[jax.Array, ...]:
    """What a teacher with an image branch is given of the picture: image rows ``[B, S, E]`` and condition
    ``[B, F, h, w, 4 + C]``, by encoders that are gone afterwards; nothing without a picture.

    As in the published code CLIP sees the whole picture, squeezed to its square, and the VAE what fits the video.
    """
    recipe, sizes = request.recipe, request.clip
    if request.image is None or request.picture is None or sizes is None:
        return ()
    whole, cropped = (jnp.asarray(files.to_float(x))[None] for x in (request.picture, request.image))
    params = load(request, {"image_encoder": sampling_memory.image_encoder_shapes(sizes)})
    rows = jax.block_until_ready(image_to_video.image_rows(params["image_encoder"], whole, config=sizes))
    free(params)
    params = load(request, sampling_memory.vae_shapes(recipe))
    condition = jax.block_until_ready(image_to_video.condition(params["vae"], cropped, config=recipe))
    free(params)
    return tuple(jnp.repeat(x, len(request.prompts), axis=0) for x in (rows, condition))


def teacher_clips(request: Request, texts: Texts, timing: player.Timing) -> Iterator[np.ndarray]:
    """The teacher's clips, uint8 ``[B, n, H, W, 3]``: denoised all at once, decoded piece by piece."""
    recipe = request.recipe
    rows, null = (
        jnp.asarray(x) for x in (np.stack([texts[p] for p in request.prompts]), texts[recipe.text.negative_prompt])
    )
    seeds = jnp.asarray(_SEED.value + np.arange(len(rows)), jnp.uint32)
    given = rows, null, *encode_picture(request), seeds
    params = load(request, {"teacher": transformer.inference(recipe.teacher)})
    begin = time.perf_counter()
    sampler = batch.teacher_latents if request.image is None else image_to_video.teacher_latents
    sample = sampler.lower(params["teacher"], *given, config=recipe).compile()
    timing.compile, begin = time.perf_counter() - begin, time.perf_counter()
    latents = jax.block_until_ready(sample(params["teacher"], *given))
    timing.total = time.perf_counter() - begin
    free(params)
    params, begin = (
        load(request, sampling_memory.codec_shapes(recipe, encodes=False)),
        time.perf_counter() - timing.total,
    )
    for shown in decoder.decode_clip(params, latents, config=recipe):
        clips = files.to_uint8(np.asarray(shown))
        timing.frames += clips.shape[1]
        timing.total = time.perf_counter() - begin
        if not timing.first:
            timing.first = timing.total
        yield clips


def student_blocks(request: Request, texts: Texts, timing: player.Timing) -> Iterator[np.ndarray]:
    """The student's streams, uint8 ``[B, n, H, W, 3]`` block by block."""
    recipe, count = request.recipe, len(request.prompts)
    encodes = request.image is not None or request.video is not None
    shapes = {"student": transformer.inference(recipe.student), **sampling_memory.codec_shapes(recipe, encodes=encodes)}
    return player.play(
        load(request, shapes),
        np.stack([texts[p] for p in request.prompts]),
        config=recipe,
        frames=request.frames,
        seed=_SEED.value,
        switches={block: np.stack([texts[p]] * count) for block, (_, p) in request.switches.items()},
        image=request.image,
        video=request.video,
        strength=_STRENGTH.value,
        timing=timing,
        loaded=request.program,
    )


def main() -> None:
    """Check everything, say what it takes, then generate and write."""
    request, timing = read_request(), player.Timing()
    phases, limit = memory_plan(request), sampling_memory.device_limit()
    print(sampling_memory.describe(phases, limit), flush=True)
    sampling_memory.check(phases, limit)
    common.enable_compilation_cache()
    common.log_start(request.recipe)
    if request.program:
        print(f"Runs {request.program.path}, attention by {request.program.header['attention']}.", flush=True)
    texts = encode_texts(request)
    for block, (frame, prompt) in sorted(request.switches.items()):
        print(f"From frame {frame} on (block {block}): {prompt}", flush=True)
    fps = request.recipe.video.fps
    upscale = _UPSCALE.value or max(1, VISIBLE // request.recipe.video.height)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(files.VideoWriter(path, fps, upscale)) for path in request.outputs]
        for clips in (teacher_clips if _TEACHER.value else student_blocks)(request, texts, timing):
            if timing.frames == clips.shape[1]:
                print(f"First frame after {timing.first:.2f} s, and {timing.compile:.1f} s of compilation.", flush=True)
            for writer, clip in zip(writers, clips, strict=True):
                writer.append(clip)
    many = f" of each of {len(writers)} videos" if len(writers) > 1 else ""
    print(
        f"{timing.frames} frames{many} in {timing.total:.2f} s; {timing.fps:.1f} frames/s, "
        f"{timing.fps / fps:.2f} times real time ({fps:g} frames/s)."
    )
    print(f"Wrote {', '.join(str(path) for path in request.outputs)}")
