"""Parameters of the Wan diffusion transformer: shapes, logical axes and initializers."""

import dataclasses
from typing import Any

import flax.linen as nn

from causvid_jax.config import TransformerConfig
from causvid_jax.models import adapters, image_branch, int8_linear
from causvid_jax.sharding.params import ParamSpec, linear_spec, norm_spec, stack_spec


def _attention_spec(dim: int, *, image: bool = False) -> dict[str, Any]:
    """Return the specification of an attention; with ``image`` also that of the keys and values of image tokens."""
    of_image = ("k_img", "v_img") if image else ()
    norm = {"scale": ParamSpec((dim,), ("embed",), nn.initializers.ones)}
    return {
        **{name: linear_spec(dim, dim, ("embed", "heads")) for name in ("q", "k", "v", *of_image)},
        "o": linear_spec(dim, dim, ("heads", "embed")),
        **{f"norm_{name}": norm for name in ("q", "k", *of_image[:1])},
    }


def block_spec(config: TransformerConfig) -> dict[str, Any]:
    """Return the specification of one layer; with ``linear="int8"`` its kernels are in 8 bits with scales."""
    dim = config.dim
    spec = {
        "modulation": ParamSpec((6, dim), (None, None), nn.initializers.normal(dim**-0.5)),
        "self_attn": _attention_spec(dim),
        "norm3": norm_spec(dim),
        "cross_attn": _attention_spec(dim, image=config.image_dim > 0),
        "ffn": {
            "fc1": linear_spec(dim, config.ffn_dim, ("embed", "mlp")),
            "fc2": linear_spec(config.ffn_dim, dim, ("mlp", "embed")),
        },
    }
    spec = adapters.with_adapters(spec, config.lora)
    return int8_linear.rounded_spec(spec) if config.linear == "int8" else spec


def outer_spec(config: TransformerConfig) -> dict[str, Any]:
    """Return the specification of the parameters outside the layers.

    The initializers are Wan's: N(0, 0.02^2) in the text and time embeddings, and a zero head.
    """
    dim, small = config.dim, nn.initializers.normal(0.02)
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    return {
        "patch_embedding": linear_spec(patch * config.in_channels, dim, (None, "embed")),
        "text_embedding": {
            "fc1": linear_spec(config.text_dim, dim, (None, "embed"), small),
            "fc2": linear_spec(dim, dim, ("embed", None), small),
        },
        "time_embedding": {
            "fc1": linear_spec(config.freq_dim, dim, (None, "embed"), small),
            "fc2": linear_spec(dim, dim, ("embed", None), small),
        },
        "time_projection": linear_spec(dim, 6 * dim, ("embed", None)),
        "head": {
            "modulation": ParamSpec((2, dim), (None, None), nn.initializers.normal(dim**-0.5)),
            "proj": linear_spec(dim, patch * config.out_channels, ("embed", None), nn.initializers.zeros),
        },
        **({"image_embedding": image_branch.spec(config)} if config.image_dim else {}),
    }


def spec(config: TransformerConfig) -> dict[str, Any]:
    """Return shape, logical axes and initializer of every parameter; ``blocks`` has the stacked layers.

    These are the parameters of files and training, for any ``linear``.
    """
    return inference_spec(dataclasses.replace(config, linear="dtype"))


def inference_spec(config: TransformerConfig) -> dict[str, Any]:
    """Return :func:`spec` of the parameters as a sampler holds them: kernels in 8 bits with ``linear="int8"``."""
    return {**outer_spec(config), "blocks": stack_spec(block_spec(config), config.num_layers)}
