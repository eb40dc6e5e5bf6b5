"""The method and the training stages: diffusion grid, data, optimizers, and what every stage does."""

import dataclasses

from causvid_jax.config.errors import check_fraction, require


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Flow matching: ``x_t = (1 - sigma) x0 + sigma noise``, ``timestep = 1000 sigma``.

    Every network of a recipe (teacher, fake score, student) uses this one grid,
    ``sigma(u) = shift u / (1 + (shift - 1) u)``. ``guidance_scale`` is the weight g of
    ``v = v_uncond + g (v_cond - v_uncond)``; g = 1 is no guidance.
    ``denoising_timesteps`` are nominal timesteps ``1000 u`` before the shift, descending, without the final 0; with
    ``warp`` off they are the timesteps themselves (the 1000, 757, 522 of CausVid's three-step checkpoints).
    """

    shift: float = 8.0
    num_inference_steps: int = 50
    solver: str = "euler"
    guidance_scale: float = 6.0
    denoising_timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    warp: bool = True

    def __post_init__(self):
        require(self.shift > 0, f"diffusion.shift is {self.shift}; it must be positive")
        require(self.solver in ("euler", "unipc"), f"diffusion.solver is {self.solver!r}; accepted: 'euler', 'unipc'")
        steps = self.denoising_timesteps
        require(
            len(steps) >= 1 and all(0 < s <= 1000 for s in steps) and list(steps) == sorted(set(steps), reverse=True),
            f"diffusion.denoising_timesteps is {steps}; it must be distinct values in (0, 1000], descending",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from: ``name`` is ``"moving_digits"`` (made by us) or ``"videos"`` (a folder of them).

    ``mixture`` are the latents that training reads, ``(dataset, weight)`` each: a folder below ``WORKDIR/data`` or an
    absolute path, and its share; empty: ``latents`` alone. ``prompt_file`` lists prompts (``data.captions``) for all
    that needs no video: ODE trajectories, self rollouts, samples. The rest is about digits: ``digit_size`` and
    ``speed`` are in pixels and pixels per frame.
    """

    name: str = "moving_digits"
    train_clips: int = 4096
    test_clips: int = 512
    digit_size: int = 16
    speed: int = 1
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
    digits_per_clip: int = 1
    held_out_fraction: float = 0.1
    seed: int = 0
    prompts: int = 0
    mixture: tuple[tuple[str, float], ...] = ()
    prompt_file: str = ""

    def __post_init__(self):
        accepted = ("moving_digits", "videos")
        require(
            self.name in accepted, f"data.name is {self.name!r}; accepted: {', '.join(repr(name) for name in accepted)}"
        )
        for name, weight in self.mixture:
            require(weight > 0, f"data.mixture gives {name!r} the weight {weight}; it must be positive")
        names = [name for name, _ in self.mixture]
        require(len(set(names)) == len(names), f"data.mixture names a dataset twice: {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """A linear warm-up and a cosine (or constant) schedule, global-norm clipping and an EMA.

    ``kind`` is ``"adamw"`` or, of transformers, ``"muon"``: the kernels of the layers then take orthogonalised steps
    (``training.optimizers.make_optimizer``), everything else AdamW's, at one ``learning_rate`` for both.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "constant"
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    ema_decay: float = 0.0

    def __post_init__(self):
        require(self.kind in ("adamw", "muon"), f"optimizer.kind is {self.kind!r}; accepted: 'adamw', 'muon'")
        require(
            self.schedule in ("constant", "cosine"),
            f"optimizer.schedule is {self.schedule!r}; accepted: 'constant', 'cosine'",
        )
        require(0 <= self.ema_decay < 1, f"optimizer.ema_decay is {self.ema_decay}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What every training stage shares. ``frames`` is a clip's length in the stage's own units (0: the full clip).

    ``curriculum`` puts stretches of other clips in front: each ``(until_step, frames, batch_size)``. What short clips
    can teach is learnt there at a fraction of the cost. ``accumulate`` takes every batch in that many parts, one after
    another, for the memory of one.

    A checkpoint is saved every ``save_every`` steps; the last ``keep`` stay, and those of every ``keep_every`` steps
    (0: none). An update whose loss or gradient is not finite, or whose loss is above ``bad_loss_factor`` (0: no limit)
    times the median of the last ``bad_loss_window``, is never taken: ``on_bad_loss`` is ``"stop"`` (the run ends with a
    checkpoint of the step before) or ``"skip"`` (it goes on with the next batch). The batch's examples are in the log.
    """

    steps: int = 1000
    batch_size: int = 8
    frames: int = 0
    curriculum: tuple[tuple[int, int, int], ...] = ()
    accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    log_every: int = 50
    sample_every: int = 1000
    samples: int = 16
    save_every: int = 500
    keep: int = 2
    keep_every: int = 0
    on_bad_loss: str = "stop"
    bad_loss_factor: float = 100.0
    bad_loss_window: int = 64

    def __post_init__(self):
        require(self.keep >= 1, f"keep is {self.keep}; at least 1 checkpoint must stay")
        require(
            self.keep_every >= 0 and self.keep_every % max(self.save_every, 1) == 0,
            f"keep_every is {self.keep_every}; it must be 0 or a multiple of save_every, which is {self.save_every}",
        )
        require(self.on_bad_loss in ("stop", "skip"), f"on_bad_loss is {self.on_bad_loss!r}; accepted: 'stop', 'skip'")
        require(
            self.bad_loss_factor == 0 or self.bad_loss_factor > 1,
            f"bad_loss_factor is {self.bad_loss_factor}; it must be above 1, or 0 for no limit",
        )
        require(self.bad_loss_window >= 1, f"bad_loss_window is {self.bad_loss_window}; it must be at least 1")
        require(self.accumulate >= 1, f"accumulate is {self.accumulate}; it must be at least 1")
        ends = [end for end, _, _ in self.curriculum]
        require(
            ends == sorted(set(ends)) and all(0 < end < self.steps for end in ends),
            f"curriculum ends at steps {ends}; they must ascend within the {self.steps} steps of the stage",
        )


def _check_codec_optimizer(stage: str, optimizer: OptimizerConfig) -> None:
    require(
        optimizer.kind == "adamw",
        f"{stage}.optimizer.kind is {optimizer.kind!r}, which is for the layers of transformers; accepted: 'adamw'",
    )


@dataclasses.dataclass(frozen=True)
class VAEStageConfig(StageConfig):
    """VAE training (``training.stages.vae_loss``) on clips of ``frames`` pixel frames.

    With ``train_encoder`` off the encoder stays as it is: latents, and all that was trained on them, remain valid while
    the decoder goes on learning.

    ``concat_clips`` clips of the batch follow one another in what the decoder decodes. Its convolutions see far back
    (about 24 latent frames), and what they do with a past longer than any they were trained on is anyone's guess.

    With ``crop_frames`` above 0 only that many latent frames are decoded, from a random one on and as if the video
    began there: so every latent has to hold all of its frames. Without it the decoder's memory is a place to keep what
    never changes in a clip, a colour for instance; the encoder leaves that out of later latents, and it is gone for
    good where the memory ends.
    """

    kl_weight: float = 1e-5
    train_encoder: bool = True
    concat_clips: int = 1
    crop_frames: int = 0

    def __post_init__(self):
        super().__post_init__()
        _check_codec_optimizer("train_vae", self.optimizer)
        smallest = min(self.batch_size, *(size for _, _, size in self.curriculum), self.batch_size)
        require(
            1 <= self.concat_clips <= smallest,
            f"train_vae.concat_clips is {self.concat_clips}; accepted: 1 to the smallest batch, {smallest}",
        )
        require(
            self.crop_frames >= 0 and not (self.crop_frames and self.concat_clips > 1),
            f"train_vae.crop_frames is {self.crop_frames} and train_vae.concat_clips {self.concat_clips}; "
            f"accepted: 0, for whole clips, or with "
            "concat_clips 1 at least 1",
        )


@dataclasses.dataclass(frozen=True)
class TAEHVStageConfig(StageConfig):
    """The tiny codec learns the trained VAE's latents (``training.stages.taehv_loss``), on clips of ``frames`` frames.

    ``noise`` is the standard deviation of what is added to the latents that its decoder reads, which a student will not
    hit exactly either; latents are of unit order.

    ``rollouts`` names streams of the student, ``(clips, number)`` each: so many, each so many clips long
    (``launch.prepare --stage=streams``). Given them, the stage learns their latents, as the VAE shows them, instead of
    real clips and what the VAE makes of them. A student's latents are a little beside those of real clips, and ever
    further beside in a long stream; where the VAE still shows a clear picture, a small decoder that has only seen real
    ones may not. It is meant for a second run, from the weights of the first (``--init_from``).
    """

    noise: float = 0.05
    rollouts: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _check_codec_optimizer("train_taehv", self.optimizer)
        require(self.noise >= 0, f"train_taehv.noise is {self.noise}; it must not be negative")
        for clips, number in self.rollouts:
            require(
                clips >= 1 and number >= 1,
                f"train_taehv.rollouts has {(clips, number)}; accepted: (clips, number), both at least 1",
            )
        lengths = [clips for clips, _ in self.rollouts]
        require(len(set(lengths)) == len(lengths), f"train_taehv.rollouts names a length twice: {lengths}")


@dataclasses.dataclass(frozen=True)
class TeacherStageConfig(StageConfig):
    """Flow matching on latents; captions are dropped with probability ``caption_dropout``."""

    caption_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class CausalStageConfig(TeacherStageConfig):
    """Flow matching of a causal teacher by teacher forcing: every block noised on its own, its past given clean.

    It starts from the bidirectional teacher and makes the trajectories of ``train_init.teacher = "causal"``.
    ``prompt_switch_prob`` of the clips go on from another clip's past (``distill.ode_regression.splice``).
    """

    prompt_switch_prob: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_fraction("train_causal.prompt_switch_prob", self.prompt_switch_prob)


@dataclasses.dataclass(frozen=True)
class InitStageConfig(StageConfig):
    """ODE regression on a teacher's trajectories; ``include_clean`` adds t = 0 blocks as context only.

    ``teacher`` is ``"bidirectional"`` (the paper: trajectories of whole clips) or ``"causal"`` (trajectories of every
    block given the clean past, from the stage ``causal``). Where a clip's blocks leave their noise together, what
    becomes of a block depends on the noise of later ones, which a causal student does not see, and it can learn no
    more than the mean; a causal teacher's blocks depend on nothing else (Causal Forcing).

    ``prompt_switch_prob`` of the clips go on from another clip's past, as a stream does whose prompt has just changed
    (``distill.ode_regression.splice``).

    ``extra_trajectories`` asks for more trajectories of a causal teacher, ``(latent frames, how many)``: those that
    the curriculum's phases of that many frames read. Only a clip's first block and one after a cut are made of noise
    and prompt alone, which takes far more examples to learn than to go on; short clips give these at a fraction of the
    cost.
    """

    teacher: str = "bidirectional"
    trajectories: int = 1024
    extra_trajectories: tuple[tuple[int, int], ...] = ()
    include_clean: bool = True
    prompt_switch_prob: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(
            self.teacher in ("bidirectional", "causal"),
            f"train_init.teacher is {self.teacher!r}; accepted: 'bidirectional', 'causal'",
        )
        check_fraction("train_init.prompt_switch_prob", self.prompt_switch_prob)
        require(
            not self.extra_trajectories or self.teacher == "causal",
            f"train_init.extra_trajectories is {self.extra_trajectories}, but the trajectories of a bidirectional "
            f"teacher have one length; "
            "set train_init.teacher to 'causal' or leave it empty",
        )
        lengths = {0, *(frames for frames, _ in self.extra_trajectories)}
        for _, frames, _ in self.curriculum:
            require(
                frames in lengths,
                f"train_init.curriculum has a phase of {frames} latent frames; trajectories there are of "
                f"{', '.join(map(str, sorted(lengths)))} (0: whole clips)",
            )


@dataclasses.dataclass(frozen=True)
class DistillStageConfig(StageConfig):
    """DMD. ``steps`` counts generator updates, each with ``critic_steps`` fake-score updates before it.

    ``rollout`` is ``"data"`` (the paper: real latents noised per block) or ``"self"`` (the student's own rollout).
    ``guidance_scale`` is the g of ``r = r_uncond + g (r_cond - r_uncond)``; the published code writes it as ``1 + g``.
    ``teacher`` is ``"bidirectional"`` or ``"causal"``, ``init`` is ``"ode"`` or ``"teacher"`` (Tab. 4 of the paper).
    ``critic_init`` is the network whose sizes the fake score has, ``"teacher"`` or ``"student"``, and whose weights it
    starts from: Self-Forcing distils a 14B teacher with a fake score of 1.3B.
    ``continuation_prob`` of the self rollouts go on where the rollout before them in the same cycle ended, so that the
    student is judged on what it does far into a stream; ``prompt_switch_prob`` of the clips in those get a new prompt
    there. Both need a window.
    """

    rollout: str = "self"
    critic_steps: int = 5
    guidance_scale: float = 4.5
    teacher: str = "bidirectional"
    init: str = "ode"
    critic_init: str = "teacher"
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    score_timestep_min: float = 20.0
    score_timestep_max: float = 980.0
    include_clean: bool = True
    continuation_prob: float = 0.0
    prompt_switch_prob: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_fraction("train_distill.continuation_prob", self.continuation_prob)
        check_fraction("train_distill.prompt_switch_prob", self.prompt_switch_prob)
        for name, accepted in (
            ("rollout", ("data", "self")),
            ("teacher", ("bidirectional", "causal")),
            ("init", ("ode", "teacher")),
            ("critic_init", ("teacher", "student")),
        ):
            value = getattr(self, name)
            require(value in accepted, f"distill.{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
        require(
            0 < self.score_timestep_min < self.score_timestep_max <= 1000,
            f"distill score timesteps are [{self.score_timestep_min}, {self.score_timestep_max}]; "
            "accepted: 0 < min < max <= 1000",
        )
