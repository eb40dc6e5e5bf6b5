"""Settings of the diffusion, the data, the optimizers and the training stages (``config.distill`` has two more)."""

import dataclasses
import itertools
from typing import Annotated, ClassVar, Literal

from causvid_jax.config.errors import require
from causvid_jax.config.fields import LARGE, Bounds, Config, Count, CountOrZero, NotNegative, Positive, Probability
from causvid_jax.config.model import LoraConfig, Timestep

Stretch = tuple[Count, CountOrZero, Count]
EmaDecay = Annotated[float, Bounds(least=0, below=1)]


def check_interval(field: str, interval: tuple[float, float]) -> None:
    """Check that the two timesteps of a ``guidance_interval`` ascend; raise a ConfigError that names ``field``."""
    low, high = interval
    require(
        low < high,
        f"{field} is ({low:g}, {high:g}); accepted: the lowest and the highest timestep with guidance, for example "
        "(700, 1000)",
    )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Config):
    """Flow matching: ``x_t = (1 - sigma) x0 + sigma noise``, ``timestep = 1000 sigma`` (``diffusion.flow``).

    Every network of a recipe (teacher, fake score, student) uses this one grid,
    ``sigma(u) = shift u / (1 + (shift - 1) u)`` with u from 1 (noise) to 0 (arXiv 2403.03206, section 5.3.2).
    ``student_shift`` is a separate shift for the student's timesteps (0: ``shift``). Self-Forcing's code needs none: it
    draws the timesteps of its student and of its scores with the shift 5, so its distillation has ``shift`` 5.

    The teacher takes ``num_inference_steps`` steps of ``solver``: ``"euler"``, or ``"unipc"`` (arXiv 2302.04867).
    ``guidance_scale`` is the g of ``v = v_uncond + g (v_cond - v_uncond)`` (arXiv 2207.12598); g = 1 is no guidance.
    ``guidance_interval`` is the lowest and the highest timestep with guidance, both included; g is 1 elsewhere (arXiv
    2404.07724). ``guidance_eta`` is the weight of the part of ``v_cond - v_uncond`` that is parallel to the conditional
    x0 (arXiv 2410.02416, eta); 1 is plain guidance, and less avoids its oversaturation. Both hold for teacher clips,
    trajectories and the consistency stage's teacher; the real score of the distillation has its own in
    ``train_distill``.

    ``denoising_timesteps`` are the student's nominal timesteps ``1000 u`` before the shift, descending from 1000 (pure
    noise), without the final 0. Without ``warp`` they are the timesteps themselves (the 1000, 757, 522 of CausVid's
    three-step checkpoints). If the first timestep is below 1000 (999.375 of rCM), a block starts from noise times its
    noise level. ``first_block_timesteps`` has one list for each of the first blocks after the start or a cut, such as
    ``((1000, 750, 500, 250), (1000, 500))``. Causal Forcing++ (arXiv 2605.15141) and Causal-rCM (arXiv 2606.25473) have
    four steps for the first block and one or two for all others. ODE regression (``train_init``) learns the steps of
    ``denoising_timesteps`` alone.
    """

    label: ClassVar[str] = "diffusion"

    shift: Positive = 8.0
    student_shift: NotNegative = 0.0
    num_inference_steps: Annotated[int, Bounds(least=1, most=10_000)] = 50
    solver: Literal["euler", "unipc"] = "euler"
    guidance_scale: NotNegative = 6.0
    guidance_interval: tuple[Timestep, Timestep] = (0.0, 1000.0)
    guidance_eta: Probability = 1.0
    denoising_timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    first_block_timesteps: tuple[tuple[float, ...], ...] = ()
    warp: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.denoising_timesteps[:1]
        lists = {"denoising_timesteps": self.denoising_timesteps}
        lists |= {f"first_block_timesteps[{block}]": steps for block, steps in enumerate(self.first_block_timesteps)}
        for name, steps in lists.items():
            require(
                bool(steps and 999 <= steps[0] <= 1000)
                and all(0 < step <= 1000 for step in steps)
                and list(steps) == sorted(set(steps), reverse=True),
                f"diffusion.{name} is {steps}; it must be a list of distinct values in (0, 1000], descending, "
                "that begins with 1000 (pure noise), for example (1000, 750, 500, 250)",
            )
            require(
                steps[:1] == start,
                f"diffusion.{name} begins with {steps[0]:g}; accepted: {start[0]:g}, as in denoising_timesteps",
            )
        check_interval("diffusion.guidance_interval", self.guidance_interval)
        require(
            self.warp or not self.student_shift,
            f"diffusion.student_shift is {self.student_shift:g} with warp off, where denoising_timesteps are not "
            "shifted; use 0, or warp=True",
        )

    def steps_of(self, block: int) -> int:
        """Return the number of the student's denoising steps of a block, counted from 0 since the start or a cut."""
        first = self.first_block_timesteps
        return len(first[block] if block < len(first) else self.denoising_timesteps)


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """The training data: ``name`` is ``"moving_digits"`` (generated) or ``"videos"`` (a folder of your own).

    ``mixture`` lists the latents that training reads, ``(dataset, weight)`` each: a folder below ``WORKDIR/data`` or an
    absolute path, and its relative weight. Empty means ``latents`` alone. ``prompt_file`` is a list of prompts
    (``data.captions``) for everything that needs no video: ODE trajectories, self rollouts, samples.

    The other fields describe digits. There are ``train_clips`` and ``test_clips`` clips. (Of own videos every 50th is
    held out for tests.) ``handwriting`` is ``"mnist"`` (the scans as they are) or ``"upright"`` (sheared upright,
    without ambiguous scans: ``data.digits.handwriting``). ``digit_size`` is in pixels, ``speed`` in pixels per frame.
    Two shares of all combinations of digit, colour and direction appear in no training clip: ``held_out_fraction``,
    which reports use, and ``validation_fraction``, on which settings are chosen.
    """

    label: ClassVar[str] = "data"

    name: Literal["moving_digits", "videos"] = "moving_digits"
    train_clips: CountOrZero = 4096
    test_clips: CountOrZero = 512
    handwriting: Literal["mnist", "upright"] = "mnist"
    digit_size: Annotated[int, Bounds(least=1, most=8192)] = 16
    speed: Annotated[int, Bounds(least=1, most=8192)] = 1
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
    digits_per_clip: Annotated[int, Bounds(least=1, most=2)] = 1
    held_out_fraction: Annotated[float, Bounds(least=0, most=0.5)] = 0.1
    validation_fraction: Annotated[float, Bounds(least=0, most=0.3)] = 0.0
    seed: CountOrZero = 0
    mixture: tuple[tuple[str, Positive], ...] = ()
    prompt_file: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name, _ in self.mixture]
        require(len(set(names)) == len(names), f"data.mixture names a dataset twice: {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config):
    """A linear warm-up and a cosine (or constant) schedule, clipping by the global norm, and an EMA of the weights.

    ``kind`` is ``"adamw"`` or ``"muon"`` (arXiv 2502.16982). With ``"muon"`` the kernels of layers and of convolutions
    take orthogonalised steps and all other parameters take AdamW's (``training.optimizers.make_optimizer``); both have
    the same ``learning_rate``. Gradients of a global norm above ``clip_norm`` are scaled down to it.

    At each step of ``restarts`` warm-up and cosine begin again (arXiv 1608.03983), with ``restart_factor`` times the
    learning rate of the cosine before. Moments and EMA stay.

    The EMA of the parameters is sampled and exported: ``ema = d ema + (1 - d) params`` with ``d = ema_decay`` from step
    ``ema_start`` on. Before that step the EMA is a copy of the parameters, so that it forgets the initialisation.
    """

    label: ClassVar[str] = "optimizer"

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Bounds(least=0, most=10)] = 1e-4
    warmup_steps: CountOrZero = 100
    schedule: Literal["constant", "cosine"] = "constant"
    restarts: tuple[Count, ...] = ()
    restart_factor: Annotated[float, Bounds(least=0.001, most=1)] = 1.0
    b1: EmaDecay = 0.9
    b2: EmaDecay = 0.999
    weight_decay: NotNegative = 0.01
    clip_norm: Positive = 10.0
    ema_decay: EmaDecay = 0.0
    ema_start: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = f"schedule {self.schedule!r}"
        self._check_effect(("restarts",), self.schedule == "cosine", schedule, "schedule 'cosine'")
        self._check_effect(("restart_factor",), bool(self.restarts), "no restarts", "restarts")
        self._check_effect(("ema_start",), self.ema_decay > 0, "ema_decay 0", "an ema_decay above 0")
        require(
            all(b - a > self.warmup_steps for a, b in itertools.pairwise((0, *self.restarts))),
            f"optimizer.restarts is {self.restarts}; each must be more than warmup_steps ({self.warmup_steps}) "
            "after the one before",
        )


@dataclasses.dataclass(frozen=True)
class StageConfig(Config):
    """Settings of every training stage. ``frames`` is the length of a clip (0: the full clip).

    ``frames`` counts pixel frames in the stages of the codecs and latent frames in all other stages. ``curriculum``
    lists parts of the training before the main part, each ``(until_step, frames, batch_size)``. Short clips teach much
    of the task at a fraction of the cost. A stage with fewer ``steps`` than its curriculum ends within it
    (:attr:`stretches`). ``accumulate`` splits every batch into that many parts and processes them one after another,
    with the memory of one part.

    Every ``sample_every`` steps ``samples`` clips are sampled and written (0: none).

    A checkpoint is saved every ``save_every`` steps; the last ``keep`` stay, and those of every ``keep_every`` steps
    (0: none). An update is rejected if its loss or gradient is not finite, or if its loss is above ``bad_loss_factor``
    (0: no limit) times the median of the last ``bad_loss_window`` losses. ``on_bad_loss`` is ``"stop"`` (the run ends
    with a checkpoint of the step before) or ``"skip"`` (it continues with the next batch). The log names the batch's
    examples.

    With ``lora.rank`` a stage of a transformer trains adapters and keeps its initial weights fixed. Optimizer and EMA
    hold the adapters only. The stage writes ``lora/`` (peft's layout) and the weights with the adapters merged.
    """

    label: ClassVar[str] = "stage"

    steps: Count = 1000
    batch_size: Count = 8
    frames: CountOrZero = 0
    curriculum: tuple[Stretch, ...] = ()
    accumulate: Count = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: CountOrZero = 0
    log_every: Count = 50
    sample_every: Count = 1000
    samples: CountOrZero = 16
    save_every: Count = 500
    keep: Count = 2
    keep_every: CountOrZero = 0
    on_bad_loss: Literal["stop", "skip"] = "stop"
    bad_loss_factor: NotNegative = 100.0
    bad_loss_window: Count = 64
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.keep_every % self.save_every == 0,
            f"{self.label}.keep_every is {self.keep_every}; it must be 0 or a multiple of save_every, which is "
            f"{self.save_every}",
        )
        require(
            self.bad_loss_factor == 0 or self.bad_loss_factor > 1,
            f"{self.label}.bad_loss_factor is {self.bad_loss_factor}; it must be above 1, or 0 for no limit",
        )
        ends = [end for end, _, _ in self.curriculum]
        require(
            ends == sorted(set(ends)), f"{self.label}.curriculum ends at steps {ends}; they must ascend without repeats"
        )

    @property
    def stretches(self) -> tuple[tuple[int, int, int], ...]:
        """``(until_step, frames, batch_size)`` of every part of the stage, the last one until ``steps``.

        These are the curriculum and then the main part. Parts that start at ``steps`` or later are left out, and the
        one across ``steps`` ends there.
        """
        result: list[tuple[int, int, int]] = []
        for end, frames, size in (*self.curriculum, (self.steps, self.frames, self.batch_size)):
            result.append((min(end, self.steps), frames, size))
            if end >= self.steps:
                break
        return tuple(result)


@dataclasses.dataclass(frozen=True)
class VAEStageConfig(StageConfig):
    """VAE training on clips of ``frames`` pixel frames; ``kl_weight`` is the weight of the KL term of the loss.

    From step ``decoder_from`` on the decoder alone is trained, without crops (default: never). With 0 the latents of
    the initial weights, and all networks trained on them, stay valid.

    The decoder decodes ``concat_clips`` clips of the batch as one video. It looks about 24 latent frames back. If it is
    trained on single clips, its behaviour on longer histories is untested.

    If ``crop_frames > 0``, decode a random run of ``crop_frames`` latent frames with an empty decoder cache. Every
    latent must then describe its frames completely. Without this the VAE may store constant content (such as colour)
    only in early latents, and the content is lost when the cache is reset. A decoder that saw crops only makes errors
    on longer histories, so let whole clips follow (``decoder_from``).
    """

    label: ClassVar[str] = "train_vae"

    kl_weight: NotNegative = 1e-5
    decoder_from: CountOrZero = LARGE
    concat_clips: Count = 1
    crop_frames: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest = min(size for _, _, size in self.stretches) // self.accumulate
        require(
            self.concat_clips <= max(smallest, 1),
            f"train_vae.concat_clips is {self.concat_clips}; accepted: 1 to the clips of the smallest batch that are "
            f"processed together (batch / accumulate), {smallest}",
        )
        require(
            not (self.crop_frames and self.concat_clips > 1),
            f"train_vae.crop_frames is {self.crop_frames} and train_vae.concat_clips is {self.concat_clips}; accepted: "
            "one of them (crop_frames 0 for whole clips, concat_clips 1 for single clips)",
        )


@dataclasses.dataclass(frozen=True)
class TAEHVStageConfig(StageConfig):
    """Training of the tiny codec on the trained VAE's latents, on clips of ``frames`` pixel frames.

    ``noise`` is the standard deviation of the noise added to the decoder's input (latents have unit variance), so that
    it tolerates errors of the student.

    ``rollouts`` lists datasets of the student's streams, ``(clips, number)`` each: ``number`` streams of ``clips``
    clips (``causvid prepare --stage=streams``). With them, the stage learns to decode the latents of streams instead of
    those of real clips, with the VAE's frames as the target. Student latents deviate from encoded latents, and more so
    late in a stream. A small decoder trained on encoded latents only may fail there although the VAE still decodes
    well. Use it for a second run that starts from the weights of the first (``--init_from``).
    """

    label: ClassVar[str] = "train_taehv"

    noise: NotNegative = 0.05
    rollouts: tuple[tuple[Count, Count], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = [clips for clips, _ in self.rollouts]
        require(len(set(lengths)) == len(lengths), f"train_taehv.rollouts names a length twice: {lengths}")


@dataclasses.dataclass(frozen=True)
class TeacherStageConfig(StageConfig):
    """Flow matching on latents (``training.flow_matching``).

    With probability ``caption_dropout`` a clip is trained with the negative prompt, for guidance. With ``chunks`` every
    block is trained as a separate clip with its own timestep. ``train_distill.teacher="chunk"`` needs such a score of
    single chunks (RMD, arXiv 2609.37925).
    """

    label: ClassVar[str] = "train_teacher"

    caption_dropout: Probability = 0.1
    chunks: bool = False


def _check_switches(config: StageConfig, prompt_switch_prob: float) -> None:
    """Refuse prompt switches if parts have one clip: the context is that of another clip of the same part."""
    for size in {size for _, _, size in config.stretches}:
        require(
            prompt_switch_prob == 0 or size // config.accumulate >= 2,
            f"{config.label}.prompt_switch_prob is {prompt_switch_prob}, which takes the context of another clip; "
            f"a batch of {size} in {config.accumulate} parts (accumulate) has one clip per part, and needs two",
        )


@dataclasses.dataclass(frozen=True)
class CausalStageConfig(TeacherStageConfig):
    """Flow matching of a causal teacher by teacher forcing: every block has its own noise level and a clean past.

    It starts from the bidirectional teacher. The result makes the trajectories of ``train_init.teacher = "causal"``.
    With probability ``prompt_switch_prob`` a clip continues another clip's past (``distill.ode_regression.splice``).
    """

    label: ClassVar[str] = "train_causal"

    prompt_switch_prob: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_switches(self, self.prompt_switch_prob)
        require(
            not self.chunks, "train_causal.chunks is True; only train_teacher can be trained on chunks, so use False"
        )


@dataclasses.dataclass(frozen=True)
class InitStageConfig(StageConfig):
    """ODE regression on a teacher's trajectories (CausVid, section 4.3 and eq. 6; ``distill.ode_regression``).

    With ``include_clean`` some blocks are clean (t = 0); they are context and have no loss. ``trajectories`` is the
    number of trajectories. ``teacher`` is ``"bidirectional"`` (CausVid: trajectories of whole clips) or ``"causal"``
    (Causal Forcing, arXiv 2602.02214: trajectories of every block given the clean past, from the stage ``causal``). A
    student of the teacher's size starts from its weights. A bidirectional teacher denoises all blocks of a clip
    jointly, so each block depends on the noise of later blocks. A causal student cannot see that noise and learns only
    the conditional mean.

    With probability ``prompt_switch_prob`` a clip continues another clip's past, like a stream after a prompt switch
    (``distill.ode_regression.splice``).

    ``extra_trajectories`` are more trajectories of a causal teacher, ``(latent frames, number)`` each, for the parts of
    the curriculum with clips of that length. Only the first block of a clip or after a cut depends on noise and prompt
    alone, so it needs more examples. ``num_inference_steps`` is the number of Euler steps of a trajectory; 0 takes
    ``diffusion.num_inference_steps``.
    """

    label: ClassVar[str] = "train_init"

    teacher: Literal["bidirectional", "causal"] = "bidirectional"
    num_inference_steps: Annotated[int, Bounds(least=0, most=10_000)] = 0
    trajectories: Count = 1024
    extra_trajectories: tuple[tuple[Count, Count], ...] = ()
    include_clean: bool = True
    prompt_switch_prob: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_switches(self, self.prompt_switch_prob)
        require(
            not self.extra_trajectories or self.teacher == "causal",
            f"train_init.extra_trajectories is {self.extra_trajectories}, but the trajectories of a bidirectional "
            "teacher have one length; set train_init.teacher to 'causal' or leave it empty",
        )
        lengths, used = {0, *(frames for frames, _ in self.extra_trajectories)}, {0, self.frames}
        used |= {frames for _, frames, _ in self.curriculum}
        require(
            lengths <= used,
            f"train_init.extra_trajectories has a length of {max(lengths - used, default=0)} latent frames, which no "
            "part of the stage reads; use it in train_init.curriculum or frames, or leave it out",
        )
        for frames in used:
            require(
                frames in lengths,
                f"train_init.frames or curriculum has a stretch of {frames} latent frames; there are trajectories of "
                f"{', '.join(map(str, sorted(lengths)))} (0: whole clips)",
            )
