"""The method and the training stages: diffusion grid, data, optimizers, and what every stage does."""

import dataclasses

from causvid_jax.config.errors import check_fraction, require


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Flow matching: ``x_t = (1 - sigma) x0 + sigma noise``, ``timestep = 1000 sigma``.

    Every network of a recipe (teacher, fake score, student) uses this one grid,
    ``sigma(u) = shift u / (1 + (shift - 1) u)``. ``guidance`` is the weight g of
    ``v = v_uncond + g (v_cond - v_uncond)``; g = 1 is no guidance.
    ``student_steps`` are nominal timesteps ``1000 u`` before the shift, descending, without the final 0.
    """

    shift: float = 8.0
    teacher_steps: int = 50
    solver: str = "euler"
    guidance: float = 6.0
    student_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)

    def __post_init__(self):
        require(self.shift > 0, f"diffusion.shift is {self.shift}; it must be positive")
        require(self.solver in ("euler", "unipc"), f"diffusion.solver is {self.solver!r}; accepted: 'euler', 'unipc'")
        steps = self.student_steps
        require(
            len(steps) >= 1 and all(0 < s <= 1000 for s in steps) and list(steps) == sorted(set(steps), reverse=True),
            f"diffusion.student_steps is {steps}; it must be distinct values in (0, 1000], descending",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The ``moving_digits`` dataset. ``digit_size`` and ``speed`` are in pixels and pixels per frame."""

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


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine (or constant) schedule, global-norm clipping and an EMA."""

    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "constant"
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    ema_decay: float = 0.0

    def __post_init__(self):
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

    def __post_init__(self):
        require(self.accumulate >= 1, f"accumulate is {self.accumulate}; it must be at least 1")
        ends = [end for end, _, _ in self.curriculum]
        require(
            ends == sorted(set(ends)) and all(0 < end < self.steps for end in ends),
            f"curriculum ends at steps {ends}; they must ascend within the {self.steps} steps of the stage",
        )


@dataclasses.dataclass(frozen=True)
class VAEStageConfig(StageConfig):
    """VAE training (``training.stages.vae_loss``) on clips of ``frames`` pixel frames.

    With ``train_encoder`` off the encoder stays as it is: latents, and all that was trained on them, remain valid while
    the decoder goes on learning.
    """

    kl_weight: float = 1e-5
    train_encoder: bool = True


@dataclasses.dataclass(frozen=True)
class TeacherStageConfig(StageConfig):
    """Flow matching on latents; captions are dropped with probability ``caption_dropout``."""

    caption_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class CausalStageConfig(TeacherStageConfig):
    """Flow matching of a causal teacher by teacher forcing: every block noised on its own, its past given clean.

    It starts from the bidirectional teacher and makes the trajectories of ``train_init.teacher = "causal"``.
    ``switch_fraction`` of the clips go on from another clip's past (``distill.ode_regression.splice``).
    """

    switch_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_fraction("train_causal.switch_fraction", self.switch_fraction)


@dataclasses.dataclass(frozen=True)
class InitStageConfig(StageConfig):
    """ODE regression on a teacher's trajectories; ``include_clean`` adds t = 0 blocks as context only.

    ``teacher`` is ``"bidirectional"`` (the paper: trajectories of whole clips) or ``"causal"`` (trajectories of every
    block given the clean past, from the stage ``causal``). Where a clip's blocks leave their noise together, what
    becomes of a block depends on the noise of later ones, which a causal student does not see, and it can learn no
    more than the mean; a causal teacher's blocks depend on nothing else (Causal Forcing).

    ``switch_fraction`` of the clips go on from another clip's past, as a stream does whose prompt has just changed
    (``distill.ode_regression.splice``).
    """

    teacher: str = "bidirectional"
    trajectories: int = 1024
    include_clean: bool = True
    switch_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(
            self.teacher in ("bidirectional", "causal"),
            f"train_init.teacher is {self.teacher!r}; accepted: 'bidirectional', 'causal'",
        )
        check_fraction("train_init.switch_fraction", self.switch_fraction)


@dataclasses.dataclass(frozen=True)
class DistillStageConfig(StageConfig):
    """DMD. ``steps`` counts generator updates, each with ``critic_updates`` fake-score updates before it.

    ``rollout`` is ``"data"`` (the paper: real latents noised per block) or ``"self"`` (the student's own rollout).
    ``guidance`` is the g of ``r = r_uncond + g (r_cond - r_uncond)``; the published code writes it as ``1 + g``.
    ``teacher`` is ``"bidirectional"`` or ``"causal"``, ``init`` is ``"ode"`` or ``"teacher"`` (Tab. 4 of the paper).
    ``fake`` is the network whose sizes the fake score has, ``"teacher"`` or ``"student"``, and whose weights it starts
    from: Self-Forcing distils a 14B teacher with a fake score of 1.3B.
    ``switch_fraction`` of the self rollouts go on from real latents of another prompt, as a stream does whose prompt
    has just changed; it needs a window. ``first_block_weight`` is how much more a frame of a self rollout's first block
    counts than one from the fourth block on (in between it falls linearly): it has no context to follow, and all that
    comes later follows it.
    """

    rollout: str = "self"
    critic_updates: int = 5
    guidance: float = 4.5
    teacher: str = "bidirectional"
    init: str = "ode"
    fake: str = "teacher"
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    score_timestep_min: float = 20.0
    score_timestep_max: float = 980.0
    include_clean: bool = True
    switch_fraction: float = 0.0
    first_block_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(
            self.first_block_weight > 0,
            f"train_distill.first_block_weight is {self.first_block_weight}; it must be positive",
        )
        check_fraction("train_distill.switch_fraction", self.switch_fraction)
        for name, accepted in (
            ("rollout", ("data", "self")),
            ("teacher", ("bidirectional", "causal")),
            ("init", ("ode", "teacher")),
            ("fake", ("teacher", "student")),
        ):
            value = getattr(self, name)
            require(value in accepted, f"distill.{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
        require(
            0 < self.score_timestep_min < self.score_timestep_max <= 1000,
            f"distill score timesteps are [{self.score_timestep_min}, {self.score_timestep_max}]; "
            "accepted: 0 < min < max <= 1000",
        )
