"""The recipe: everything about one model and its device mesh. Conversion from ``ConfigDict`` and JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import ml_collections

from causvid_jax.config import machine
from causvid_jax.config.causal import CausalConfig
from causvid_jax.config.distill import ConsistencyStageConfig, DistillStageConfig
from causvid_jax.config.errors import ConfigError, require
from causvid_jax.config.fields import Config, Count, CountOrZero, build, check_path
from causvid_jax.config.model import (
    ExpertsConfig,
    TAEHVConfig,
    TextConfig,
    TransformerConfig,
    UMT5Config,
    VAEConfig,
    VideoConfig,
)
from causvid_jax.config.train import (
    CausalStageConfig,
    DataConfig,
    DiffusionConfig,
    InitStageConfig,
    TAEHVStageConfig,
    TeacherStageConfig,
    VAEStageConfig,
)


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Config):
    """The device mesh: ``data`` x ``fsdp`` x ``context`` x ``tensor`` devices, repeated ``slices`` times along data.

    ``data`` splits the batch and replicates parameters, ``fsdp`` splits batch and parameters, ``context`` splits the
    tokens of a frame, ``tensor`` splits heads and MLP. ``data = 0`` takes all devices that the other axes leave.
    Attention exchanges tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509), so tensor x context must divide the
    heads. With ``ring`` (ring attention, arXiv 2310.01889; training only) only tensor must divide them.
    ``offload_optimizer`` keeps the moments of transformers in host memory (``pinned_host``) between updates. On CPU it
    changes nothing.
    """

    label: ClassVar[str] = "parallel"

    slices: Count = 1
    data: CountOrZero = 1
    fsdp: Count = 1
    context: Count = 1
    tensor: Count = 1
    ring: bool = False
    offload_optimizer: bool = False


def nearest_divisors(number: int, target: int) -> str:
    """Return the divisors of ``number`` nearest to ``target`` (below and above), as text."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    nearest = {
        max((d for d in divisors if d <= target), default=1),
        min((d for d in divisors if d >= target), default=number),
    }
    return " and ".join(map(str, sorted(nearest)))


@dataclasses.dataclass(frozen=True)
class Recipe(Config):
    """Everything about one model: data, networks, method and every training stage.

    ``umt5`` is the encoder of ``text.kind="umt5"``. ``decoder`` decodes latents to pixels when sampling: ``"vae"``, or
    ``"taehv"``, the tiny codec. The teacher's clips of a report are always decoded by the VAE. With ``rolling_blocks``
    a stream denoises that many blocks jointly, at rising noise levels (``sampling.rolling``); 0: one after the other.

    Raises:
        ConfigError: groups that do not fit each other, such as heads that the mesh does not divide.
    """

    name: str
    video: VideoConfig = VideoConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    teacher: TransformerConfig = TransformerConfig()
    student: TransformerConfig = TransformerConfig()
    causal: CausalConfig = CausalConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train_vae: VAEStageConfig = VAEStageConfig()
    train_taehv: TAEHVStageConfig = TAEHVStageConfig()
    train_teacher: TeacherStageConfig = TeacherStageConfig()
    train_causal: CausalStageConfig = CausalStageConfig()
    train_init: InitStageConfig = InitStageConfig()
    train_consistency: ConsistencyStageConfig = ConsistencyStageConfig()
    train_distill: DistillStageConfig = DistillStageConfig()
    parallel: ParallelConfig = ParallelConfig()
    umt5: UMT5Config = UMT5Config()
    decoder: Literal["vae", "taehv"] = "vae"
    taehv: TAEHVConfig = TAEHVConfig()
    experts: ExpertsConfig = ExpertsConfig()
    rolling_blocks: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_networks()
        self._check_experts()
        self._check_pictures()
        self._check_decoder()
        self._check_heads_and_tokens()
        self._check_rolling()

    def _check_networks(self) -> None:
        for role in ("teacher", "student"):
            net = getattr(self, role)
            require(
                net.out_channels == self.vae.z_dim,
                f"{role}.out_channels is {net.out_channels}; the VAE has {self.vae.z_dim} latent channels",
            )
            require(
                (net.text_dim, net.text_length) == (self.text.dim, self.text.length),
                f"{role} reads text of shape ({net.text_length}, {net.text_dim}); the text encoder gives "
                f"({self.text.length}, {self.text.dim})",
            )
        self._check_clip()
        for length, _ in self.train_init.extra_trajectories:
            self.causal.block_sizes(length)
        for _, frames, _ in self.train_distill.stretches:
            self._check_rollout(frames or self.video.latent_frames)
        require(
            not self.train_distill.continuation_prob
            or (self.causal.past_frames() > 0 and not self.causal.independent_first_frame),
            f"train_distill.continuation_prob is {self.train_distill.continuation_prob}; rollouts that continue "
            "need a causal.window of more than one block and no independent first frame",
        )
        self._check_scores()
        require(
            self.text.kind != "umt5" or self.umt5.dim == self.text.dim,
            f"umt5.dim is {self.umt5.dim}; text.dim is {self.text.dim}, and they must be equal",
        )

    def _check_clip(self) -> None:
        clip = self.video
        try:
            self.causal.block_sizes(clip.latent_frames)
        except ConfigError as error:
            near = " and ".join(str(clip.frames_of(n)) for n in self.causal.nearest_lengths(clip.latent_frames))
            raise ConfigError(f"video.frames is {clip.frames}: {error} ({near} frames)") from error

    def _check_experts(self) -> None:
        """Refuse settings that need one teacher network, if the teacher has two experts."""
        config = self.train_distill
        for path, value, accepted in (
            ("train_distill.teacher", config.teacher, "bidirectional"),
            ("train_distill.critic_init", config.critic_init, "student"),
            ("train_init.teacher", self.train_init.teacher, "bidirectional"),
        ):
            require(
                not self.experts.boundary or value == accepted,
                f"{path} is {value!r} with a teacher of two experts (experts.boundary {self.experts.boundary:g}); "
                f"accepted: {accepted!r}",
            )

    def _check_pictures(self) -> None:
        """Refuse settings that do not fit a network with an image branch."""
        both = 4 + self.vae.z_dim
        clip = {(net.image_tokens, net.image_dim) for net in (self.teacher, self.student) if net.image_dim}
        for role in ("teacher", "student"):
            net = getattr(self, role)
            require(
                net.image_channels in (0, both),
                f"{role}.in_channels is {net.in_channels}; accepted: {net.out_channels}, or {net.out_channels + both} "
                "with the mask and the latents of a picture",
            )
        require(len(clip) < 2, f"teacher and student read CLIP of the sizes {sorted(clip)}; they must be the same")
        distill = self.train_distill
        for path, value, accepted in (
            ("train_causal.prompt_switch_prob", self.train_causal.prompt_switch_prob, 0),
            ("train_init.prompt_switch_prob", self.train_init.prompt_switch_prob, 0),
            ("train_distill.continuation_prob", distill.continuation_prob, 0),
            ("train_distill.loss_frames", distill.loss_frames, 0),
            ("train_teacher.chunks", self.train_teacher.chunks, False),
            ("train_distill.teacher", "chunk" if distill.teacher == "chunk" else "", ""),
            ("train_distill.objective", "dmd_gan" if distill.objective == "dmd_gan" else "", ""),
        ):
            require(
                not self.reads_picture or value == accepted,
                f"{path} is {value!r}, but a network has an image branch, which needs clips that "
                "begin with their picture" + (f"; use {accepted!r}" if accepted != "" else ""),
            )

    def _check_scores(self) -> None:
        config, causal = self.train_distill, self.causal
        for name, needs in (("loss_frames", config.loss_frames), ("teacher", config.teacher == "chunk")):
            require(
                not needs or not causal.independent_first_frame,
                f"train_distill.{name} is {getattr(config, name)!r} with causal.independent_first_frame, whose blocks "
                "differ in length; set causal.independent_first_frame=False",
            )
        require(
            config.loss_frames % causal.frames_per_block == 0,
            f"train_distill.loss_frames is {config.loss_frames}; it must be a multiple of causal.frames_per_block, "
            f"{causal.frames_per_block}",
        )
        require(
            not self.diffusion.first_block_timesteps or (config.rollout == "self" and config.score_timesteps == "all"),
            "diffusion.first_block_timesteps are set; they need train_distill.rollout 'self' and score_timesteps 'all'",
        )
        layers = self.fake_score.num_layers
        require(
            all(layer < layers for layer in config.gan_layers),
            f"train_distill.gan_layers are {config.gan_layers}; the fake score has the layers 0 to {layers - 1}",
        )

    def _check_rollout(self, frames: int) -> None:
        self.causal.block_sizes(frames)
        require(
            self.train_distill.loss_frames <= frames,
            f"train_distill.loss_frames is {self.train_distill.loss_frames}; a rollout has {frames} latent frames "
            "(train_distill.frames or curriculum)",
        )
        context, prob = self.causal.context_frames(), self.train_distill.continuation_prob
        require(
            not prob or context <= frames,
            f"train_distill.continuation_prob is {prob}: a rollout continues {context} latent frames (causal.window "
            f"{self.causal.window}, sink {self.causal.sink}, in whole blocks) of the previous one, which has {frames}; "
            "use a smaller window or sink, longer rollouts or continuation_prob 0",
        )

    def _check_decoder(self) -> None:
        if self.decoder == "taehv":
            tiny = self.taehv.z_dim, len(self.taehv.temporal_upsample), sum(self.taehv.temporal_upsample)
            doublings = len(self.vae.temporal_downsample) + self.vae.patch_size - 1
            large = self.vae.z_dim, doublings, sum(self.vae.temporal_downsample)
            require(
                tiny == large,
                f"taehv decodes {tiny[0]} channels, {tiny[1]} doublings of space and {tiny[2]} of time; "
                f"the VAE's latents have {large[0]}, {large[1]} and {large[2]}",
            )

    def _check_heads_and_tokens(self) -> None:
        mesh = self.parallel
        for role in ("teacher", "student"):
            net = getattr(self, role)
            split, name = (mesh.tensor, "tensor") if mesh.ring else (mesh.tensor * mesh.context, "tensor x context")
            require(
                net.num_heads % split == 0,
                f"{role} has {net.num_heads} heads; parallel.{name} is {split}, which does not divide them; the "
                f"nearest that do are {nearest_divisors(net.num_heads, split)}",
            )
            rows, columns = self.latent_size
            tokens = (rows // net.patch_size[1]) * (columns // net.patch_size[2])
            require(
                tokens % mesh.context == 0,
                f"a latent frame has {tokens} tokens for the {role}; parallel.context is {mesh.context}, which does "
                f"not divide them; the nearest that do are {nearest_divisors(tokens, mesh.context)}",
            )

    def check_stage(self, stage: str) -> None:
        """Check that one of the training :data:`STAGES` can run: its clips and its batches (:meth:`check_batch`).

        A recipe does not check this when it is created, because the mesh and the clips of one stage need not fit the
        batches of others.

        Raises:
            ConfigError: the recipe has ``rolling_blocks``; a batch needs clips of more frames than ``video.frames``; or
                as :meth:`check_batch`.
        """
        require(
            not self.rolling_blocks,
            f"rolling_blocks is {self.rolling_blocks}; training denoises one block after the other, which needs "
            "rolling_blocks 0",
        )
        pixels, whole = {"vae", "taehv"}, {"teacher", "causal", "consistency"}
        longest = self.video.frames if stage in pixels else self.video.latent_frames
        for _, frames, _ in getattr(self, f"train_{stage}").stretches:
            require(
                frames <= longest or stage not in pixels | whole,
                f"train_{stage} has clips of {frames} {'frames' if stage in pixels else 'latent frames'} (frames or "
                f"curriculum); a clip has {longest} (video.frames is {self.video.frames})",
            )
        self.check_batch(stage)

    def check_batch(self, stage: str) -> None:
        """Check that the mesh and ``accumulate`` divide every batch of one of the training :data:`STAGES`.

        Raises:
            ConfigError: a batch is not divided; the message names the nearest batch sizes that are.
        """
        mesh, config = self.parallel, getattr(self, f"train_{stage}")
        parts = mesh.slices * max(mesh.data, 1) * mesh.fsdp * config.accumulate
        for _, _, size in config.stretches:
            below = size - size % parts
            require(
                size % parts == 0,
                f"train_{stage} has a batch of {size}; slices x data x fsdp x accumulate is {parts}, which does "
                f"not divide it; the nearest that it divides are {f'{below} and ' if below else ''}{below + parts}",
            )

    def _check_rolling(self) -> None:
        """Refuse settings with which a window of blocks cannot be denoised jointly."""
        blocks, steps, causal = self.rolling_blocks, len(self.diffusion.denoising_timesteps), self.causal
        if not blocks:
            return
        divisors = [divisor for divisor in range(1, steps + 1) if steps % divisor == 0]
        require(
            blocks in divisors,
            f"rolling_blocks is {blocks} with {steps} diffusion.denoising_timesteps; accepted: 0 or a divisor, "
            f"{', '.join(map(str, divisors))}",
        )
        frames = blocks * causal.frames_per_block
        require(
            not causal.window or causal.window >= frames,
            f"causal.window is {causal.window}; it must hold the {frames} latent frames of rolling_blocks {blocks}",
        )
        for path, value, accepted in (
            ("causal.context_pass", causal.context_pass, True),
            ("causal.add_context_noise", causal.add_context_noise == "always", False),
            ("causal.independent_first_frame", causal.independent_first_frame, False),
            ("diffusion.first_block_timesteps", bool(self.diffusion.first_block_timesteps), False),
            ("student.image_dim or image channels", self.student.image_dim + self.student.image_channels > 0, False),
        ):
            require(
                value == accepted,
                f"{path} is {'off' if accepted else 'set'} with rolling_blocks {blocks}; this is not supported; "
                "use rolling_blocks 0",
            )

    @property
    def reads_picture(self) -> bool:
        """Whether teacher or student has an image branch, so that training needs the first frames of clips."""
        return any(net.image_dim or net.image_channels for net in (self.teacher, self.student))

    @property
    def fake_score(self) -> TransformerConfig:
        """Sizes of DMD's fake score network: those of ``train_distill.critic_init``."""
        return self.student if self.train_distill.critic_init == "student" else self.teacher

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width ``(h, w)`` of the latent grid: the pixels' divided by ``vae.space_factor``."""
        factor = self.vae.space_factor
        return self.video.height // factor, self.video.width // factor

    @property
    def trajectory_diffusion(self) -> DiffusionConfig:
        """``diffusion`` with the number of Euler steps of ODE trajectories (``train_init.num_inference_steps``)."""
        steps = self.train_init.num_inference_steps or self.diffusion.num_inference_steps
        return dataclasses.replace(self.diffusion, num_inference_steps=steps)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape ``(F, h, w, C)`` of the latents of a clip."""
        return (self.video.latent_frames, *self.latent_size, self.vae.z_dim)


STAGES = tuple(f.name.removeprefix("train_") for f in dataclasses.fields(Recipe) if f.name.startswith("train_"))
"""The training stages, in order."""

RENAMED = {
    "diffusion.teacher_steps": "num_inference_steps",
    "diffusion.student_steps": "denoising_timesteps",
    "diffusion.guidance": "guidance_scale",
    "causal.context_timestep": "context_noise",
    "causal.clean_write": "context_pass",
    "causal.at_switch": "on_prompt_switch",
    "text.negative": "negative_prompt",
    "teacher.numerics": "precision",
    "student.numerics": "precision",
    "train_vae.stream": "concat_clips",
    "train_vae.cut": "crop_frames",
    "train_vae.train_encoder": "decoder_from",
    "train_taehv.streams": "rollouts",
    "train_causal.switch_fraction": "prompt_switch_prob",
    "train_init.short": "extra_trajectories",
    "train_init.switch_fraction": "prompt_switch_prob",
    "train_distill.critic_updates": "critic_steps",
    "train_distill.guidance": "guidance_scale",
    "train_distill.fake": "critic_init",
    "train_distill.continue_fraction": "continuation_prob",
    "train_distill.switch_fraction": "prompt_switch_prob",
}
"""Old path of a field to the new name of its last part. An old field is refused; the message names the new one."""


def check_field(path: str) -> None:
    """Check that a dotted path is a field of a recipe; raise a ConfigError that names the nearest or the new field."""
    check_path(Recipe, path, RENAMED)


def from_config_dict(values: ml_collections.ConfigDict | dict[str, Any]) -> Recipe:
    """Return the validated :class:`Recipe` of an ``ml_collections.ConfigDict`` or a plain dict.

    A ``dtype`` of ``"auto"`` becomes the type that suits this machine (``config.machine``).

    Raises:
        ConfigError: an unknown field, a value of another type or out of bounds, or groups that do not fit each other.
    """
    plain = values.to_dict() if hasattr(values, "to_dict") else values
    return build(Recipe, machine.resolve(plain) if isinstance(plain, Mapping) else plain, "", RENAMED)


def to_json(config: Any) -> str:
    """Return a configuration dataclass as JSON (tuples become lists); :func:`from_json` reads a Recipe back."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Recipe:
    """Return the Recipe that :func:`to_json` wrote.

    Raises:
        ConfigError: an unknown or renamed field, or a value that is not accepted.
        ValueError: no JSON.
    """
    return build(Recipe, json.loads(text), "", RENAMED)
