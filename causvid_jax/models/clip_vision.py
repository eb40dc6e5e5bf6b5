"""CLIP's image encoder (ViT-H/14, arXiv 2103.00020), which computes the ``image_embeds`` of Wan2.1-I2V.

It is a pre-norm vision transformer over 14 x 14 patches of a 224 x 224 image, with a class token first. Wan2.1 uses the
input of the *last* layer: 257 tokens of width 1280, neither normalized nor projected. The parameter tree includes the
last layer, the final norm and the projection only because published files do.

Matmuls run in ``config.dtype``; norms, softmax and the residual stream are float32.

Source: Wan2.1, ``wan/modules/clip.py`` (the visual half of ``open-clip-xlm-roberta-large-vit-huge-14``). In diffusers'
folders the same weights are a ``CLIPVisionModelWithProjection`` of transformers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from causvid_jax.config import CLIPConfig, require
from causvid_jax.models.attention import dense
from causvid_jax.models.layers import Params, gelu_exact, layer_norm, linear, matmul, mlp
from causvid_jax.sharding.params import ParamSpec, abstract_tree, init_tree, linear_spec, norm_spec, stack_spec

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training pixels in [0, 1]: red, green, blue."""

# ---- parameters -----------------------------------------------------------------------------------------------------


def _layer_spec(config: CLIPConfig) -> dict[str, Any]:
    dim = config.dim
    return {
        "norm1": norm_spec(dim),
        "attn": {
            **{name: linear_spec(dim, dim, ("embed", "heads")) for name in ("q", "k", "v")},
            "o": linear_spec(dim, dim, ("heads", "embed")),
        },
        "norm2": norm_spec(dim),
        "ffn": {
            "fc1": linear_spec(dim, config.ffn_dim, ("embed", "mlp")),
            "fc2": linear_spec(config.ffn_dim, dim, ("mlp", "embed")),
        },
    }


def spec(config: CLIPConfig) -> dict[str, Any]:
    """Return shape, logical axes and initializer of every parameter; ``blocks`` has the stacked layers."""
    dim, normal = config.dim, nn.initializers.normal(config.dim**-0.5)
    outer = {
        "patch_embedding": {
            "kernel": ParamSpec((3 * config.patch_size**2, dim), (None, "embed"), nn.initializers.xavier_uniform())
        },
        "class_embedding": ParamSpec((dim,), ("embed",), normal),
        "position_embedding": ParamSpec((config.tokens, dim), (None, "embed"), normal),
        "pre_norm": norm_spec(dim),
        "blocks": stack_spec(_layer_spec(config), config.num_layers),
        "post_norm": norm_spec(dim),
    }
    if config.projection_dim:
        outer["projection"] = {"kernel": ParamSpec((dim, config.projection_dim), ("embed", None), normal)}
    return outer


def init(key: jax.Array, config: CLIPConfig) -> Params:
    """Return new float32 parameters."""
    return init_tree(key, spec(config))


def abstract(config: CLIPConfig) -> Params:
    """Return the ``jax.ShapeDtypeStruct`` of every parameter."""
    return abstract_tree(spec(config))


# ---- pixels ---------------------------------------------------------------------------------------------------------


def bicubic_matrix(size: int, target: int) -> np.ndarray:
    """Return the float32 matrix ``[target, size]`` of bicubic interpolation along one axis, as in Wan2.1.

    Output i combines the four inputs around ``x = (i + 1/2) size / target - 1/2``; the border is repeated. The weights
    are those of Keys with a = -3/4, for distance d to x: ``(a + 2) d^3 - (a + 3) d^2 + 1`` for d <= 1 and
    ``a (d^3 - 5 d^2 + 8 d - 4)`` for d <= 2. There is no antialiasing.
    """
    a = -0.75
    centers = (np.arange(target) + 0.5) * size / target - 0.5
    first = np.floor(centers).astype(int)
    matrix = np.zeros((target, size))
    for tap in range(-1, 3):
        d = np.abs(centers - (first + tap))
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(matrix, (np.arange(target), np.clip(first + tap, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)


def preprocess(images: Float[jax.Array, "..."], *, config: CLIPConfig) -> Float[jax.Array, "B S S 3"]:
    """Resize images to CLIP's square, ignoring the aspect ratio, and return ``(x - mean) / std``.

    Args:
        images: ``[B, H, W, 3]`` in [-1, 1], of any size.
        config: has the size S of the square.

    Returns:
        float32 ``[B, S, S, 3]``.

    Raises:
        ConfigError: ``images`` have another shape.
    """
    require(
        images.ndim == 4 and images.shape[-1] == 3,
        f"images of shape {images.shape} cannot be encoded; accepted: [batch, height, width, 3]",
    )
    rows, columns = (bicubic_matrix(size, config.image_size) for size in images.shape[1:3])
    scaled = jnp.einsum(
        "yh,bhwc,xw->byxc", rows, images.astype(jnp.float32), columns, precision=jax.lax.Precision.HIGHEST
    )
    return ((scaled + 1) / 2 - jnp.array(MEAN)) / jnp.array(STD)


# ---- the encoder ----------------------------------------------------------------------------------------------------


def attention(p: Params, x: jax.Array, config: CLIPConfig) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(D)) v W_o + b_o`` over all tokens of ``x [B, S, M]``, float32 ``[B, S, M]``."""
    dtype = config.dtype
    q, k, v = (
        rearrange(linear(p[name], x, dtype), "b s (N D) -> b s N D", N=config.num_heads) for name in ("q", "k", "v")
    )
    return linear(p["o"], rearrange(dense(q, k, v, dtype=dtype), "b s N D -> b s (N D)"), dtype)


def encode(params: Params, pixels: Float[jax.Array, "..."], *, config: CLIPConfig) -> Float[jax.Array, "B T M"]:
    """Return the image embeddings of preprocessed images::

        x = LN([class; patches W] + positions)
        x += Attention(LN(x)); x += FFN(LN(x))   for all layers except the last

    Args:
        params: of :func:`spec`, of any floating type.
        pixels: ``[B, S, S, 3]`` of :func:`preprocess`.
        config: sizes and compute type.

    Returns:
        float32 ``[B, 1 + (S / patch)^2, M]``, class token first.

    Raises:
        ConfigError: ``pixels`` have another shape.
    """
    size = config.image_size
    require(
        pixels.ndim == 4 and pixels.shape[1:] == (size, size, 3),
        f"pixels of shape {pixels.shape} cannot be encoded; accepted: [batch, {size}, {size}, 3]",
    )
    activation = gelu_exact if config.activation == "gelu" else _quick_gelu

    def layer(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        p = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params["blocks"])
        with jax.named_scope("self_attention"):
            x = x + attention(p["attn"], layer_norm(x, config.eps, p["norm1"]), config)
        with jax.named_scope("ffn"):
            x = x + mlp(p["ffn"], layer_norm(x, config.eps, p["norm2"]), activation, config.dtype)
        return x, None

    with jax.named_scope("embed"):
        patch = config.patch_size
        patches = rearrange(pixels, "b (y p) (x q) c -> b (y x) (p q c)", p=patch, q=patch)
        x = matmul(patches, params["patch_embedding"]["kernel"], config.dtype)
        first = jnp.broadcast_to(params["class_embedding"].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + params["position_embedding"]
        x = layer_norm(x, config.eps, params["pre_norm"])
    x, _ = jax.lax.scan(layer, x, jnp.arange(config.num_layers - 1))
    return x


def _quick_gelu(x: jax.Array) -> jax.Array:
    """Return ``x sigmoid(1.702 x)``, the GELU approximation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)
