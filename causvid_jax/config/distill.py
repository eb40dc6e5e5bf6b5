"""Settings of the stages that distil a teacher: consistency distillation and DMD with its relatives."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from causvid_jax.config.errors import require
from causvid_jax.config.fields import Bounds, Count, CountOrZero, NotNegative, Positive, Probability
from causvid_jax.config.model import Timestep
from causvid_jax.config.train import OptimizerConfig, StageConfig, check_interval


@dataclasses.dataclass(frozen=True)
class ConsistencyStageConfig(StageConfig):
    """Causal consistency distillation on real latents with a clean past (``distill.consistency``).

    It initialises the student instead of the stage ``init``. ``kind`` is ``"discrete"`` (Causal Forcing++, arXiv
    2605.15141: the causal teacher takes one Euler step on a grid of ``grid_steps``, and the student's x0 before the
    step must equal its EMA's x0 after the step) or ``"continuous"`` (rCM, arXiv 2510.08431, and Causal-rCM, arXiv
    2606.25473: the tangent of the student along the teacher's ODE, by ``jax.jvp``). ``guidance_scale`` is the
    teacher's. During ``tangent_warmup`` updates the weight of the second part of the continuous tangent grows from 0 to
    1. ``loss_scale`` multiplies the continuous loss, whose tangent has unit length. The student starts from the causal
    teacher if it has its size.
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

    The student's loss is ``objective``: ``"dmd"`` (CausVid, section 4.2; ``distill.dmd``), ``"sid"`` (score identity
    distillation with ``sid_alpha``; ``distill.sid``) or ``"dmd_gan"`` (DMD plus ``gan_weight`` times a logistic loss on
    features of the fake score at the layers ``gan_layers``, empty for three of the upper half; ``distill.gan``).
    ``"dmd_gan"`` needs real latents. It adds to the fake score's loss ``gan_critic_weight`` times the discriminator's
    loss, and the discriminator's squared slope at real and generated clips (``gan_r1_weight``, ``gan_r2_weight``),
    computed by differences of ``gan_r_sigma``.

    Rollout. ``rollout`` is ``"data"`` (CausVid: real latents noised per block) or ``"self"`` (Self-Forcing: the
    student's own rollout). With ``include_clean`` a block of a data rollout may be clean (t = 0). The student does not
    change such blocks. ``mask_clean`` leaves them out of both losses; False counts them, as the published code does.
    ``init`` is the student's initialisation: ``"ode"``, ``"consistency"`` or ``"teacher"`` (CausVid, Tab. 4).
    ``gradient`` is ``"stop"`` (the keys and values of earlier blocks are constants) or ``"replay"`` (the gradient
    passes through them too, in one block-causal pass after the rollout; ``distill.replay``). ``exit_steps`` chooses the
    denoising step after which each block of a self rollout stops: ``"shared"`` (one random step for all blocks),
    ``"per_block"`` (a random step for each), ``"last"`` (the last step for all) or ``"first_block"`` (a random step for
    the first block, the last for all others).

    Scores. ``guidance_scale`` is the g of the real score ``r = r_uncond + g (r_cond - r_uncond)``. The published code
    writes ``r = r_cond + h (r_cond - r_uncond)`` with ``h = g - 1``. ``guidance_interval`` is the lowest and the
    highest timestep at which the real score is guided (arXiv 2404.07724), ``guidance_eta`` the weight of the parallel
    part of its guidance (arXiv 2410.02416; see ``diffusion.guidance_eta``). ``fake_guidance_scale`` is the g of the
    fake score in the student's loss; 1 is no guidance.
    ``teacher`` is the forward mode of the real score: ``"bidirectional"``, ``"causal"`` (each block given the student's
    clean past and no future; CMD, arXiv 2608.13391) or ``"chunk"`` (each block alone; RMD, arXiv 2609.37925).
    ``critic_mode`` is that of the fake score.
    ``critic_optimizer`` counts the updates of the fake score, ``critic_steps`` per step, in warm-up and restarts.
    ``critic_init`` is the network that the fake score starts from and shares its sizes with, ``"teacher"`` or
    ``"student"``: Self-Forcing distils a 14B teacher with a fake score of 1.3B.
    Scores see timesteps from ``score_timestep_min`` to ``score_timestep_max`` (of 1000). ``score_timesteps`` is
    ``"all"`` of them; or, for the exit step i, ``"above_exit"`` (at least the timestep of step i + 1) or ``"at_exit"``
    (between those of the steps i + 1 and i), as Self-Forcing's ``ts_schedule`` and ``ts_schedule_max``.
    With ``loss_frames`` the losses use a window of that many latent frames of a longer rollout: from a ``"random"``
    block on (``loss_window``; Self-Forcing++) or the ``"last"`` ones (LongLive, arXiv 2509.22622).

    Continuation. With probability ``continuation_prob`` a self rollout continues the previous one of the critic, also
    that of the step before. So the student is trained far into a stream: its context is the sink of the first one and
    the last frames in the window (``causal.window`` must be set). A rollout that itself continues others is continued
    with probability ``further_continuation_prob`` (0: ``continuation_prob``). With p and q for the two, a share
    ``1 / (1 + p / (1 - q))`` of the rollouts begins anew. With probability ``prompt_switch_prob`` a clip that continues
    switches its prompt there. The losses leave out the first latent frame of a continued rollout.
    The scores still attend to it, although they were trained on clips whose first latent frame is one pixel frame. With
    the digits weights this changes the teacher's velocity of the other frames by 11, 6 and 4 % at t = 250, 500 and 750
    (29, 15 and 9 % on the second frame, 3 to 1 % on the last). The mean square error changes by -7, -1 and +1 %.
    Command: ``python benchmarks/first_frame.py 16``.
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
    guidance_interval: tuple[Timestep, Timestep] = (0.0, 1000.0)
    guidance_eta: Probability = 1.0
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
    further_continuation_prob: Probability = 0.0
    prompt_switch_prob: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.score_timestep_min < self.score_timestep_max <= 1000,
            f"train_distill.score_timestep_min and score_timestep_max are {self.score_timestep_min} and "
            f"{self.score_timestep_max}; accepted: 0 < min < max <= 1000",
        )
        check_interval("train_distill.guidance_interval", self.guidance_interval)
        decay = self.critic_optimizer.ema_decay
        require(decay == 0, f"train_distill.critic_optimizer.ema_decay is {decay:g}; the fake score has no EMA: use 0")
        self._check_effects()
        require(
            self.score_timesteps == "all" or self.exit_steps in ("shared", "last"),
            f"train_distill.score_timesteps is {self.score_timesteps!r} with exit_steps {self.exit_steps!r}; the "
            "scores have one timestep for all blocks, so use exit_steps 'shared' or 'last'",
        )
        require(
            (self.teacher == "chunk") == (self.critic_mode == "chunk"),
            f"train_distill.teacher is {self.teacher!r} and critic_mode is {self.critic_mode!r}; 'chunk' needs both",
        )
        self._check_gan()

    def _check_effects(self) -> None:
        """Refuse fields that have no effect with the others."""
        of_rollouts = ("gradient", "exit_steps", "score_timesteps", "loss_frames", "continuation_prob")
        self._check_effect(of_rollouts, self.rollout == "self", "rollout 'data'", "rollout 'self'")
        continued, slopes = self.continuation_prob > 0, self.gan_r1_weight > 0 or self.gan_r2_weight > 0
        of_streams = ("further_continuation_prob", "prompt_switch_prob")
        self._check_effect(of_streams, continued, "continuation_prob 0", "a continuation_prob above 0")
        self._check_effect(("loss_window",), self.loss_frames > 0, "loss_frames 0", "loss_frames above 0")
        objective = f"objective {self.objective!r}"
        self._check_effect(("sid_alpha",), self.objective == "sid", objective, "objective 'sid'")
        of_gan = ("gan_weight", "gan_critic_weight", "gan_layers", "gan_r1_weight", "gan_r2_weight")
        self._check_effect(of_gan, self.objective == "dmd_gan", objective, "objective 'dmd_gan'")
        self._check_effect(("gan_r_sigma",), slopes, "gan_r1_weight and gan_r2_weight 0", "one of them above 0")

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
            self.accumulate == 1 or self.rollout == "self" or not (self.include_clean and self.mask_clean),
            f"train_distill.accumulate is {self.accumulate} with objective 'dmd_gan' and clean blocks left out of the "
            "losses (rollout 'data', include_clean, mask_clean), where the parts weigh differently for DMD and the "
            "discriminator; use accumulate 1, include_clean False or mask_clean False",
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
