"""Generate videos: ``causvid sample --config=digits --prompt="a red 3 moving left"``.

The few-step student streams videos of any length and writes them block by block. Several ``--prompt`` run in parallel
into ``out_0.mp4``, ``out_1.mp4``, .... ``--image`` starts from a picture, ``--video`` follows a video, and
``--switch "405:a blue 7 moving up"`` changes the prompt at the block that holds frame 405. ``--teacher`` samples one
clip by the many-step bidirectional model instead; with an image branch (``--config=wan_14b:i2v``) it starts from
``--image``. Default weights are those of the package.

Published weights are read without conversion: ``--checkpoint=Wan2.1-T2V-1.3B --student=self_forcing_dmd.pt``; the
file's name chooses the recipe. DIR of ``--checkpoint=DIR`` may also be a working directory or the output of
``causvid convert``. Such a folder holds

    distill/weights.safetensors          the student, or with --teacher teacher/weights.safetensors
    vae/weights.safetensors
    text_encoder/weights.safetensors     UMT5; beside it tokenizer.json, of google/umt5-xxl
    image_encoder/weights.safetensors    CLIP, for a teacher with an image branch
    taehv/weights.safetensors            with --config.decoder=taehv; or taew2_1.safetensors as published
    prompts/                             the cache of encoded prompts

``--program=FILE`` runs a program that ``causvid compile --platform`` built from the same recipe. ``--exact`` follows
the published code's numerics (docs/wan.md).
"""

import pathlib
from typing import TYPE_CHECKING

from causvid_jax.cli import common
from causvid_jax.config import MESH_AXES, ConfigError, Recipe
from causvid_jax.sampling.request import SampleRequest

if TYPE_CHECKING:
    from causvid_jax.analysis.memory import Phase
    from causvid_jax.sampling.session import Session

Options = SampleRequest

AXES = ("slices", *MESH_AXES)
"""Sizes of a recipe's mesh."""
LARGE = 2 * 10**9
"""Bytes above which the memory plan of a run is printed."""


def main(request: SampleRequest) -> None:
    """Check the request against files and memory, then generate and write."""
    print(f"Loading {request.config.name} ...", flush=True)
    for line in unused_mesh(request.config):
        print(line, flush=True)

    from causvid_jax.analysis import memory
    from causvid_jax.checkpoints.table import OURS
    from causvid_jax.sampling import session

    if request.replay:
        replay(request)
        return
    opened = session.open_session(request)
    for checkpoint in opened.weights.values():
        if checkpoint.format != OURS:
            print(f"Reads {checkpoint}", flush=True)
    for line in unlike_captions(opened):
        print(line, flush=True)
    phases = memory_plan(opened)
    limit = memory.memory_limit()
    peak = max(phase.total for phase in phases)
    if peak > min(LARGE, (limit or LARGE) // 2):
        print(memory.describe(phases, limit), flush=True)
    memory.check_fits(phases, limit)
    common.enable_compilation_cache()
    common.log_start(opened.recipe)
    if opened.program:
        print(f"Runs {opened.program.path}, attention by {opened.program.header['attention']}.", flush=True)
    session.run(opened, lambda line: print(line, flush=True))


def replay(request: SampleRequest) -> None:
    """Generate the frames of a video again and write them with the same script.

    Raises:
        ConfigError: no script, one of another recipe or other weights, or frames that differ from the recording.
    """
    from causvid_jax import media
    from causvid_jax.models import precision
    from causvid_jax.sampling.script import read_script
    from causvid_jax.serve import film
    from causvid_jax.serve.programs import open_programs

    source = pathlib.Path(request.replay or "")
    script = read_script(source)
    path = media.check_output(request.output)
    itself = path.exists() and path.samefile(source)  # the recording stays until its replay is complete
    recipe = precision.exact(request.config, False) if request.exact else request.config
    common.enable_compilation_cache()
    programs = open_programs(recipe, request.checkpoint, request.files, loras=request.lora)
    film.check_script(script, programs)
    with media.VideoWriter(path, recipe.video.fps, request.pixel_size, whole=itself) as writer:
        writer.comment = script.to_json()
        with media.BackgroundWriter([writer]) as out:
            for frames in film.replay(programs, script):
                out.append(frames[None])
    same = "; every frame is identical to the first film" if script.sha256 else ""
    print(f"Wrote {writer.frames} frames to {path}{same}.", flush=True)


def memory_plan(opened: "Session") -> "tuple[Phase, ...]":
    """Return the memory of the device, phase by phase (:func:`causvid_jax.analysis.memory.sampling_phases`)."""
    from causvid_jax.analysis import memory
    from causvid_jax.sampling import blocks
    from causvid_jax.text import encoder

    recipe, teacher = opened.recipe, opened.request.teacher
    return memory.sampling_phases(
        recipe,
        "teacher" if teacher else "student",
        batch=len(opened.request.prompt),
        latents=recipe.video.latent_frames if teacher else blocks.covering_latents(opened.frames, recipe),
        prompts=len(encoder.missing(opened.encoder, opened.texts)),
        image=opened.image is not None,
        video=opened.video is not None,
        clip=opened.clip,
        state=opened.program.shapes() if opened.program else None,
    )


def unused_mesh(recipe: Recipe) -> list[str]:
    """Return a note if the recipe has a mesh of several devices, because sampling does not use it."""
    given = [f"{name} {getattr(recipe.parallel, name)}" for name in AXES if getattr(recipe.parallel, name) > 1]
    if not given:
        return []
    return [f"Note: the mesh of the recipe ({', '.join(given)}) is not used; causvid sample generates on one device."]


def unlike_captions(opened: "Session") -> list[str]:
    """Return a note for every prompt of a digits recipe that has another form than all training captions."""
    from causvid_jax.data import digits
    from causvid_jax.text import words

    recipe = opened.recipe
    if recipe.data.name != "moving_digits" or recipe.text.kind != "words":
        return []
    example, lines = digits.captions(recipe.data, "train")[0], []
    for prompt in dict.fromkeys([*opened.request.prompt, *(text for _, text in opened.switches.values())]):
        try:
            count = len(digits.parse_caption(" ".join(words.split_words(prompt, recipe.text))))
        except ConfigError:
            count = 0
        if count != recipe.data.digits_per_clip:
            lines.append(
                f"Note: the recipe was trained on captions like {example!r}; the video of {prompt!r} may be anything."
            )
    return lines
