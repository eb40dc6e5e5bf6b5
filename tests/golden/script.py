"""What the scripts of this folder share: their command line, random weights, and diffusers' transformer and names."""

import argparse
import pathlib
import secrets
import zlib
from collections.abc import Callable

import numpy as np


def main(
    what: str | None, golden: pathlib.Path, draw: Callable[[], dict[str, np.ndarray]], check: Callable[[int], None]
) -> None:
    """Write what ``draw`` makes to ``golden``, or with ``--check`` call ``check`` on a new seed."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--check", action="store_true", help="compare live instead of writing the file")
    if parser.parse_args().check:
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        check(secrets.randbelow(2**31))
    else:
        np.savez_compressed(golden, **draw())
        print(f"wrote {golden} ({golden.stat().st_size} bytes)")


def draw(
    shapes: dict[str, tuple[int, ...]], seed: int, spread: Callable[[str, np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """Every parameter random, by name; ``spread(name, normal draw)`` scales it."""
    state = {}
    for name, shape in shapes.items():
        normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
        state[name] = spread(name, normal).astype(np.float32)
    return state


def diffusers_transformer(sizes: dict[str, int]):
    """``WanTransformer3DModel`` of ``sizes`` (fields of ``TransformerConfig``), image branch included."""
    from diffusers import WanTransformer3DModel

    branch = {"image_dim": sizes["image_dim"], "added_kv_proj_dim": sizes["dim"]} if "image_dim" in sizes else {}
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"],
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_channels"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes.get("freq_dim", 256),
        ffn_dim=sizes["ffn_dim"],
        num_layers=sizes["num_layers"],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        **branch,
    ).eval()


def load(model, state: dict[str, np.ndarray]) -> None:
    """Load a numpy state dict into a PyTorch module."""
    import torch

    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of a PyTorch module's state dict."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def velocity_error(sizes: dict[str, int], state: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> float:
    """Largest absolute difference of the JAX transformer's velocity from the recorded one."""
    import jax
    import jax.numpy as jnp

    from causvid_jax.checkpoints import load
    from causvid_jax.config import TransformerConfig
    from causvid_jax.models import transformer

    config = TransformerConfig(**sizes)
    params = load(state, config=config)[0]
    timestep = jnp.repeat(jnp.asarray(arrays["timestep"])[:, None], arrays["x"].shape[1], axis=1)
    forward = jax.jit(lambda p, *inputs: transformer.bidirectional(p, *inputs, config=config))
    inputs = arrays["x"], timestep, *(arrays[name] for name in ("text", "image") if name in arrays)
    return float(np.abs(forward(params, *inputs) - arrays["velocity"]).max())


def convert_and_compare(convert: Callable, state: dict[str, np.ndarray], config):
    """Return our parameters of a diffusers ``state``; diffusers must ``convert`` our original names back to it."""
    from causvid_jax.checkpoints import load, state_dict

    params = load(state, config=config)[0]
    converted = convert(state_dict(params, config, "original"))
    assert converted.keys() == state.keys(), "original names disagree with diffusers' conversion"
    assert all(np.array_equal(converted[name], state[name]) for name in state), "a weight changed in conversion"
    return params
