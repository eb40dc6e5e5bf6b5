"""Generate videos: ``python -m launch.sample --config=configs/digits.py --prompt="a red 3 moving left"``.

Streams with the four-step student, of any length, and writes while it generates. Several ``--prompt`` run side by side
into ``out_0.mp4``, ``out_1.mp4``, .... ``--image`` starts from a picture, ``--video`` follows a video, and
``--switch "405:a blue 7 moving up"`` changes the prompt at the block that holds frame 405. ``--teacher`` samples the
many-step bidirectional model instead, on one clip. Default weights are those of the package.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from causvid_jax import video as files
from causvid_jax.config import ConfigError, Recipe, VideoConfig, require
from causvid_jax.evaluation import samplers
from causvid_jax.models import text, vae
from causvid_jax.streaming import play, stream
from causvid_jax.weights import stages
from launch import common

_CONFIG = common.define_config_flag()
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to show; give it several times for several videos at once.")
_FRAMES = flags.DEFINE_integer("frames", None, "Frames to make; default: a clip, or as many as --video has.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise; video i of several has seed + i.")
_OUTPUT = flags.DEFINE_string("output", "out.mp4", "The file to write, .mp4 or .gif.")
_IMAGE = flags.DEFINE_string("image", None, "Start from this picture.")
_VIDEO = flags.DEFINE_string("video", None, "Follow this video.")
_STRENGTH = flags.DEFINE_float("strength", 0.5, "With --video: how far from it, up to 1 (free).")
_SWITCH = flags.DEFINE_multi_string("switch", [], "FRAME:PROMPT, another prompt from the block with that frame on.")
_RECACHE = flags.DEFINE_bool("recache", True, "At a switch, rewrite the cache under the new prompt.")
_TEACHER = flags.DEFINE_bool("teacher", False, "Sample the many-step teacher instead of the student.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training's --workdir, or one .safetensors file of the model.")
_UPSCALE = flags.DEFINE_integer("upscale", 0, "Size of a pixel in the file; 0: such that tiny videos can be seen.")

_decode = jax.jit(vae.decode, static_argnames=("config",))

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
        block = play.block_of(frame, recipe)
        require(
            block > 0,
            f"--switch is at frame {frame}, in the first block; accepted: from frame {play.first_frame(1, recipe)} on",
        )
        require(block not in switches, f"two --switch fall into the block that holds frame {frame}; give one")
        switches[block] = play.first_frame(block, recipe), prompt.strip()
    return switches


def output_paths(output: str, count: int) -> list[pathlib.Path]:
    """One writable path per video: the output itself, or numbered."""
    path = pathlib.Path(output)
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}_{i}{path.suffix}") for i in range(count)]
    return [files.check_output(p) for p in paths]


def load(recipe: Recipe, role: str, checkpoint: str | None) -> tuple[stream.Params, Recipe]:
    """``{role, "vae"}`` parameters, and the recipe with the statistics of the VAE's latents."""
    stage = "distill" if role == "student" else "teacher"
    given = pathlib.Path(checkpoint) if checkpoint else None
    require(given is None or given.exists(), f"--checkpoint {checkpoint} does not exist")
    workdir = given if given and given.is_dir() else None
    path = given if given and not workdir else stages.find(recipe.name, stage, workdir)
    params = {role: stages.load_transformer(path, getattr(recipe, role), role)}
    params["vae"], coder = stages.load_vae(stages.find(recipe.name, "vae", workdir), recipe.vae)
    return params, dataclasses.replace(recipe, vae=coder)


@dataclasses.dataclass(frozen=True)
class Request:
    """All that the flags ask for, read and checked."""

    recipe: Recipe
    frames: int
    rows: np.ndarray  # [B, S, E]
    outputs: list[pathlib.Path]
    switches: dict[int, tuple[int, str]]
    image: np.ndarray | None
    video: np.ndarray | None
    params: stream.Params


def read_request() -> Request:
    """The flags as a Request; whatever cannot work is refused here, before any compute."""
    recipe, prompts = common.load_recipe(_CONFIG), _PROMPT.value
    require(bool(prompts), 'no --prompt is given; for example --prompt="a red 3 moving left"')
    require(not (_IMAGE.value and _VIDEO.value), "--image and --video are both given; accepted: one of them")
    require(_UPSCALE.value >= 0, f"--upscale is {_UPSCALE.value}; it must not be negative")
    require(0 <= _SEED.value < 2**32, f"--seed is {_SEED.value}; accepted: 0 to {2**32 - 1}")
    require(_FRAMES.value is None or _FRAMES.value >= 1, f"--frames is {_FRAMES.value}; it must be at least 1")
    frames = _FRAMES.value or recipe.video.frames
    rows = text.encode_prompts(prompts, recipe.text)
    size = recipe.video.height, recipe.video.width
    image = files.read_image(_IMAGE.value, *size) if _IMAGE.value else None
    video = None
    if _VIDEO.value:
        stream.strength_step(recipe.diffusion, _STRENGTH.value)
        video = files.read_video(_VIDEO.value, *size, frames=_FRAMES.value, fps=recipe.video.fps)
        frames = _FRAMES.value or len(video)
        require(len(video) >= frames, f"--frames is {frames}, but --video has only {len(video)} to follow")
    if _TEACHER.value:
        for name, value in (("image", _IMAGE.value), ("video", _VIDEO.value), ("switch", _SWITCH.value)):
            require(not value, f"--{name} is given with --teacher, which cannot stream; leave one of them out")
        recipe = dataclasses.replace(recipe, video=teacher_video(frames, recipe))
    switches = parse_switches(_SWITCH.value, frames, recipe)
    text.encode_prompts([prompt for _, prompt in switches.values()], recipe.text)
    outputs = output_paths(_OUTPUT.value, len(prompts))
    params, recipe = load(recipe, "teacher" if _TEACHER.value else "student", _CHECKPOINT.value)
    return Request(recipe, frames, rows, outputs, switches, image, video, params)


def teacher_video(frames: int, recipe: Recipe) -> VideoConfig:
    """The size of a teacher's clip, which unlike a stream must be whole latent frames and whole blocks."""
    time_factor = vae.time_factor(recipe.vae)
    try:
        clip = dataclasses.replace(recipe.video, frames=frames)
        recipe.causal.block_sizes(clip.latent_frames)
    except ConfigError as error:
        block = time_factor * recipe.causal.frames_per_block
        near = {1 + time_factor * (play.covering_latents(max(1, n), recipe) - 1) for n in (frames - block, frames)}
        raise ConfigError(
            f"--frames is {frames}, which no block structure of the teacher fits; nearest: "
            f"{' and '.join(map(str, sorted(near)))}"
        ) from error
    return clip


def teacher_clips(request: Request, timing: play.Timing) -> Iterator[np.ndarray]:
    """The teacher's clips, uint8 ``[B, T, H, W, 3]``, all at once."""
    recipe, params = request.recipe, jax.tree.map(jnp.asarray, request.params)
    rows, empty = jnp.asarray(request.rows), jnp.asarray(text.encode_prompts([""], recipe.text)[0])
    seeds = jnp.asarray(_SEED.value + np.arange(len(rows)), jnp.uint32)
    begin = time.perf_counter()
    sample = samplers.teacher_latents.lower(params["teacher"], rows, empty, seeds, config=recipe).compile()
    shape = (len(rows), recipe.video.latent_frames, *stream.latent_size(recipe), recipe.vae.z_dim)
    latents = jax.ShapeDtypeStruct(shape, jnp.float32)
    decode = _decode.lower(params["vae"], latents, config=recipe.vae).compile()
    timing.compile, begin = time.perf_counter() - begin, time.perf_counter()
    clips = files.to_uint8(decode(params["vae"], sample(params["teacher"], rows, empty, seeds)))
    timing.first = timing.total = time.perf_counter() - begin
    timing.frames = timing.first_frames = clips.shape[1]
    yield clips


def student_blocks(request: Request, timing: play.Timing) -> Iterator[np.ndarray]:
    """The student's streams, uint8 ``[B, n, H, W, 3]`` block by block."""
    recipe, count = request.recipe, len(request.rows)
    rows = {block: text.encode_prompts([p] * count, recipe.text) for block, (_, p) in request.switches.items()}
    return play.play(
        request.params,
        request.rows,
        config=recipe,
        frames=request.frames,
        seed=_SEED.value,
        switches=rows,
        recache=_RECACHE.value,
        image=request.image,
        video=request.video,
        strength=_STRENGTH.value,
        timing=timing,
    )


def main() -> None:
    """Check everything, then generate and write."""
    request, timing = read_request(), play.Timing()
    common.enable_compilation_cache()
    for block, (frame, prompt) in sorted(request.switches.items()):
        print(f"From frame {frame} on (block {block}): {prompt}", flush=True)
    fps = request.recipe.video.fps
    upscale = _UPSCALE.value or max(1, VISIBLE // request.recipe.video.height)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(files.VideoWriter(path, fps, upscale)) for path in request.outputs]
        for clips in (teacher_clips if _TEACHER.value else student_blocks)(request, timing):
            if timing.frames == clips.shape[1]:
                print(f"First frame after {timing.first:.2f} s, and {timing.compile:.1f} s of compilation.", flush=True)
            for writer, clip in zip(writers, clips, strict=True):
                writer.append(clip)
    many = f" of each of {len(writers)} videos" if len(writers) > 1 else ""
    print(
        f"{timing.frames} frames{many} in {timing.total:.2f} s; {timing.fps:.1f} frames/s, "
        f"{timing.fps / fps:.2f} times real time ({fps} frames/s)."
    )
    print(f"Wrote {', '.join(str(path) for path in request.outputs)}")


if __name__ == "__main__":
    common.run(main)
