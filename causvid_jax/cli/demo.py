"""Sample a stream and compare student and teacher: ``causvid demo --output=demo``.

Streams a video with one change of prompt while it is generated, and compares the few-step student with the teacher on a
few prompts. Writes ``stream.mp4``, ``stream.gif``, ``comparison.mp4``, ``comparison.gif`` and ``comparison.png``.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from causvid_jax.cli import common
from causvid_jax.cli.options import option
from causvid_jax.config import Recipe, require
from causvid_jax.config.fields import Bounds
from causvid_jax.config.files import atomic
from causvid_jax.config.recipes import CONFIG_HELP, names

if TYPE_CHECKING:
    import numpy as np

    from causvid_jax.sampling.pipeline import StudentPipeline, TeacherPipeline

PROMPTS = ("a red 3 moving left", "a green 7 moving up", "a cyan 5 moving down right")


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    config: Recipe = option("digits", CONFIG_HELP)
    output: str = option("demo", "Directory for the videos and the picture.")
    workdir: str | None = option(None, "Weights of your own training instead of those of the package.")
    prompt: tuple[str, ...] = option((), "Prompts to compare on; the stream starts with the first, then the second.")
    seconds: Annotated[float, Bounds(above=0, most=86400)] = option(20.0, "Length of the stream in seconds of video.")
    seed: int = option(1, "Seed of the noise. With 1 no digit of the stream is cut by an edge.")
    upscale: int = option(4, "Size of a pixel in the files.")

    def __post_init__(self) -> None:
        largest = 8192 // max(self.config.video.height, self.config.video.width)
        require(1 <= self.upscale <= largest, f"--upscale is {self.upscale}; accepted: 1 to {largest}")
        require(0 <= self.seed < 2**31, f"--seed is {self.seed}; accepted: 0 to {2**31 - 1}")


def show_stream(pipe: "StudentPipeline", options: Options, prompts: tuple[str, ...], output: pathlib.Path) -> None:
    """Write ``stream.mp4`` and ``stream.gif`` into ``output`` while the stream runs, and print its speed.

    The second of ``prompts`` replaces the first in the middle.
    """
    from tqdm import tqdm

    from causvid_jax import media
    from causvid_jax.sampling import blocks

    fps = pipe.config.video.fps
    count = max(2, blocks.block_of(round(options.seconds * fps), pipe.config))
    print(f"Streaming {count} blocks: {' -> '.join(map(repr, prompts[:2]))}; first it is compiled ...", flush=True)
    start = time.perf_counter()
    length = pipe.config.causal.frames_per_block * count + 1
    state = pipe.stream(prompts[0], seed=options.seed, frames=length)
    frames, first = 0, 0.0
    with contextlib.ExitStack() as stack:
        paths = (output / f"stream{suffix}" for suffix in media.SUFFIXES)
        files = [stack.enter_context(media.VideoWriter(path, fps, options.upscale)) for path in paths]
        bar = stack.enter_context(tqdm(total=count, unit="block", disable=None))
        for half, prompt in ((count - count // 2, None), (count // 2, prompts[1] if len(prompts) > 1 else None)):
            state = state if prompt is None else pipe.switch(state, prompt)
            # The state after the loop continues the stream.
            for part, state in pipe.frames(state, blocks=half):  # noqa: B007, B020
                first = first or time.perf_counter() - start
                frames += part.shape[1]
                for file in files:
                    file.append(part[0])
                bar.update()
    total = time.perf_counter() - start
    print(f"  {frames} frames in {total:.1f} s, the first after {first:.1f} s (with compilation)", flush=True)


def compare(
    student: "StudentPipeline",
    teacher: "TeacherPipeline",
    options: Options,
    prompts: tuple[str, ...],
    output: pathlib.Path,
) -> None:
    """Write ``comparison`` as video, GIF and picture into ``output``, and print the seconds of a clip.

    The teacher is above the student, with the same prompts and one clip for each. Times are without compilation.
    """
    import numpy as np

    from causvid_jax import media
    from causvid_jax.evaluation import contact_sheet

    video = student.config.video
    count = len(student.config.causal.block_sizes(video.latent_frames))

    def by_teacher(prompt: str, seed: int) -> "np.ndarray":
        return np.concatenate([part[0] for part, _ in teacher.frames(teacher.stream(prompt, seed=seed))])

    def by_student(prompt: str, seed: int) -> "np.ndarray":
        return np.concatenate([part[0] for part, _ in student.frames(student.stream(prompt, seed=seed), blocks=count)])

    samplers: dict[str, Callable[[str, int], np.ndarray]] = {"teacher": by_teacher, "student": by_student}
    clips, seconds = {}, {}
    for name, sample in samplers.items():
        print(f"{name.capitalize()}: {len(prompts)} clips of {video.frames} frames", flush=True)
        sample(prompts[0], 0)  # compiles
        start = time.perf_counter()
        clips[name] = list(prompts), np.stack([sample(p, options.seed + i) for i, p in enumerate(prompts)])
        seconds[name] = (time.perf_counter() - start) / len(prompts)
        print(f"  {seconds[name]:.2f} s per clip, {video.frames / seconds[name]:.1f} frames/s", flush=True)
    print(f"The student is {seconds['teacher'] / seconds['student']:.1f} times faster.", flush=True)
    with atomic(output / "comparison.png") as picture:
        contact_sheet.contact_sheet(clips, examples=len(prompts), columns=7).save(picture, format="PNG")
    grid = np.concatenate([np.concatenate(list(clips[name][1]), axis=2) for name in clips], axis=1)
    for suffix in media.SUFFIXES:
        media.write_video(output / f"comparison{suffix}", grid, video.fps, options.upscale)


def main(options: Options) -> None:
    """Write the stream, then the comparison."""
    start = time.perf_counter()
    print(f"Loading {options.config.name} ...", flush=True)
    from causvid_jax import media
    from causvid_jax.sampling import pipeline, weights

    output, prompts = pathlib.Path(options.output), options.prompt or PROMPTS
    for suffix in media.SUFFIXES:
        media.check_output(output / f"stream{suffix}")
    weights.find(options.config, "teacher", options.workdir)  # refuses missing weights before anything is computed
    common.enable_compilation_cache()
    student = pipeline.load(options.config, checkpoint=options.workdir)
    student.encode_prompt(prompts)  # refuses unknown words before anything is compiled
    show_stream(student, options, prompts, output)
    compare(student, pipeline.load_teacher(options.config, checkpoint=options.workdir), options, prompts, output)
    print(f"Wrote {', '.join(sorted(p.name for p in output.iterdir() if p.is_file()))} to {output}/", flush=True)
    print(f"All in {time.perf_counter() - start:.0f} s. Your own prompt:")
    program = pathlib.Path(sys.executable).with_name("causvid")
    name = program if program.is_file() else "causvid"
    print(f"  {name} {own_command(options, prompts[0])}")


def own_command(options: Options, prompt: str) -> str:
    """Return a command that samples with the recipe and the weights of the demo."""
    # The recipe of a variant or a file has another name than --config has.
    config = options.config.name if options.config.name in names() else "RECIPE"
    checkpoint = f" --checkpoint={options.workdir}" if options.workdir else ""
    return f'sample --config={config}{checkpoint} --prompt="{prompt}" --frames=160 --output=red.mp4'
