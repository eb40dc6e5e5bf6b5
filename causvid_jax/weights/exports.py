"""What stands beside published weights: their file's name and their ``config.json``."""

from typing import Any

from causvid_jax.config import TransformerConfig, VAEConfig


def file_stem(component: str, naming: str) -> str:
    """The name, without suffix, that readers of a published folder look for."""
    return "Wan2.1_VAE" if (component, naming) == ("vae", "original") else "diffusion_pytorch_model"


def describe(config: TransformerConfig | VAEConfig, naming: str) -> dict[str, Any] | None:
    """``config.json``: the constructor's arguments of diffusers' class, or of the original ``WanModel``.

    None for the original VAE, which has its sizes in its code.
    """
    if isinstance(config, VAEConfig):
        return None if naming == "original" else _vae(config)
    return _original(config) if naming == "original" else _diffusers(config)


def _original(config: TransformerConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
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
        "image_dim": None,
        "added_kv_proj_dim": None,
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
