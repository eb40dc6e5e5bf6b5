"""What stands beside published weights: their file's name and their ``config.json``."""

from typing import Any

from causvid_jax.config import CLIPConfig, TAEHVConfig, TransformerConfig, UMT5Config, VAEConfig

_ORIGINAL = {
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    "taehv": "taew2_1",
}
TOKENIZERS = {"original": "google/umt5-xxl", "diffusers": "tokenizer"}
"""Where the text encoder's tokenizer lies in a published folder."""


def file_stem(component: str, naming: str) -> str:
    """The name, without suffix, that readers of a published folder look for."""
    if naming == "original":
        return _ORIGINAL.get(component, "diffusion_pytorch_model")
    return "model" if component in ("text_encoder", "image_encoder") else "diffusion_pytorch_model"


def describe(
    config: TransformerConfig | VAEConfig | UMT5Config | CLIPConfig | TAEHVConfig, naming: str
) -> dict[str, Any] | None:
    """``config.json``: the constructor's arguments of diffusers' or transformers' class, or of the original
    ``WanModel``.

    None for the other original networks, which have their sizes in their code.
    """
    if isinstance(config, TransformerConfig):
        return _original(config) if naming == "original" else _diffusers(config)
    if naming == "original" or isinstance(config, TAEHVConfig):
        return None
    if isinstance(config, VAEConfig):
        return _vae(config)
    return _umt5(config) if isinstance(config, UMT5Config) else _clip(config)


def _original(config: TransformerConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "model_type": "i2v" if config.image_dim else "t2v",
        "patch_size": list(config.patch_size),
        "text_len": config.text_length,
        "text_dim": config.text_dim,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "eps": config.eps,
    }


def _diffusers(config: TransformerConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": config.image_dim or None,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "rope_max_seq_len": 1024,
    }


def _vae(config: VAEConfig) -> dict[str, Any]:
    described = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.base_dim,
        "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        # The published class spells it so.
        "temperal_downsample": list(config.temporal_downsample),
        "dropout": 0.0,
    }
    if config.latent_mean:
        described |= {"latents_mean": list(config.latent_mean), "latents_std": list(config.latent_std)}
    return described


def _umt5(config: UMT5Config) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "d_ff": config.ffn_dim,
        "d_kv": config.head_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.eps,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _clip(config: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModelWithProjection" if config.projection_dim else "CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "projection_dim": config.projection_dim or config.dim,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
    }
