"""Check a user's request for videos before JAX is imported, a file is read or anything is computed."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

from causvid_jax.config import ConfigError, Recipe, published, require
from causvid_jax.config.fields import Bounds, convert, field_types
from causvid_jax.config.recipes import CONFIG_HELP, names, option
from causvid_jax.sampling import blocks

FRAMES = 10**7
"""The most frames of a video: a week at 16 frames/s."""
SIDE = 8192
"""The largest width and height of a file."""
VISIBLE = 256
"""Videos of a smaller height are enlarged unless ``upscale`` is given."""


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Videos to generate; the fields are the flags of ``causvid sample``, whose ``--help`` describes them.

        request = SampleRequest(config=load_recipe("digits"), prompt=("a red 3 moving left",), output="red.mp4")
        session.run(session.open_session(request))  # causvid_jax.sampling.session

    Raises:
        ConfigError: a value of another type or out of bounds, or two that exclude each other.
    """

    config: Recipe = option(None, CONFIG_HELP)
    prompt: tuple[str, ...] = option((), "Prompt of the video. Several prompts make several videos at once.")
    frames: int | None = option(None, "Number of frames; default: a clip, or that of --video.")
    seed: int = option(0, "Seed of the noise; with several videos, video i has seed + i.")
    output: str = option("out.mp4", "The file to write, .mp4 or .gif; several videos are numbered.")
    image: str | None = option(None, "Start from this picture.")
    video: str | None = option(None, "Follow this video.")
    strength: Annotated[float, Bounds(least=0, most=1)] | None = option(
        None, "With --video: distance from it, up to 1 (independent of it). Default: 0.5."
    )
    switch: tuple[str, ...] = option((), "FRAME:PROMPT, another prompt from the block with that frame on.")
    teacher: bool = option(False, "Sample a clip by the many-step teacher instead of a stream by the student.")
    checkpoint: str | None = option(
        None,
        "A published folder, a training's --workdir, a folder that causvid convert made, or one weights file of the "
        "model. "
        "Default: the weights of the package.",
    )
    student: str | None = option(
        None, "Student weights, such as self_forcing_dmd.pt, instead of those in --checkpoint."
    )
    vae: str | None = option(None, "The VAE's weights, such as Wan2.1_VAE.pth, instead of those in --checkpoint.")
    taehv: str | None = option(None, "The tiny decoder's weights, for --config.decoder=taehv.")
    lora: tuple[str, ...] = option((), "FILE or FILE:STRENGTH, a LoRA of the student or teacher; several are added.")
    exact: bool = option(False, "Round as the published code does, and use its tables of noise levels.")
    program: str | None = option(None, "Run this program of causvid compile instead of tracing the model.")
    decode_device: Annotated[int, Bounds(least=0, most=4095)] | None = option(
        None, "Index of the device that decodes while the first device generates; default: the first device does both."
    )
    replay: str | None = option(None, "Generate this video again, by the script in its metadata.")
    upscale: int = option(0, "Size of a pixel in the file; 0: enlarge tiny videos.")

    def __post_init__(self) -> None:
        require(isinstance(self.config, Recipe), f"config is {self.config!r}; give a recipe, such as load_recipe(NAME)")
        for name, hint in field_types(type(self)).items():
            if name != "config" and getattr(self, name) is not None:
                convert(getattr(self, name), hint, f"--{name}")
        largest = SIDE // max(self.config.video.height, self.config.video.width)
        require(0 <= self.upscale <= largest, f"--upscale is {self.upscale}; accepted: 0 to {largest}")
        if self.replay:
            for name in ("prompt", "frames", "seed", "image", "video", "strength", "switch", "teacher", "program"):
                require(not getattr(self, name), f"--{name} is given with --replay, whose script sets it; leave it out")
            require(self.decode_device is None, "--decode_device is given with --replay, which uses one device")
            return
        require(bool(self.prompt), 'no --prompt is given; for example --prompt="a red 3 moving left"')
        require(len(self.prompt) <= 1024, f"--prompt is given {len(self.prompt)} times; accepted: up to 1024")
        require(all(text.strip() for text in self.prompt), "--prompt is empty; say what to show")
        require(not (self.image and self.video), "--image and --video are both given; accepted: one of them")
        for name in ("teacher", "image", "video"):
            require(
                not (getattr(self, name) and self.program),
                f"--{name} is given with --program, which supports text to video only; leave one of them out",
            )
        for name in ("teacher", "program"):
            require(
                self.decode_device is None or not getattr(self, name),
                f"--decode_device is given with --{name}, which decodes on its own device; leave one of them out",
            )
        require(
            self.decode_device is None or self.config.causal.on_prompt_switch != "reset",
            f"--decode_device={self.decode_device} is given with causal.on_prompt_switch 'reset'; accepted: 'keep', "
            "'recompute'",
        )
        require(0 <= self.seed < 2**32, f"--seed is {self.seed}; accepted: 0 to {2**32 - 1}")
        require(self.frames is None or self.frames >= 1, f"--frames is {self.frames}; it must be at least 1")
        require(self.frames is None or self.frames <= FRAMES, f"--frames is {self.frames}; accepted: up to {FRAMES}")
        require(
            self.strength is None or self.video is not None,
            f"--strength={self.strength} is given without --video; it is the distance from that video",
        )
        self._check_role()
        switches = self.switches((self.frames or FRAMES) if self.video else self.length)
        if self.config.text.kind == "words":
            from causvid_jax.text import words  # it imports numpy

            words.encode_words([*self.prompt, *(prompt for _, prompt in switches.values())], self.config.text)

    @staticmethod
    def config_of(values: Mapping[str, Any]) -> str | None:
        """Return the recipe if no ``--config`` is given: that of the video to replay or of the published file.

        Raises:
            ConfigError: the video to replay has no script, or one of a recipe that has no name in the package.
        """
        if not values.get("replay"):
            return published.recipe_of(values)
        from causvid_jax.sampling.script import read_script  # it imports the video decoder

        name = read_script(values["replay"]).recipe
        require(
            name.partition(":")[0] in names(),
            f"video {values['replay']!r} was made by recipe {name!r}, no recipe of the package; give its --config",
        )
        return name

    def _check_role(self) -> None:
        for name in ("image", "video", "switch", "program", "decode_device"):
            require(
                self.teacher or not self.config.rolling_blocks or getattr(self, name) in (None, ()),
                f"--{name} is given with rolling_blocks {self.config.rolling_blocks} of recipe {self.config.name!r}, "
                "which denoises several blocks jointly from text alone; leave it out",
            )
        branch = self.has_image_branch
        require(
            not branch or self.image,
            f"the {'teacher' if self.teacher else 'student'} of recipe {self.config.name!r} has an image branch; it "
            "starts from a picture, which --image gives",
        )
        require(
            not (branch and not self.teacher and (self.video or self.program)),
            f"recipe {self.config.name!r} has a student with an image branch, which starts from --image alone; leave "
            "--video and --program out",
        )
        for name, value in (("image", not branch and self.image), ("video", self.video), ("switch", self.switch)):
            require(
                not (self.teacher and value),
                f"--{name} is given with --teacher, which cannot stream; leave one of them out",
            )
        require(
            not (self.teacher and self.student),
            "--student is given with --teacher, which samples the teacher; leave one of them out",
        )
        require(
            self.taehv is None or self.config.decoder == "taehv",
            f"--taehv is given, but the recipe decodes with {self.config.decoder!r}; add --config.decoder=taehv",
        )
        if self.teacher:
            teacher_recipe(self.config, self.length)

    @property
    def has_image_branch(self) -> bool:
        """Whether the sampled network has an image branch."""
        net = self.config.teacher if self.teacher else self.config.student
        return net.image_dim > 0 or net.image_channels > 0

    @property
    def files(self) -> dict[str, str | None]:
        """Names of networks to the weights files that replace those of ``checkpoint``; None: no file."""
        return {name: getattr(self, name) for name in ("student", "vae", "taehv")}

    @property
    def length(self) -> int:
        """Number of pixel frames of a request that follows no video."""
        return self.frames or self.config.video.frames

    @property
    def pixel_size(self) -> int:
        """Side of the square of pixels in the file that shows one pixel of the video."""
        return self.upscale or max(1, VISIBLE // self.config.video.height)

    @property
    def outputs(self) -> list[pathlib.Path]:
        """One path per video: the output itself, or numbered."""
        path, count = pathlib.Path(self.output), len(self.prompt)
        return [path] if count == 1 else [path.with_name(f"{path.stem}_{i}{path.suffix}") for i in range(count)]

    def switches(self, frames: int) -> dict[int, tuple[int, str]]:
        """Return ``{block: (first pixel frame of the block, prompt)}`` of the flag ``--switch``.

        ``frames`` is the length of the video in pixel frames.

        Raises:
            ConfigError: a value that is not FRAME:PROMPT, a frame outside the video or in its first block, or two in
                one block.
        """
        result: dict[int, tuple[int, str]] = {}
        for value in self.switch:
            number, _, prompt = value.partition(":")
            number, prompt = number.strip(), prompt.strip()
            require(
                number.isascii() and number.isdigit() and len(number) < 19 and bool(prompt),
                f"--switch is {value!r}; accepted: FRAME:PROMPT, as '40:a red 3'",
            )
            frame = int(number)
            require(0 < frame < frames, f"--switch is at frame {frame}; accepted: 1 to {frames - 1}")
            block = blocks.block_of(frame, self.config)
            earliest = blocks.first_frame(1, self.config)
            require(block > 0, f"--switch is at frame {frame}, in the first block; accepted: from frame {earliest} on")
            require(block not in result, f"two --switch fall into the block that holds frame {frame}; give one")
            result[block] = blocks.first_frame(block, self.config), prompt
        return result


def teacher_recipe(recipe: Recipe, frames: int) -> Recipe:
    """Return the recipe with clips of ``frames`` pixel frames, which must be whole latent frames and whole blocks.

    Raises:
        ConfigError: no block structure fits; the message names the nearest lengths.
    """
    factor = 2 ** sum(recipe.vae.temporal_downsample)
    try:
        clip = dataclasses.replace(recipe.video, frames=frames)
        recipe.causal.block_sizes(clip.latent_frames)
    except ConfigError as error:
        block = factor * recipe.causal.frames_per_block
        lengths = (max(1, frames - block), frames)
        near = sorted({1 + factor * (blocks.covering_latents(n, recipe) - 1) for n in lengths})
        raise ConfigError(
            f"--frames is {frames}, which no block structure of the teacher fits; nearest: "
            f"{' and '.join(map(str, near))}"
        ) from error
    return dataclasses.replace(recipe, video=clip)
