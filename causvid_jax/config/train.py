"""The method and the training stages: diffusion grid, data, optimizers and the settings of every stage."""

import dataclasses
import itertools
from typing import Annotated, ClassVar, Literal

from causvid_jax.config.errors import require
from causvid_jax.config.fields import Bounds, Config, Count, CountOrZero, NotNegative, Positive, Probability
from causvid_jax.config.model import LoraConfig

Stretch = tuple[Count, CountOrZero, Count]
EmaDecay = Annotated[float, Bounds(least=0, below=1)]


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Config):
    """Flow matching: ``x_t = (1 - sigma) x0 + sigma noise``, ``timestep = 1000 sigma``.

    Every network of a recipe (teacher, fake score, student) uses this one grid,
    ``sigma(u) = shift u / (1 + (shift - 1) u)``. ``student_shift`` gives the student's timesteps a shift of their own
    (0: ``shift``); Self-Forcing has 5 there and 8 in its scores. ``guidance_scale`` is the weight g of
    ``v = v_uncond + g (v_cond - v_uncond)``; g = 1 is no guidance.
    ``denoising_timesteps`` are nominal timesteps ``1000 u`` before the shift, descending from 1000 (pure noise),
    without the final 0. With ``warp`` off they are the timesteps themselves (the 1000, 757, 522 of CausVid's three-step
    checkpoints). A first timestep below 1000 (999.375 of rCM) starts from noise times its noise level.
    ``first_block_timesteps`` has one list for each of the first blocks after the start or a cut, such as
    ``((1000, 750, 500, 250), (1000, 500))``; Causal Forcing++ and Causal-rCM have four steps for the first block.
    """

    label: ClassVar[str] = "diffusion"

    shift: Positive = 8.0
    student_shift: NotNegative = 0.0
    num_inference_steps: Annotated[int, Bounds(least=1, most=10_000)] = 50
    solver: Literal["euler", "unipc"] = "euler"
    guidance_scale: NotNegative = 6.0
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
        require(
            self.warp or not self.student_shift,
            f"diffusion.student_shift is {self.student_shift:g} with warp off, where denoising_timesteps are not "
            "shifted; use 0, or warp=True",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """The training data: ``name`` is ``"moving_digits"`` (generated) or ``"videos"`` (a folder of your own).

    ``mixture`` lists the latents that training reads, ``(dataset, weight)`` each: a folder below ``WORKDIR/data`` or an
    absolute path, and its share. Empty means ``latents`` alone. ``prompt_file`` is a list of prompts
    (``data.captions``) for everything that needs no video: ODE trajectories, self rollouts, samples. ``test_clips``
    counts the clips that are held out; of own videos a fiftieth is held out, at least one. The other fields describe
    digits: ``digit_size`` is in pixels, ``speed`` in pixels per frame. No training clip has the share
    ``held_out_fraction`` of the combinations of digit, colour and direction, which reports use, nor the further share
    ``validation_fraction``, on which settings are chosen.
    """

    label: ClassVar[str] = "data"

    name: Literal["moving_digits", "videos"] = "moving_digits"
    train_clips: CountOrZero = 4096
    test_clips: CountOrZero = 512
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

    ``kind`` is ``"adamw"`` or ``"muon"``: the kernels of layers and of convolutions then take orthogonalised steps
    (``training.optimizers.make_optimizer``) and everything else AdamW's, with one ``learning_rate`` for both.
    At each step of ``restarts`` warm-up and cosine begin anew, with moments and EMA as they are.
    The EMA of the parameters is sampled and exported: ``ema = d ema + (1 - d) params`` with ``d = ema_decay`` from step
    ``ema_start`` on. Before it the EMA is a copy of the parameters, so that it forgets the initialisation.
    """

    label: ClassVar[str] = "optimizer"

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Bounds(least=0, most=10)] = 1e-4
    warmup_steps: CountOrZero = 100
    schedule: Literal["constant", "cosine"] = "constant"
    restarts: tuple[Count, ...] = ()
    b1: EmaDecay = 0.9
    b2: EmaDecay = 0.999
    weight_decay: NotNegative = 0.01
    clip_norm: Positive = 10.0
    ema_decay: EmaDecay = 0.0
    ema_start: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.restarts or self.schedule == "cosine",
            f"optimizer.restarts is {self.restarts} with schedule {self.schedule!r}; only 'cosine' has restarts",
        )
        require(
            all(b - a > self.warmup_steps for a, b in itertools.pairwise((0, *self.restarts))),
            f"optimizer.restarts is {self.restarts}; each must be more than warmup_steps ({self.warmup_steps}) "
            "after the one before",
        )


@dataclasses.dataclass(frozen=True)
class StageConfig(Config):
    """Settings of every training stage. ``frames`` is a clip's length in the stage's own units (0: the full clip).

    ``curriculum`` lists stretches of steps before the main part, each ``(until_step, frames, batch_size)``. Short clips
    teach much of the task at a fraction of the cost. A stage with fewer ``steps`` than its curriculum ends within it
    (:attr:`stretches`). ``accumulate`` splits every batch into that many parts and processes them one after another,
    with the memory of one part.

    Every ``sample_every`` steps ``samples`` clips are sampled and shown (0: none).

    A checkpoint is saved every ``save_every`` steps; the last ``keep`` stay, and those of every ``keep_every`` steps
    (0: none). An update is rejected if its loss or gradient is not finite, or if its loss is above ``bad_loss_factor``
    (0: no limit) times the median of the last ``bad_loss_window``. ``on_bad_loss`` is ``"stop"`` (the run ends with a
    checkpoint of the step before) or ``"skip"`` (it continues with the next batch). The log names the batch's examples.

    With ``lora.rank`` a stage of a transformer trains adapters on its frozen start. Optimizer and EMA hold these alone;
    the stage writes ``lora/`` (peft's layout) and, as without LoRA, weights; the adapters are merged into them.
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
    """VAE training on clips of ``frames`` pixel frames.

    If ``train_encoder`` is false, only the decoder is trained: latents, and all networks trained on them, stay valid.

    The decoder decodes ``concat_clips`` clips of the batch as one video. It looks about 24 latent frames back; if it is
    trained on single clips, its behaviour on longer histories is untested.

    If ``crop_frames > 0``, decode a random run of ``crop_frames`` latent frames with an empty decoder cache. Every
    latent must then describe its frames completely. Without this the VAE may store constant content (such as colour)
    only in early latents, and it is lost when the cache is reset.
    """

    label: ClassVar[str] = "train_vae"

    kl_weight: NotNegative = 1e-5
    train_encoder: bool = True
    concat_clips: Count = 1
    crop_frames: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest = min(size for _, _, size in self.stretches)
        require(
            self.concat_clips <= smallest,
            f"train_vae.concat_clips is {self.concat_clips}; accepted: 1 to the smallest batch, {smallest}",
        )
        require(
            not (self.crop_frames and self.concat_clips > 1),
            f"train_vae.crop_frames is {self.crop_frames} and train_vae.concat_clips is {self.concat_clips}; accepted: "
            "one of them (crop_frames 0 for whole clips, concat_clips 1 for single clips)",
        )


@dataclasses.dataclass(frozen=True)
class TAEHVStageConfig(StageConfig):
    """Training of the tiny codec on the trained VAE's latents, on clips of ``frames`` frames.

    ``noise`` is the standard deviation of the noise added to the decoder's input (latents have unit variance), so that
    it tolerates errors of the student.

    ``rollouts`` names datasets of the student's streams, ``(clips, number)`` each: ``number`` streams of ``clips``
    clips (``prepare --stage=streams``). With them, the stage learns to decode their latents as the VAE does, instead of
    latents of real clips. Student latents deviate from encoded latents, and more so late in a stream. A small decoder
    trained on encoded latents only may fail there although the VAE still decodes well. Use it for a second run that
    starts from the weights of the first (``--init_from``).
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
    """Flow matching on latents; captions are dropped with probability ``caption_dropout``.

    With ``chunks`` every block is trained as a separate clip with its own timestep. ``train_distill.teacher="chunk"``
    needs such a score of single chunks (RMD, arXiv 2609.37925).
    """

    label: ClassVar[str] = "train_teacher"

    caption_dropout: Probability = 0.1
    chunks: bool = False


def _check_switches(config: StageConfig, prompt_switch_prob: float) -> None:
    """Refuse prompt switches in parts of one clip: the context is that of the next clip of the same part."""
    for size in {size for _, _, size in config.stretches}:
        require(
            prompt_switch_prob == 0 or size // config.accumulate >= 2,
            f"{config.label}.prompt_switch_prob is {prompt_switch_prob}, which takes the context of another clip; "
            f"a batch of {size} in {config.accumulate} parts (accumulate) has one clip per part, and needs two",
        )


@dataclasses.dataclass(frozen=True)
class CausalStageConfig(TeacherStageConfig):
    """Flow matching of a causal teacher by teacher forcing: every block has its own noise level and a clean past.

    It starts from the bidirectional teacher and makes the trajectories of ``train_init.teacher = "causal"``. With
    probability ``prompt_switch_prob`` a clip continues another clip's past (``distill.ode_regression.splice``).
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
    """ODE regression on a teacher's trajectories; ``include_clean`` adds t = 0 blocks as context only.

    ``teacher`` is ``"bidirectional"`` (the paper: trajectories of whole clips) or ``"causal"`` (Causal Forcing:
    trajectories of every block given the clean past, from the stage ``causal``). A student of the teacher's size starts
    from its weights. A bidirectional teacher denoises all blocks of a clip jointly, so each block depends on the noise
    of later blocks. A causal student cannot see that noise and learns only the conditional mean.

    With probability ``prompt_switch_prob`` a clip continues another clip's past, like a stream after a prompt switch
    (``distill.ode_regression.splice``).

    ``extra_trajectories`` asks for more trajectories of a causal teacher, ``(latent frames, how many)``, for the
    curriculum's stretches of that many frames. Only the first block of a clip or after a cut depends on noise and
    prompt alone, so it needs more examples. ``num_inference_steps`` are a trajectory's Euler steps, 0 the teacher's.
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
        lengths = {0, *(frames for frames, _ in self.extra_trajectories)}
        for _, frames, _ in self.curriculum:
            require(
                frames in lengths,
                f"train_init.curriculum has a stretch of {frames} latent frames; there are trajectories of "
                f"{', '.join(map(str, sorted(lengths)))} (0: whole clips)",
            )


@dataclasses.dataclass(frozen=True)
class ConsistencyStageConfig(StageConfig):
    """Causal consistency distillation on real latents with a clean past: an initialisation instead of ``init``.

    ``kind`` is ``"discrete"`` (Causal Forcing++: the causal teacher takes one Euler step on a grid of ``grid_steps``,
    and the student's x0 before the step must equal its EMA's x0 after the step) or ``"continuous"`` (rCM, Causal-rCM:
    the tangent of the student along the teacher's ODE, by ``jax.jvp``). ``guidance_scale`` is the teacher's.
    ``tangent_warmup`` updates let the second part of the continuous tangent grow from 0 to 1. ``loss_scale`` multiplies
    the continuous loss, which has unit length. The student starts from the causal teacher if it has its size.
    """

    label: ClassVar[str] = "train_consistency"

    kind: Literal["discrete", "continuous"] = "discrete"
    grid_steps: Annotated[int, Bounds(least=2, most=10_000)] = 48
    guidance_scale: NotNegative = 3.0
    tangent_warmup: Count = 1000
    loss_scale: Positive = 100.0


@dataclasses.dataclass(frozen=True)
class DistillStageConfig(StageConfig):
    """Distillation. ``steps`` counts generator updates, each with ``critic_steps`` fake-score updates before it.

    ``objective`` is the student's loss: ``"dmd"`` (the paper; ``distill.dmd``), ``"sid"`` (score identity distillation
    with ``sid_alpha``; ``distill.sid``) or ``"dmd_gan"`` (DMD plus ``gan_weight`` times a logistic loss on features of
    the fake score at the layers ``gan_layers``, empty for three of the upper half; ``distill.gan``). The last one needs
    real latents, and adds ``gan_critic_weight`` times the discriminator's loss to the fake score's, and its squared
    slope at real and generated clips (``gan_r1_weight``, ``gan_r2_weight``), by differences of ``gan_r_sigma``.

    ``rollout`` is ``"data"`` (the paper: real latents noised per block) or ``"self"`` (the student's own rollout).
    With ``include_clean`` a block of a data rollout may be clean (t = 0). ``mask_clean`` leaves such blocks, which the
    student does not change, out of both losses; False counts them, as the published code does.
    ``guidance_scale`` is the g of ``r = r_uncond + g (r_cond - r_uncond)``; the published code writes
    ``r = r_cond + h (r_cond - r_uncond)`` with ``h = g - 1``.
    ``fake_guidance_scale`` is the same for the fake score in the student's loss; 1 is no guidance.
    ``teacher`` is the forward mode of the real score: ``"bidirectional"``, ``"causal"`` (each block given the student's
    clean past and no future; CMD) or ``"chunk"`` (each block alone; RMD). ``critic_mode`` is that of the fake score.
    ``init`` is ``"ode"``, ``"consistency"`` or ``"teacher"`` (Tab. 4 of the paper).
    ``score_timesteps`` are ``"all"``, or for the exit step i ``"above_exit"`` (at least the timestep of step i + 1) or
    ``"at_exit"`` (between those of the steps i + 1 and i), as Self-Forcing's ``ts_schedule`` and ``ts_schedule_max``.
    With ``loss_frames`` the losses use a window of that many latent frames of a longer rollout: from a ``"random"``
    block on (``loss_window``; Self-Forcing++) or the ``"last"`` ones (LongLive).
    ``critic_init`` is the network that the fake score starts from and shares its sizes with, ``"teacher"`` or
    ``"student"``: Self-Forcing distils a 14B teacher with a fake score of 1.3B.
    ``gradient`` is ``"stop"`` (the keys and values of earlier blocks are constants) or ``"replay"`` (the gradient
    passes through them too, in one block-causal pass after the rollout; ``distill.replay``).
    ``exit_steps`` says where the blocks of a self rollout stop: all at one random step (``"shared"``), each at its own
    (``"per_block"``), all at the ``"last"``, or the ``"first_block"`` at a random one and the others at the last.
    With probability ``continuation_prob`` a self rollout continues the previous one of the same update, so that the
    student is trained far into a stream. With probability ``prompt_switch_prob`` a clip that continues switches its
    prompt there. Both need a window. The losses leave out the first latent frame of a continued rollout. The scores
    still attend to it, although they were trained on clips whose first latent frame is one pixel frame. On the digits
    weights it changes the teacher's velocity of the other frames by 11, 6 and 4 % at t = 250, 500 and 750 (29, 15 and
    9 % on the second frame, 3 to 1 % on the last), and its mean square error by -7, -1 and +1 %:
    ``python benchmarks/first_frame.py 16``.
    """

    label: ClassVar[str] = "train_distill"

    rollout: Literal["data", "self"] = "self"
    gradient: Literal["stop", "replay"] = "stop"
    exit_steps: Literal["shared", "per_block", "last", "first_block"] = "shared"
    objective: Literal["dmd", "sid", "dmd_gan"] = "dmd"
    sid_alpha: NotNegative = 1.0
    gan_weight: NotNegative = 0.03
    gan_critic_weight: NotNegative = 0.03
    gan_layers: tuple[CountOrZero, ...] = ()
    gan_r1_weight: NotNegative = 0.0
    gan_r2_weight: NotNegative = 0.0
    gan_r_sigma: Positive = 0.01
    critic_steps: Count = 5
    guidance_scale: NotNegative = 4.5
    fake_guidance_scale: NotNegative = 1.0
    teacher: Literal["bidirectional", "causal", "chunk"] = "bidirectional"
    critic_mode: Literal["bidirectional", "causal", "chunk"] = "bidirectional"
    init: Literal["ode", "consistency", "teacher"] = "ode"
    critic_init: Literal["teacher", "student"] = "teacher"
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    score_timestep_min: float = 20.0
    score_timestep_max: float = 980.0
    score_timesteps: Literal["all", "above_exit", "at_exit"] = "all"
    loss_frames: CountOrZero = 0
    loss_window: Literal["random", "last"] = "random"
    include_clean: bool = True
    mask_clean: bool = True
    continuation_prob: Probability = 0.0
    prompt_switch_prob: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.score_timestep_min < self.score_timestep_max <= 1000,
            f"train_distill.score_timestep_min and score_timestep_max are {self.score_timestep_min} and "
            f"{self.score_timestep_max}; accepted: 0 < min < max <= 1000",
        )
        for name in ("gradient", "exit_steps", "score_timesteps", "loss_frames"):
            default = type(self).__dataclass_fields__[name].default
            require(
                self.rollout == "self" or getattr(self, name) == default,
                f"train_distill.{name} is {getattr(self, name)!r} with rollout 'data', which has no steps of its own; "
                f"use rollout 'self' or {name} {default!r}",
            )
        require(
            self.score_timesteps == "all" or self.exit_steps in ("shared", "last"),
            f"train_distill.score_timesteps is {self.score_timesteps!r} with exit_steps {self.exit_steps!r}; the "
            "scores have one timestep for all blocks, so use exit_steps 'shared' or 'last'",
        )
        require(
            (self.teacher == "chunk") == (self.critic_mode == "chunk"),
            f"train_distill.teacher is {self.teacher!r} and critic_mode is {self.critic_mode!r}; 'chunk' needs both",
        )
        self._check_window()
        self._check_gan()

    def _check_window(self) -> None:
        lengths = [frames for _, frames, _ in self.stretches if frames]
        require(
            not self.loss_frames or all(self.loss_frames <= frames for frames in lengths),
            f"train_distill.loss_frames is {self.loss_frames}; the shortest rollout has "
            f"{min(lengths, default=0)} latent frames",
        )
        require(
            not (self.loss_frames and self.loss_window == "random" and self.continuation_prob),
            "train_distill.loss_window is 'random' with continuation_prob above 0, but rollouts continue the end of "
            "the loss window; use loss_window 'last' or continuation_prob 0",
        )

    def _check_gan(self) -> None:
        if self.objective != "dmd_gan":
            return
        for name in ("continuation_prob", "loss_frames"):
            require(
                not getattr(self, name),
                f"train_distill.{name} is {getattr(self, name)} with objective 'dmd_gan', whose real clips "
                f"begin with a first frame; use {name} 0 or objective 'dmd'",
            )
        require(
            not self.lora.rank or self.critic_init == "teacher",
            f"train_distill.lora.rank is {self.lora.rank} with objective 'dmd_gan' and critic_init 'student', whose "
            "discriminator would stay frozen; use critic_init 'teacher' or rank 0",
        )
        require(
            self.critic_mode == "bidirectional",
            f"train_distill.critic_mode is {self.critic_mode!r} with objective 'dmd_gan'; accepted: 'bidirectional'",
        )
