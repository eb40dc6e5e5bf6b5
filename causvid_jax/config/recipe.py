"""The recipe: everything about one model, its device mesh, and how it is read from files."""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any

import ml_collections

from causvid_jax.config.errors import ConfigError, require
from causvid_jax.config.model import (
    CausalConfig,
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
    DistillStageConfig,
    InitStageConfig,
    TAEHVStageConfig,
    TeacherStageConfig,
    VAEStageConfig,
)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The device mesh: ``data`` x ``fsdp`` x ``context`` x ``tensor``, and ``slices`` of it along the data axis.

    ``data`` holds copies of everything, ``fsdp`` splits batch and parameters, ``context`` the tokens of a frame,
    ``tensor`` heads and MLP. ``data = 0`` takes all devices that the others leave. Attention exchanges tokens for
    heads, so tensor x context must divide the heads; with ``ring`` (training only) tensor alone has to.
    ``offload_optimizer`` keeps the optimizers' moments in the host's memory (``pinned_host``) between updates; on CPU,
    where that is the memory there is, it changes nothing.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    ring: bool = False
    offload_optimizer: bool = False

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
    """The whole road of one model: data, networks, method and every training stage.

    ``umt5`` is the encoder of ``text.kind="umt5"``. ``decoder`` is what shows latents as pixels when sampling:
    ``"vae"``, or ``"taehv"``, the tiny one. The teacher's whole clips of a report are always shown by the VAE.
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
    train_distill: DistillStageConfig = DistillStageConfig()
    parallel: ParallelConfig = ParallelConfig()
    umt5: UMT5Config = UMT5Config()
    decoder: str = "vae"
    taehv: TAEHVConfig = TAEHVConfig()

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
        for frames in (self.video.latent_frames, *(length for length, _ in self.train_init.extra_trajectories)):
            self.causal.block_sizes(frames)
        require(
            not self.train_distill.continuation_prob
            or (self.causal.past_frames() > 0 and not self.causal.independent_first_frame),
            f"train_distill.continuation_prob is {self.train_distill.continuation_prob}; rollouts that go on from a "
            "past need a causal.window of more than one block and no independent first frame",
        )
        require(
            self.text.kind != "umt5" or self.umt5.dim == self.text.dim,
            f"umt5.dim is {self.umt5.dim}; the text rows are text.dim = {self.text.dim} wide",
        )
        self._check_decoder()
        self._check_mesh()

    def _check_decoder(self) -> None:
        require(self.decoder in ("vae", "taehv"), f"decoder is {self.decoder!r}; accepted: 'vae', 'taehv'")
        if self.decoder == "taehv":
            tiny = self.taehv.z_dim, len(self.taehv.temporal_upsample), sum(self.taehv.temporal_upsample)
            large = self.vae.z_dim, len(self.vae.temporal_downsample), sum(self.vae.temporal_downsample)
            require(
                tiny == large,
                f"taehv decodes {tiny[0]} channels, {tiny[1]} doublings of space and {tiny[2]} of time; "
                f"the VAE's latents have {large[0]}, {large[1]} and {large[2]}",
            )

    @property
    def fake_score(self) -> TransformerConfig:
        """The network of DMD's fake score."""
        return self.student if self.train_distill.critic_init == "student" else self.teacher

    @property
    def latent_size(self) -> tuple[int, int]:
        """``(h, w)`` of the latent grid."""
        factor = self.vae.space_factor
        return self.video.height // factor, self.video.width // factor

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(F, h, w, C)`` of the latents of a clip."""
        return (self.video.latent_frames, *self.latent_size, self.vae.z_dim)

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
            rows, columns = self.latent_size
            tokens = (rows // net.patch_size[1]) * (columns // net.patch_size[2])
            require(
                tokens % mesh.context == 0,
                f"a latent frame has {tokens} tokens for the {role}; parallel.context is {mesh.context}, which does "
                f"not divide them; the nearest that do are {nearest_divisors(tokens, mesh.context)}",
            )
        ways = mesh.slices * max(mesh.data, 1) * mesh.fsdp
        for stage in ("train_vae", "train_taehv", "train_teacher", "train_causal", "train_init", "train_distill"):
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
"""Old path of a field to its present name; an old one is refused with the new one."""


def check_renamed(path: str) -> None:
    """Refuse the old path of a field and name the new one."""
    if path in RENAMED:
        new = f"{path.rsplit('.', 1)[0]}.{RENAMED[path]}"
        raise ConfigError(f"config field {path!r} was renamed; write {new!r}")


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            check_renamed(f"{path}.{name}")
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
