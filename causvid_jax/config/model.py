"""Sizes of the networks: pixels, text encoders, video codecs, transformer, and the causal attention of the student."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from causvid_jax.config.errors import require
from causvid_jax.config.fields import Bounds, Config, CountOrZero, NotNegative, Positive, Size

MESH_AXES = ("data", "fsdp", "context", "tensor")
"""Names of the axes of a device mesh (:class:`causvid_jax.config.ParallelConfig`)."""
MeshAxes = tuple[str, ...]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "attention", "dots", "full", "offload"]
Side = Annotated[int, Bounds(least=16, most=8192, multiple=16)]
Timestep = Annotated[float, Bounds(least=0, most=1000)]

WAN_LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
"""Mean of Wan2.1's latents, per channel."""
WAN_LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""Standard deviation of Wan2.1's latents, per channel."""


@dataclasses.dataclass(frozen=True)
class VideoConfig(Config):
    """Size, length and rate of a clip: ``height`` x ``width`` pixels and ``frames`` pixel frames.

    ``frames`` is ``1 + 4 n``: the Wan VAE encodes the first frame alone and then groups of four. ``fps`` (frames per
    second) may be fractional: 23.976, 29.97 and 59.94 mean 24000/1001, 30000/1001 and 60000/1001
    (:func:`causvid_jax.media.frame_rate`).
    """

    label: ClassVar[str] = "video"

    height: Side = 480
    width: Side = 832
    frames: Annotated[int, Bounds(least=1, most=100_001)] = 81
    fps: Annotated[float, Bounds(above=0, most=1000)] = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.frames % 4 == 1, f"video.frames is {self.frames}; it must be 1 + 4n (1, 5, 9, ..., 81)")

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip: ``1 + (frames - 1) / 4``."""
        return 1 + (self.frames - 1) // 4

    @staticmethod
    def frames_of(latent_frames: int) -> int:
        """Return the frames that ``latent_frames`` decode to: the inverse of :attr:`latent_frames`."""
        return 1 + 4 * (latent_frames - 1)


@dataclasses.dataclass(frozen=True)
class TextConfig(Config):
    """The text encoder. It encodes a prompt as embeddings ``[length, dim]``, zero beyond its last token.

    ``kind="umt5"`` is UMT5 (:class:`UMT5Config`). ``kind="words"`` encodes a closed ``vocabulary`` as one-hot word plus
    one-hot position (the digits recipe). ``separator`` is a word of the vocabulary between phrases, such as "and". With
    it the embedding of a word also counts the words of its phrase, since cross-attention alone needs several layers to
    learn which colour belongs to which digit. Then ``dim = len(vocabulary) + length``, or with a separator
    ``2 len(vocabulary) + length``. ``negative_prompt`` is the prompt of the unconditional branch of guidance: empty for
    words, the published one for Wan.
    """

    label: ClassVar[str] = "text"

    kind: Literal["words", "umt5"] = "umt5"
    vocabulary: tuple[str, ...] = ()
    length: Annotated[int, Bounds(least=1, most=4096)] = 512
    dim: Size = 4096
    negative_prompt: str = ""
    separator: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.separator or self.separator in self.vocabulary,
            f"text.separator is {self.separator!r}; accepted: none, or a word of text.vocabulary",
        )
        if self.kind == "words":
            needed = (2 if self.separator else 1) * len(self.vocabulary) + self.length
            formula = f"{'2 ' if self.separator else ''}len(vocabulary) + length"
            require(self.dim == needed, f"text.dim is {self.dim}; a word vocabulary needs {formula} = {needed}")


@dataclasses.dataclass(frozen=True)
class UMT5Config(Config):
    """The UMT5 encoder (``models.umt5``); defaults are UMT5-XXL of Wan2.1 (published code, ``wan/modules/t5.py``).

    Attention has ``num_buckets`` biases per head for relative positions, half of them per direction, up to
    ``max_distance`` tokens. ``dtype`` is the compute type of matmuls. ``weights`` is the type of kernels and token
    table on the device: ``"dtype"`` is the compute type (11.4 GB in bfloat16), ``"int8"`` is 8 bits with a scale for
    every output channel (5.7 GB).
    """

    label: ClassVar[str] = "umt5"

    vocab_size: Size = 256384
    dim: Size = 4096
    ffn_dim: Size = 10240
    num_heads: Size = 64
    head_dim: Size = 64
    num_layers: Size = 24
    num_buckets: Annotated[int, Bounds(least=4, most=2**16, multiple=4)] = 32
    max_distance: Size = 128
    eps: Positive = 1e-6
    dtype: Dtype = "bfloat16"
    weights: Literal["dtype", "int8"] = "dtype"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_distance > self.num_buckets // 4,
            f"umt5.max_distance is {self.max_distance}; it must exceed num_buckets / 4 = {self.num_buckets // 4}",
        )


@dataclasses.dataclass(frozen=True)
class CLIPConfig(Config):
    """CLIP's image encoder (``models.clip_vision``); defaults are the ViT-H/14 of Wan2.1-I2V.

    It reads pictures of ``image_size`` x ``image_size`` pixels. ``projection_dim`` is the width of the embedding shared
    with text. No network here reads it, but published files contain it (0: a file without it). ``dtype`` is the compute
    type of matmuls.
    """

    label: ClassVar[str] = "clip"

    image_size: Size = 224
    patch_size: Size = 14
    dim: Size = 1280
    ffn_dim: Size = 5120
    num_heads: Size = 16
    num_layers: Annotated[int, Bounds(least=2, most=1000)] = 32
    projection_dim: CountOrZero = 1024
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    eps: Positive = 1e-5
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.image_size % self.patch_size == 0,
            f"clip.image_size is {self.image_size}; it must be a multiple of patch_size = {self.patch_size}",
        )
        require(self.dim % self.num_heads == 0, f"clip.dim is {self.dim}, which {self.num_heads} heads do not divide")

    @property
    def tokens(self) -> int:
        """Tokens of an image: the class token and one per patch, ``1 + (image_size / patch_size)^2``."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """The Wan causal video VAE (``models.vae``); defaults are the published Wan2.1 sizes.

    Level i has ``base_dim * dim_mult[i]`` channels and ``num_res_blocks`` residual blocks. Between two levels height
    and width are halved (encoder) or doubled (decoder); so is time where ``temporal_downsample`` is true.

    The VAE of Wan2.2-TI2V-5B (:data:`WAN22_VAE`) first moves squares of ``patch_size`` pixels into channels. Its
    decoder has another width (``decoder_base_dim``, 0: ``base_dim``). With ``is_residual`` every level of the encoder
    adds an average of its input, every level of the decoder adds a copy of its input, and resampling keeps the
    channels.

    ``latent_mean`` and ``latent_std`` (length ``z_dim``) normalise latents: ``z = (mu - mean) / std``. Empty means
    0 and 1. Training measures them and stores them with the weights (``training.autoencoder.latent_statistics``).
    """

    label: ClassVar[str] = "vae"

    base_dim: Size = 96
    dim_mult: tuple[Size, ...] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, Bounds(least=1, most=1000)] = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    z_dim: Size = 16
    decoder_base_dim: CountOrZero = 0
    patch_size: Annotated[int, Bounds(least=1, most=2)] = 1
    is_residual: bool = False
    latent_mean: tuple[Annotated[float, Bounds()], ...] = ()
    latent_std: tuple[Positive, ...] = ()
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @property
    def space_factor(self) -> int:
        """Pixels per latent position along height and width: 8 in Wan2.1, 16 in Wan2.2-TI2V-5B."""
        return self.patch_size * 2 ** len(self.temporal_downsample)


WAN22_LATENT_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
"""Mean of the latents of Wan2.2-TI2V-5B, per channel."""
WAN22_LATENT_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
"""Standard deviation of the latents of Wan2.2-TI2V-5B, per channel."""
WAN22_VAE = VAEConfig(base_dim=160, z_dim=48, decoder_base_dim=256, patch_size=2, is_residual=True)
"""Sizes of the VAE of Wan2.2-TI2V-5B: 48 channels, 16 x 16 pixels and four frames per latent."""


@dataclasses.dataclass(frozen=True)
class ShardingRules(Config):
    """Map logical axes of arrays to mesh axes, for parameters, optimizer states, caches, batches and activations.

    An axis with several mesh axes is split over their product, the first one outermost. An axis with none is
    replicated. ``embed``, ``heads``, ``mlp`` and ``layers`` are axes of parameters (``sharding.params.ParamSpec``);
    ``batch``, ``tokens`` (tokens of one frame) and ``attention_heads`` (heads during attention, when tokens are not
    split) are axes of activations and caches. Gradients and optimizer states are sharded like their parameters.
    """

    label: ClassVar[str] = "rules"

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = ("fsdp",)
    heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    layers: MeshAxes = ()
    tokens: MeshAxes = ("context",)
    attention_heads: MeshAxes = ("tensor", "context")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            for axis in getattr(self, field.name):
                require(
                    axis in MESH_AXES, f"rules.{field.name} names mesh axis {axis!r}; accepted: {', '.join(MESH_AXES)}"
                )


@dataclasses.dataclass(frozen=True)
class TAEHVConfig(Config):
    """The tiny video codec TAEHV (``models.taehv``); defaults are the sizes of ``taew2_1`` for Wan2.1.

    Every level halves (encoder) or doubles (decoder) height and width, and time where its flag is true.
    ``decoder_dims`` are the widths before the levels and before the output convolution. Each level has ``blocks``
    memory blocks.
    """

    label: ClassVar[str] = "taehv"

    z_dim: Size = 16
    encoder_dim: Size = 64
    decoder_dims: tuple[Size, ...] = (256, 128, 64, 64)
    blocks: Annotated[int, Bounds(least=1, most=1000)] = 3
    temporal_downsample: tuple[bool, ...] = (True, True, False)
    temporal_upsample: tuple[bool, ...] = (False, True, True)
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.temporal_upsample)
        require(
            len(self.temporal_downsample) == levels and sum(self.temporal_downsample) == sum(self.temporal_upsample),
            f"taehv.temporal_downsample is {self.temporal_downsample} and temporal_upsample is "
            f"{self.temporal_upsample}; they must have the same length and the same number of true entries",
        )
        require(
            len(self.decoder_dims) == levels + 1,
            f"taehv.decoder_dims has {len(self.decoder_dims)} entries; {levels} levels need {levels + 1}",
        )


LoraTarget = Literal["q", "k", "v", "o", "k_img", "v_img", "fc1", "fc2"]


@dataclasses.dataclass(frozen=True)
class LoraConfig(Config):
    """Low-rank adapters of the layers (``models.adapters``; LoRA, arXiv 2106.09685).

    A kernel ``W [in, out]`` becomes ``W + (alpha / rank) A B`` with ``A [in, rank]`` and ``B [rank, out]``. ``rank`` 0
    means no adapters, ``alpha`` 0 means ``alpha = rank``. ``targets`` names linear modules; names of attention modules
    stand for self-attention and cross-attention.
    """

    label: ClassVar[str] = "lora"

    rank: CountOrZero = 0
    alpha: NotNegative = 0.0
    targets: tuple[LoraTarget, ...] = ("q", "k", "v", "o", "fc1", "fc2")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.targets), "lora.targets is empty; name modules, or set lora.rank to 0 for no adapter")
        self._check_effect(("alpha", "targets"), self.rank > 0, "rank 0 (no adapters)", "a rank above 0")

    @property
    def scale(self) -> float:
        """Factor ``alpha / rank`` of the product of the two matrices."""
        return self.alpha / self.rank if self.alpha and self.rank else 1.0


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Config):
    """One Wan DiT. Defaults are Wan2.1-T2V-1.3B (published code, ``wan/configs``).

    ``dtype`` is the compute type of matmuls (parameters are float32). ``precision`` chooses what else is rounded to
    ``dtype`` (``models.precision``): ``"default"`` nothing, ``"fast"`` the products of linear layers, ``"wan"`` the
    same values as Wan2.1's code, ``"causvid"`` the same as the code of CausVid and Self-Forcing.

    ``kv_cache`` is the type in which a stream stores keys and values (``models.kv_cache``): ``"dtype"`` keeps it,
    ``"int8"`` is 8 bits with scales, which halves the memory of bfloat16. Training and self-rollouts refuse ``"int8"``.

    ``linear`` is the type in which the linear layers of the blocks multiply when sampling (``models.int8_linear``):
    ``"dtype"``, or ``"int8"``, which also halves the memory of bfloat16 weights. Training refuses ``"int8"``.

    ``image_dim > 0`` adds the image branch of Wan2.1-I2V (``models.image_branch``): tokens attend to ``image_tokens``
    embeddings of that width besides the text. The published values are ``image_dim=1280, in_channels=36``.

    ``attention`` is the kernel (``models.attention.dense``); in bfloat16 ``"auto"`` is splash on TPU and cuDNN on GPU,
    otherwise XLA.

    ``remat`` chooses what a layer keeps for the backward pass besides its input; the rest is recomputed. From most to
    least device memory: ``"none"`` keeps everything; ``"dots"`` keeps the products with weights and the attention;
    ``"attention"`` keeps the result of self-attention at two bytes per feature and token (in a long clip self-attention
    is most of the work); ``"full"`` keeps nothing; ``"offload"`` keeps nothing and moves the input to host memory until
    the backward pass (on CPU the same as ``"full"``). True and False mean ``"full"`` and ``"none"``.

    ``lora`` adds adapters; a stage that trains them sets it (``train_distill.lora``).
    """

    label: ClassVar[str] = "transformer"

    dim: Size = 1536
    ffn_dim: Size = 8960
    num_heads: Size = 12
    num_layers: Annotated[int, Bounds(least=1, most=1000)] = 30
    in_channels: Size = 16
    out_channels: Size = 16
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    text_dim: Size = 4096
    text_length: Size = 512
    freq_dim: Annotated[int, Bounds(least=2, most=2**20, multiple=2)] = 256
    eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    image_dim: CountOrZero = 0
    image_tokens: Size = 257
    dtype: Dtype = "float32"
    precision: Literal["default", "fast", "wan", "causvid"] = "default"
    kv_cache: Literal["dtype", "int8"] = "dtype"
    linear: Literal["dtype", "int8"] = "dtype"
    attention: Literal["auto", "xla", "cudnn", "splash", "blockwise", "int8"] = "xla"
    remat: Remat | bool = "none"
    lora: LoraConfig = LoraConfig()
    rules: ShardingRules = ShardingRules()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.dim % self.num_heads == 0, f"transformer.dim is {self.dim}, which {self.num_heads} heads do not divide"
        )
        require(
            self.head_dim % 2 == 0 and self.head_dim >= 6,
            f"transformer head size is {self.head_dim} (dim / num_heads); rotary embedding needs an even size, from 6",
        )
        require(self.patch_size[0] == 1, f"transformer.patch_size is {self.patch_size}; its temporal size must be 1")
        require(
            self.dtype != "float32" or self.attention not in ("cudnn", "splash", "int8"),
            f"transformer.attention is {self.attention!r} with dtype 'float32', but this kernel does not compute in "
            "float32; accepted: 'auto' or 'xla', or dtype 'bfloat16'",
        )
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "full" if self.remat else "none")

    @property
    def head_dim(self) -> int:
        """Features of an attention head: ``dim / num_heads``."""
        return self.dim // self.num_heads

    @property
    def image_channels(self) -> int:
        """Input channels of a picture's mask and latents, beside the noisy latents: 20 of the 36 in Wan's I2V."""
        return self.in_channels - self.out_channels


@dataclasses.dataclass(frozen=True)
class ExpertsConfig(Config):
    """A teacher of two networks of one size, chosen by the timestep (Wan2.2-A14B; ``models.experts``).

    With ``boundary > 0`` the high-noise expert computes timesteps ``t >= boundary`` (0 to 1000, after the shift) and
    the low-noise expert computes those below. 0 means one network. ``diffusion.guidance_scale`` is for the high-noise
    expert, ``low_noise_guidance_scale`` for the low-noise expert. In the real score of a distillation the scales are
    ``train_distill.guidance_scale`` and ``low_noise_distill_guidance_scale``. A low-noise scale of 0 means the scale of
    the high-noise expert.
    """

    label: ClassVar[str] = "experts"

    boundary: Timestep = 0.0
    low_noise_guidance_scale: NotNegative = 0.0
    low_noise_distill_guidance_scale: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low_noise_guidance_scale", "low_noise_distill_guidance_scale"):
            require(
                not getattr(self, name) or self.boundary,
                f"experts.{name} is {getattr(self, name):g} without experts.boundary, which tells the two experts "
                "apart; set the boundary, 875 for Wan2.2-T2V-A14B",
            )
