"""Sizes of the networks: pixels, text encoders, video codecs, transformer, and what the causal student may see."""

import dataclasses

from causvid_jax.config.errors import ConfigError, check_dtype, require

MESH_AXES = ("data", "fsdp", "context", "tensor")
MeshAxes = tuple[str, ...]
REMAT = ("none", "attention", "dots", "full", "offload")


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

    ``kind="words"`` encodes a closed vocabulary as one-hot word plus one-hot position (the digits recipe). With a
    ``separator``, a word of the vocabulary that stands between phrases ("and"), the rows of a phrase also count the
    words of that phrase: a transformer's text encoder would tell every word what it goes with, and cross-attention
    alone has to find that out in several hops.
    ``negative_prompt`` is the prompt of the unconditional branch: with words none, with Wan the published one.
    """

    kind: str = "umt5"
    vocabulary: tuple[str, ...] = ()
    length: int = 512
    dim: int = 4096
    negative_prompt: str = ""
    separator: str = ""

    def __post_init__(self):
        require(self.kind in ("words", "umt5"), f"text.kind is {self.kind!r}; accepted: 'words', 'umt5'")
        require(
            not self.separator or self.separator in self.vocabulary,
            f"text.separator is {self.separator!r}; accepted: none, or a word of text.vocabulary",
        )
        if self.kind == "words":
            needed = (2 if self.separator else 1) * len(self.vocabulary) + self.length
            formula = f"{'2 ' if self.separator else ''}len(vocabulary) + length"
            require(self.dim == needed, f"text.dim is {self.dim}; a word vocabulary needs {formula} = {needed}")


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
        check_dtype("umt5", self.dtype)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP's image encoder (``causvid_jax.models.clip_vision``); defaults are ViT-H/14 as Wan2.1-I2V has it.

    ``projection_dim`` is the width of the embedding shared with text, which no network here reads but files have
    (0: a file without it). ``dtype`` is the compute type of matmuls.
    """

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    ffn_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    projection_dim: int = 1024
    activation: str = "gelu"
    eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        require(
            self.image_size % self.patch_size == 0,
            f"clip.image_size is {self.image_size}; it must be a multiple of patch_size = {self.patch_size}",
        )
        require(self.dim % self.num_heads == 0, f"clip.dim is {self.dim}, which {self.num_heads} heads do not divide")
        require(self.num_layers >= 2, f"clip.num_layers is {self.num_layers}; it must be at least 2")
        require(
            self.activation in ("gelu", "quick_gelu"),
            f"clip.activation is {self.activation!r}; accepted: 'gelu', 'quick_gelu'",
        )
        check_dtype("clip", self.dtype)

    @property
    def tokens(self) -> int:
        """Rows of an image: the class token and one per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


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
        check_dtype("vae", self.dtype)

    @property
    def space_factor(self) -> int:
        """Pixels per latent position along height and width: 8 in Wan."""
        return 2 ** len(self.temporal_downsample)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis to mesh axes: the one table behind parameters, optimizer states, caches, batches and activations.

    A logical axis over several mesh axes is split over their product, the first one outermost; over none it stays
    whole. ``embed``, ``heads``, ``mlp`` and ``layers`` are axes of parameters (:class:`sharding.params.ParamSpec`);
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
        check_dtype("taehv", self.dtype)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One Wan DiT. Defaults are Wan2.1-T2V-1.3B; ``dtype`` is the compute type of matmuls (parameters are float32).

    ``precision`` says what else is rounded to ``dtype`` on the way (``models.precision``): ``"default"``, nothing;
    ``"wan"`` and ``"causvid"``, what Wan2.1's code and that of CausVid and Self-Forcing round.

    ``image_dim > 0`` adds the image branch of Wan2.1-I2V (``models.image_branch``): ``image_tokens`` rows of that
    width are attended beside the text. The published one is ``image_dim=1280, in_channels=36``.

    ``remat`` says what a layer keeps for the backward pass, beside its input; the rest is computed again. From the most
    memory to the least: ``"none"`` keeps everything, ``"dots"`` the products with weights and the attention,
    ``"attention"`` the result of self-attention (most of the work of a long clip, two bytes a feature and token),
    ``"full"`` nothing, and ``"offload"`` nothing, its input lying in the host's memory until the backward pass wants
    it (on CPU that is "full"). True and False mean "full" and "none".
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
    precision: str = "default"
    attention: str = "xla"
    remat: str | bool = "none"
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
            self.precision in ("default", "wan", "causvid"),
            f"transformer.precision is {self.precision!r}; accepted: 'default', 'wan', 'causvid'",
        )
        require(
            self.image_dim >= 0 and self.image_tokens > 0,
            f"transformer.image_dim is {self.image_dim} and image_tokens is {self.image_tokens}; accepted: at least 0 "
            "(0: no image branch) and at least 1",
        )
        check_dtype("transformer", self.dtype)
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "full" if self.remat else "none")
        require(self.remat in REMAT, f"transformer.remat is {self.remat!r}; accepted: {', '.join(map(repr, REMAT))}")

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
    attention depends on differences only. ``context_pass`` runs one extra pass at ``context_noise`` to write the
    finished block to the cache; without it the last denoising step's keys and values stay.

    ``on_prompt_switch`` says what a stream does with its cache when its prompt changes: ``"keep"`` leaves it (as
    published), ``"recompute"`` writes the blocks in sight again under the new prompt, ``"reset"`` empties it, and the
    decoder's, so that the next block begins as a clip begins: a cut.
    """

    frames_per_block: int = 3
    independent_first_frame: bool = False
    window: int = 0
    sink: int = 0
    positions: str = "absolute"
    context_pass: bool = True
    context_noise: float = 0.0
    on_prompt_switch: str = "recompute"

    def __post_init__(self):
        require(
            self.on_prompt_switch in ("keep", "recompute", "reset"),
            f"causal.on_prompt_switch is {self.on_prompt_switch!r}; accepted: 'keep', 'recompute', 'reset'",
        )
        require(
            not (self.independent_first_frame and self.on_prompt_switch == "reset"),
            "causal.on_prompt_switch is 'reset' with causal.independent_first_frame: a clip would begin with one "
            "frame, and "
            "the blocks of a stream have one length; accepted: 'keep', 'recompute'",
        )
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
