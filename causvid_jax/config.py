"""Frozen, validated configuration. ``ml_collections`` stops in this file.

A recipe file under ``configs/`` returns an ``ml_collections.ConfigDict``; :func:`from_config_dict` turns it into a
:class:`Recipe` of frozen, hashable dataclasses, which is what every other module sees and what ``jax.jit`` can take as
a static argument. A field that does not exist, a value of the wrong type and a combination that cannot work are
refused here, in one sentence, before any compute is spent.
"""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any

import ml_collections


class ConfigError(ValueError):
    """A configuration or an input that cannot work; the message names the value and what would be accepted."""


def require(condition: object, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


MESH_AXES = ("data", "fsdp", "context", "tensor")


def _check_dtype(owner: str, dtype: str) -> None:
    require(dtype in ("float32", "bfloat16"), f"{owner}.dtype is {dtype!r}; accepted: 'float32', 'bfloat16'")


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Pixel geometry of a clip. ``frames = 1 + 4 n``: the Wan VAE keeps one frame alone, then groups four."""

    height: int = 480
    width: int = 832
    frames: int = 81
    fps: int = 16

    def __post_init__(self):
        require(
            self.frames >= 1 and self.frames % 4 == 1,
            f"video.frames is {self.frames}; it must be 1 + 4n (1, 5, 9, ..., 81)",
        )
        for name in ("height", "width"):
            size = getattr(self, name)
            require(size > 0 and size % 16 == 0, f"video.{name} is {size}; it must be a positive multiple of 16")
        require(self.fps > 0, f"video.fps is {self.fps}; it must be positive")

    @property
    def latent_frames(self) -> int:
        return 1 + (self.frames - 1) // 4


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What a prompt becomes: ``length`` rows of width ``dim``, zero beyond the prompt.

    ``kind="words"`` encodes a closed vocabulary as one-hot word plus one-hot position (the digits recipe).
    """

    kind: str = "umt5"
    vocabulary: tuple[str, ...] = ()
    length: int = 512
    dim: int = 4096

    def __post_init__(self):
        require(self.kind in ("words", "umt5"), f"text.kind is {self.kind!r}; accepted: 'words', 'umt5'")
        if self.kind == "words":
            needed = len(self.vocabulary) + self.length
            require(
                self.dim == needed,
                f"text.dim is {self.dim}; a word vocabulary needs len(vocabulary) + length = {needed}",
            )


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """The UMT5 encoder (``causvid_jax.models.umt5``); defaults are UMT5-XXL as Wan2.1 runs it.

    ``num_buckets`` relative positions are told apart, half of them per direction, up to ``max_distance`` tokens;
    ``dtype`` is the compute type of matmuls.
    """

    vocab_size: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "bfloat16"

    def __post_init__(self):
        require(
            self.num_buckets >= 4 and self.num_buckets % 4 == 0,
            f"umt5.num_buckets is {self.num_buckets}; it must be a positive multiple of 4",
        )
        require(
            self.max_distance > self.num_buckets // 4,
            f"umt5.max_distance is {self.max_distance}; it must exceed num_buckets / 4 = {self.num_buckets // 4}",
        )
        _check_dtype("umt5", self.dtype)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The Wan causal video VAE (``causvid_jax.models.vae``); defaults are the published Wan2.1 sizes.

    ``latent_mean`` and ``latent_std`` (length ``z_dim``) normalise latents: ``z = (mu - mean) / std``. Empty means
    0 and 1; the digits recipe measures them after training and stores them beside its weights.
    """

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    z_dim: int = 16
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            f"vae.temporal_downsample has {len(self.temporal_downsample)} entries; dim_mult of length "
            f"{len(self.dim_mult)} needs {len(self.dim_mult) - 1}",
        )
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            require(
                len(values) in (0, self.z_dim), f"vae.{name} has {len(values)} entries; accepted: 0 or {self.z_dim}"
            )
        _check_dtype("vae", self.dtype)


MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis to mesh axes: the one table behind parameters, optimizer states, caches, batches and activations.

    A logical axis over several mesh axes is split over their product, the first one outermost; over none it stays
    whole. ``embed``, ``heads``, ``mlp`` and ``layers`` are axes of parameters (:class:`models.params.ParamSpec`);
    ``batch``, ``tokens`` (tokens of one frame) and ``attention_heads`` (heads while attention runs, when tokens are
    whole) are axes of activations and caches. Gradients and optimizer states follow their parameters.
    """

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = ("fsdp",)
    heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    layers: MeshAxes = ()
    tokens: MeshAxes = ("context",)
    attention_heads: MeshAxes = ("tensor", "context")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            for axis in getattr(self, field.name):
                require(
                    axis in MESH_AXES, f"rules.{field.name} names mesh axis {axis!r}; accepted: {', '.join(MESH_AXES)}"
                )


@dataclasses.dataclass(frozen=True)
class TAEHVConfig:
    """The tiny video codec TAEHV (``causvid_jax.models.taehv``); defaults are the sizes of ``taew2_1`` for Wan2.1.

    Every level halves (encoder) or doubles (decoder) height and width, and time where its flag says so;
    ``decoder_dims`` are the widths in front of the levels and of the output convolution. ``blocks`` memory blocks
    stand in each level.
    """

    z_dim: int = 16
    encoder_dim: int = 64
    decoder_dims: tuple[int, ...] = (256, 128, 64, 64)
    blocks: int = 3
    temporal_downsample: tuple[bool, ...] = (True, True, False)
    temporal_upsample: tuple[bool, ...] = (False, True, True)
    dtype: str = "float32"

    def __post_init__(self):
        levels = len(self.temporal_upsample)
        require(
            len(self.temporal_downsample) == levels and sum(self.temporal_downsample) == sum(self.temporal_upsample),
            f"taehv.temporal_downsample {self.temporal_downsample} and temporal_upsample {self.temporal_upsample} "
            "undo different things; they must agree in length and in how often they are true",
        )
        require(
            len(self.decoder_dims) == levels + 1,
            f"taehv.decoder_dims has {len(self.decoder_dims)} entries; {levels} levels need {levels + 1}",
        )
        _check_dtype("taehv", self.dtype)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One Wan DiT. Defaults are Wan2.1-T2V-1.3B; ``dtype`` is the compute type of matmuls (parameters are float32).

    ``image_dim > 0`` adds the image branch of Wan2.1-I2V (``models.image_branch``): ``image_tokens`` rows of that
    width are attended beside the text. The published one is ``image_dim=1280, in_channels=36``.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_length: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0
    image_dim: int = 0
    image_tokens: int = 257
    dtype: str = "float32"
    attention: str = "xla"
    remat: bool = False
    rules: ShardingRules = ShardingRules()

    def __post_init__(self):
        require(
            self.dim % self.num_heads == 0,
            f"transformer.dim is {self.dim}, which {self.num_heads} heads do not divide",
        )
        head_dim = self.dim // self.num_heads
        require(
            head_dim % 2 == 0 and head_dim >= 6,
            f"transformer head size is {head_dim} (dim / num_heads); rotary embedding needs an even size of at least 6",
        )
        require(self.freq_dim % 2 == 0, f"transformer.freq_dim is {self.freq_dim}; it must be even")
        require(self.patch_size[0] == 1, f"transformer.patch_size is {self.patch_size}; its temporal size must be 1")
        require(
            self.attention in ("auto", "xla", "cudnn", "splash"),
            f"transformer.attention is {self.attention!r}; accepted: 'auto', 'xla', 'cudnn', 'splash'",
        )
        require(
            self.image_dim >= 0 and self.image_tokens > 0,
            f"transformer.image_dim is {self.image_dim} and image_tokens is {self.image_tokens}; accepted: at least 0 "
            "(0: no image branch) and at least 1",
        )
        _check_dtype("transformer", self.dtype)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """What a token of the causal student may see, in units of latent frames.

    A token sees its own block and every earlier one; with ``window > 0`` only the last ``window`` frames up to the
    end of its own block, plus the first ``sink`` frames of the video. ``independent_first_frame`` makes the blocks
    1, K, K, ... instead of K, K, ....

    ``positions`` says how the streaming cache places its frames on the rotary time axis: ``"absolute"`` (as
    published: a sink drifts ever further away) or ``"relative"`` (the sink sits right before the window, so that a
    stream of any length stays in the trained range). Without a sink the two are the same function, since rotary
    attention depends on differences only. ``clean_write`` runs one extra pass at ``context_timestep`` to write the
    finished block to the cache; without it the last denoising step's keys and values stay.
    """

    frames_per_block: int = 3
    independent_first_frame: bool = False
    window: int = 0
    sink: int = 0
    positions: str = "absolute"
    clean_write: bool = True
    context_timestep: float = 0.0

    def __post_init__(self):
        require(
            self.frames_per_block >= 1, f"causal.frames_per_block is {self.frames_per_block}; it must be at least 1"
        )
        require(
            self.window == 0 or self.window >= self.frames_per_block,
            f"causal.window is {self.window} frames; it must be 0 (no window) or at least one block "
            f"({self.frames_per_block})",
        )
        require(self.sink >= 0, f"causal.sink is {self.sink}; it must not be negative")
        require(
            self.positions in ("absolute", "relative"),
            f"causal.positions is {self.positions!r}; accepted: 'absolute', 'relative'",
        )

    def past_frames(self) -> int:
        """Frames of the whole earlier blocks of which a block sees any through the window; 0 without a window."""
        return max(0, self.window - 1) // self.frames_per_block * self.frames_per_block

    def block_sizes(self, frames: int) -> tuple[int, ...]:
        """Frames of each block of a clip of ``frames`` latent frames; refuses a clip that no block structure fits."""
        k, first = self.frames_per_block, 1 if self.independent_first_frame else 0
        if frames < max(first, 1) or (frames - first) % k:
            below = max(first, frames - (frames - first) % k)
            below = below if below >= max(first, 1) else first + k
            structure = f"1 + n*{k}" if first else f"n*{k}"
            raise ConfigError(
                f"{frames} latent frames do not fit blocks of {structure}; the nearest that do are "
                f"{below} and {below + k}"
            )
        return ((1,) if first else ()) + (k,) * ((frames - first) // k)


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


def _check_fraction(name: str, value: float) -> None:
    require(0 <= value <= 1, f"{name} is {value}; accepted: 0 to 1")


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
class InitStageConfig(StageConfig):
    """ODE regression on the teacher's trajectories; ``include_clean`` adds t = 0 blocks as context only.

    ``switch_fraction`` of the clips go on from another clip's past, as a stream does whose prompt has just changed
    (``distill.ode_regression.splice``).
    """

    trajectories: int = 1024
    include_clean: bool = True
    switch_fraction: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _check_fraction("train_init.switch_fraction", self.switch_fraction)


@dataclasses.dataclass(frozen=True)
class DistillStageConfig(StageConfig):
    """DMD. ``steps`` counts generator updates, each with ``critic_updates`` fake-score updates before it.

    ``rollout`` is ``"data"`` (the paper: real latents noised per block) or ``"self"`` (the student's own rollout).
    ``guidance`` is the g of ``r = r_uncond + g (r_cond - r_uncond)``; the published code writes it as ``1 + g``.
    ``teacher`` is ``"bidirectional"`` or ``"causal"``, ``init`` is ``"ode"`` or ``"teacher"`` (Tab. 4 of the paper).
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
        _check_fraction("train_distill.switch_fraction", self.switch_fraction)
        for name, accepted in (
            ("rollout", ("data", "self")),
            ("teacher", ("bidirectional", "causal")),
            ("init", ("ode", "teacher")),
        ):
            value = getattr(self, name)
            require(value in accepted, f"distill.{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
        require(
            0 < self.score_timestep_min < self.score_timestep_max <= 1000,
            f"distill score timesteps are [{self.score_timestep_min}, {self.score_timestep_max}]; "
            "accepted: 0 < min < max <= 1000",
        )


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The device mesh: ``data`` x ``fsdp`` x ``context`` x ``tensor``, and ``slices`` of it along the data axis.

    ``data`` holds copies of everything, ``fsdp`` splits batch and parameters, ``context`` the tokens of a frame,
    ``tensor`` heads and MLP. ``data = 0`` takes all devices that the others leave. Attention exchanges tokens for
    heads, so tensor x context must divide the heads; with ``ring`` (training only) tensor alone has to.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    ring: bool = False

    def __post_init__(self):
        for name in ("slices", "fsdp", "context", "tensor"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name} is {value}; it must be at least 1")
        require(self.data >= 0, f"parallel.data is {self.data}; it must be at least 1, or 0 for the devices left over")


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of ``number`` around ``wanted``, in words."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    around = {
        max((d for d in divisors if d <= wanted), default=1),
        min((d for d in divisors if d >= wanted), default=number),
    }
    return " and ".join(map(str, sorted(around)))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The whole road of one model: data, networks, method and every training stage."""

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
    train_teacher: TeacherStageConfig = TeacherStageConfig()
    train_init: InitStageConfig = InitStageConfig()
    train_distill: DistillStageConfig = DistillStageConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self):
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
        self.causal.block_sizes(self.video.latent_frames)
        require(
            not self.train_distill.switch_fraction
            or (self.causal.past_frames() > 0 and not self.causal.independent_first_frame),
            f"train_distill.switch_fraction is {self.train_distill.switch_fraction}; rollouts that go on from a past "
            "need a causal.window of more than one block and no independent first frame",
        )
        self._check_mesh()

    def _check_mesh(self) -> None:
        mesh = self.parallel
        for role in ("teacher", "student"):
            net = getattr(self, role)
            split, name = (mesh.tensor, "tensor") if mesh.ring else (mesh.tensor * mesh.context, "tensor x context")
            require(
                net.num_heads % split == 0,
                f"{role} has {net.num_heads} heads; parallel.{name} is {split}, which does not divide them; the "
                f"nearest that do are {nearest_divisors(net.num_heads, split)}",
            )
            factor = 2 ** (len(self.vae.dim_mult) - 1)
            rows, columns = (size // factor for size in (self.video.height, self.video.width))
            tokens = (rows // net.patch_size[1]) * (columns // net.patch_size[2])
            require(
                tokens % mesh.context == 0,
                f"a latent frame has {tokens} tokens for the {role}; parallel.context is {mesh.context}, which does "
                f"not divide them; the nearest that do are {nearest_divisors(tokens, mesh.context)}",
            )
        ways = mesh.slices * max(mesh.data, 1) * mesh.fsdp
        for stage in ("train_vae", "train_teacher", "train_init", "train_distill"):
            config = getattr(self, stage)
            parts = ways * config.accumulate
            for size in (config.batch_size, *(batch for _, _, batch in config.curriculum)):
                below = size - size % parts
                require(
                    size % parts == 0,
                    f"{stage} has a batch of {size}; slices x data x fsdp x accumulate is {parts}, which does not "
                    f"divide it; the nearest that it divides are {f'{below} and ' if below else ''}{below + parts}",
                )


def _convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the type ``hint``, or a ConfigError that names ``path``."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        require(isinstance(value, dict), f"{path} is {value!r}; it must be a group of fields")
        return _build(typing.cast(type, hint), value, path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        require(isinstance(value, (tuple, list)), f"{path} is {value!r}; it must be a sequence")
        args = typing.get_args(hint)
        items = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        require(len(items) == len(value), f"{path} has {len(value)} entries; it must have {len(items)}")
        return tuple(_convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, items, strict=True)))
    if origin is types.UnionType or origin is typing.Union:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{path} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}",
    )
    return value


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; accepted: {', '.join(names)}"
            raise ConfigError(f"config field {f'{path}.{name}' if path else name!r} does not exist{hint}")
    where = f"{path}." if path else ""
    return cls(**{name: _convert(v, hints[name], f"{where}{name}") for name, v in values.items()})


def from_config_dict(values: ml_collections.ConfigDict | dict[str, Any]) -> Recipe:
    """The validated :class:`Recipe` of an ``ml_collections.ConfigDict`` (or plain dict); errors are ConfigError."""
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    return _build(Recipe, dict(values), "")


def to_json(config: Any) -> str:
    """Any of these dataclasses as JSON (tuples become lists); :func:`from_json` of a Recipe reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Recipe:
    """The Recipe written by :func:`to_json`."""
    return _build(Recipe, json.loads(text), "")
