"""Names and shapes of published Wan checkpoints, written from their definitions and from nothing of this package.

Sources: ``wan/modules/model.py`` and ``wan/modules/vae.py`` of https://github.com/Wan-Video/Wan2.1, and the conversion
to diffusers' names in ``diffusers/loaders/single_file_utils.py``.
"""

import re
from collections.abc import Iterator, Sequence

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def transformer(
    *,
    dim: int,
    ffn_dim: int,
    num_layers: int,
    in_channels: int = 16,
    out_channels: int = 16,
    text_dim: int = 4096,
    freq_dim: int = 256,
    image_dim: int = 0,
    **_: int,
) -> Shapes:
    """Return names and shapes of ``WanModel``, with the image branch of ``model_type="i2v"`` if ``image_dim``."""
    shapes = _conv("patch_embedding", in_channels, dim, 1, 2, 2)
    shapes |= _linear("text_embedding.0", text_dim, dim) | _linear("text_embedding.2", dim, dim)
    shapes |= _linear("time_embedding.0", freq_dim, dim) | _linear("time_embedding.2", dim, dim)
    shapes |= _linear("time_projection.1", dim, 6 * dim)
    for layer in (f"blocks.{i}" for i in range(num_layers)):
        for attention in (f"{layer}.self_attn", f"{layer}.cross_attn"):
            for name in "qkvo":
                shapes |= _linear(f"{attention}.{name}", dim, dim)
            shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
        if image_dim:
            shapes |= _linear(f"{layer}.cross_attn.k_img", dim, dim) | _linear(f"{layer}.cross_attn.v_img", dim, dim)
            shapes[f"{layer}.cross_attn.norm_k_img.weight"] = (dim,)
        shapes |= {f"{layer}.norm3.weight": (dim,), f"{layer}.norm3.bias": (dim,)}  # norm1 and norm2 have no weights
        shapes |= _linear(f"{layer}.ffn.0", dim, ffn_dim) | _linear(f"{layer}.ffn.2", ffn_dim, dim)
        shapes[f"{layer}.modulation"] = (1, 6, dim)
    shapes |= _linear("head.head", dim, 4 * out_channels) | {"head.modulation": (1, 2, dim)}
    if image_dim:
        for index, width in ((0, image_dim), (4, dim)):
            shapes |= {f"img_emb.proj.{index}.weight": (width,), f"img_emb.proj.{index}.bias": (width,)}
        shapes |= _linear("img_emb.proj.1", image_dim, image_dim) | _linear("img_emb.proj.3", image_dim, dim)
    return shapes


_DIFFUSERS = (  # parts of original names, in the order in which they are replaced
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),  # diffusers runs the norm before cross-attention second
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("self_attn.q.", "attn1.to_q."),
    ("self_attn.k.", "attn1.to_k."),
    ("self_attn.v.", "attn1.to_v."),
    ("self_attn.o.", "attn1.to_out.0."),
    ("cross_attn.q.", "attn2.to_q."),
    ("cross_attn.k.", "attn2.to_k."),
    ("cross_attn.v.", "attn2.to_v."),
    ("cross_attn.o.", "attn2.to_out.0."),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
)


def diffusers_name(name: str) -> str:
    """Return diffusers' name of a tensor of ``WanModel``."""
    for old, new in _DIFFUSERS:
        name = name.replace(old, new)
    return name


def _norm(name: str, dim: int, axes: int = 3) -> Shapes:
    return {f"{name}.gamma": (dim, *(1,) * axes)}


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _norm(f"{name}.residual.0", inputs) | _conv(f"{name}.residual.2", inputs, outputs, 3, 3, 3)
    shapes |= _norm(f"{name}.residual.3", outputs) | _conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
    return shapes if inputs == outputs else shapes | _conv(f"{name}.shortcut", inputs, outputs, 1, 1, 1)


def _coder(net: str, first: tuple[int, int], levels: Iterator[Shapes], wide: int, last: tuple[int, int]) -> Shapes:
    """Return an encoder or decoder: first convolution, levels, a middle of width ``wide``, last convolution."""
    shapes = _conv(f"{net}.conv1", *first, 3, 3, 3)
    for layer in levels:
        shapes |= layer
    middle = f"{net}.middle"
    shapes |= _residual(f"{middle}.0", wide, wide) | _residual(f"{middle}.2", wide, wide)
    shapes |= _norm(f"{middle}.1.norm", wide, 2) | _conv(f"{middle}.1.to_qkv", wide, 3 * wide, 1, 1)
    shapes |= _conv(f"{middle}.1.proj", wide, wide, 1, 1)
    return shapes | _norm(f"{net}.head.0", last[0]) | _conv(f"{net}.head.2", *last, 3, 3, 3)


def _levels(net: str, stack: str, dims: Sequence[int], blocks: int, temporal: Sequence[bool]) -> Iterator[Shapes]:
    """Yield the layers of an encoder (which keeps its width when it resamples) or decoder (which halves it)."""
    index = 0
    for level, (inputs, outputs) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        if net == "decoder" and level:
            inputs //= 2
        for _ in range(blocks + (net == "decoder")):
            yield _residual(f"{net}.{stack}.{index}", inputs, outputs)
            inputs, index = outputs, index + 1
        if level < len(dims) - 2:
            halved, doubled = (outputs // 2, 2 * outputs) if net == "decoder" else (outputs, outputs)
            yield _conv(f"{net}.{stack}.{index}.resample.1", outputs, halved, 3, 3)
            if temporal[level]:
                yield _conv(f"{net}.{stack}.{index}.time_conv", outputs, doubled, 3, 1, 1)
            index += 1


def vae(*, base_dim: int = 96, z_dim: int = 16) -> Shapes:
    """Return names and shapes of ``WanVAE_``: two residual blocks per level, the two last levels resampled in time."""
    down = [base_dim * factor for factor in (1, 1, 2, 4, 4)]
    up = [base_dim * factor for factor in (4, 4, 4, 2, 1)]
    encoder = _levels("encoder", "downsamples", down, 2, (False, True, True))
    decoder = _levels("decoder", "upsamples", up, 2, (True, True, False))
    shapes = _coder("encoder", (3, base_dim), encoder, down[-1], (down[-1], 2 * z_dim))
    shapes |= _coder("decoder", (z_dim, up[0]), decoder, up[0], (base_dim, 3))
    return shapes | _conv("conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1) | _conv("conv2", z_dim, z_dim, 1, 1, 1)


_VAE_DIFFUSERS = (
    (r"^conv1", "quant_conv"),
    (r"^conv2", "post_quant_conv"),
    (r"coder\.conv1", "coder.conv_in"),
    (r"head\.0", "norm_out"),
    (r"head\.2", "conv_out"),
    (r"middle\.1", "mid_block.attentions.0"),
    (r"middle\.0", "mid_block.resnets.0"),
    (r"middle\.2", "mid_block.resnets.1"),
    (r"downsamples", "down_blocks"),
    (r"upsamples\.(\d+)", lambda match: _up_block(int(match[1]))),
    (r"residual\.0", "norm1"),
    (r"residual\.2", "conv1"),
    (r"residual\.3", "norm2"),
    (r"residual\.6", "conv2"),
    (r"shortcut", "conv_shortcut"),
)


def _up_block(index: int) -> str:
    """Return diffusers' name of layer ``index`` of the decoder, of which every level has three and an upsampler."""
    block, layer = divmod(index, 4)
    return f"up_blocks.{block}." + (f"resnets.{layer}" if layer < 3 else "upsamplers.0")


def vae_diffusers_name(name: str) -> str:
    """Return diffusers' name of a tensor of ``WanVAE_``."""
    for pattern, new in _VAE_DIFFUSERS:
        name = re.sub(pattern, new, name)  # type: ignore[call-overload]
    return name
