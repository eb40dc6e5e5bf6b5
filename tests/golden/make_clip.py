"""Writes clip.npz: transformers' CLIP image encoder with random weights. Needs the ``parity`` extra.

``python tests/golden/make_clip.py`` writes the file; ``--check`` draws new weights and pictures and compares the JAX
encoder with transformers there and then. The file holds pictures, pixels as PyTorch scales them, and rows;
``random_weights`` draws the weights again. :func:`as_original` writes the same weights as the original file has them.
"""

import pathlib

import numpy as np
import script
from make_transformer import random_weights

GOLDEN = pathlib.Path(__file__).with_name("clip.npz")
SEED = 8
SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "dim": 24,
    "ffn_dim": 40,
    "num_heads": 3,
    "num_layers": 3,
    "projection_dim": 10,
}
# Of the pictures: one shrinks along both axes, one grows, one is as wide as it must be.
PICTURES = ((30, 50), (7, 9), (17, 12))


def as_original(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' state dict in the original file's names, written out tensor by tensor."""
    vision, out = "vision_model.", {}
    embeddings = f"{vision}embeddings."
    out["visual.patch_embedding.weight"] = state[f"{embeddings}patch_embedding.weight"]
    out["visual.cls_embedding"] = state[f"{embeddings}class_embedding"].reshape(1, 1, -1)
    out["visual.pos_embedding"] = state[f"{embeddings}position_embedding.weight"][None]
    out["visual.head"] = np.ascontiguousarray(state["visual_projection.weight"].T)
    for leaf in ("weight", "bias"):
        out[f"visual.pre_norm.{leaf}"] = state[f"{vision}pre_layrnorm.{leaf}"]
        out[f"visual.post_norm.{leaf}"] = state[f"{vision}post_layernorm.{leaf}"]
        for layer in range(SIZES["num_layers"]):
            theirs, ours = f"{vision}encoder.layers.{layer}.", f"visual.transformer.{layer}."
            fused = [state[f"{theirs}self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            out[f"{ours}attn.to_qkv.{leaf}"] = np.concatenate(fused)
            for mine, their in (
                ("attn.proj", "self_attn.out_proj"),
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.0", "mlp.fc1"),
                ("mlp.2", "mlp.fc2"),
            ):
                out[f"{ours}{mine}.{leaf}"] = state[f"{theirs}{their}.{leaf}"]
    return out


def shapes() -> dict[str, tuple[int, ...]]:
    """Of transformers' state dict."""
    from causvid_jax.checkpoints.checkpoint import network_of
    from causvid_jax.config import CLIPConfig

    return dict(network_of(CLIPConfig()).shapes(CLIPConfig(**SIZES), "diffusers"))


def reference(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, pictures, pixels and rows, channels last) of transformers and PyTorch."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from causvid_jax.models.clip_vision import MEAN, STD

    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=SIZES["dim"],
            intermediate_size=SIZES["ffn_dim"],
            projection_dim=SIZES["projection_dim"],
            num_hidden_layers=SIZES["num_layers"],
            num_attention_heads=SIZES["num_heads"],
            image_size=SIZES["image_size"],
            patch_size=SIZES["patch_size"],
            hidden_act="gelu",
        )
    ).eval()
    state = random_weights(script.shapes_of(model), seed)
    script.load(model, state)
    rng = np.random.default_rng(seed)
    arrays, pixels = {}, []
    for index, size in enumerate(PICTURES):
        arrays[f"picture{index}"] = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
        picture = torch.from_numpy(arrays[f"picture{index}"].transpose(0, 3, 1, 2))
        square = (SIZES["image_size"],) * 2
        scaled = torch.nn.functional.interpolate(picture, size=square, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in (MEAN, STD))
        pixels.append((scaled * 0.5 + 0.5 - mean) / std)
    with torch.no_grad():
        rows = model(pixel_values=torch.cat(pixels), output_hidden_states=True).hidden_states[-2]
    return state, arrays | {"pixels": torch.cat(pixels).numpy().transpose(0, 2, 3, 1), "rows": rows.numpy()}


def errors_of(state: dict[str, np.ndarray], arrays: dict[str, np.ndarray], naming: str) -> tuple[float, float]:
    """Largest absolute differences of our pixels and of our rows from the recorded ones."""
    import jax
    import jax.numpy as jnp

    from causvid_jax.checkpoints.checkpoint import load
    from causvid_jax.config import CLIPConfig
    from causvid_jax.models import clip_vision

    config = CLIPConfig(**SIZES)
    params = load(state, config=config)[0]
    scale = jax.jit(lambda x: clip_vision.preprocess(x, config=config))
    pixels = jnp.concatenate([scale(arrays[f"picture{i}"]) for i in range(len(PICTURES))])
    rows = jax.jit(lambda p, x: clip_vision.encode(p, x, config=config))(params, arrays["pixels"])
    return tuple(float(np.abs(a - b).max()) for a, b in ((pixels, arrays["pixels"]), (rows, arrays["rows"])))


def check(seed: int) -> None:
    """Compare live, in both namings."""
    state, arrays = reference(seed)
    assert {name: value.shape for name, value in state.items()} == shapes(), "transformers' names or shapes differ"
    for naming, named in (("diffusers", state), ("original", as_original(state))):
        pixels, rows = errors_of(named, arrays, naming)
        print(f"clip, {naming} names: pixels to {pixels:.1e}, rows to {rows:.1e} of std {arrays['rows'].std():.2f}")
        assert pixels <= 5e-5 and rows <= 1e-4


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED)[1], check)
