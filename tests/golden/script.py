"""What the scripts of this folder share: their command line, and diffusers' transformer with given weights."""

import argparse
import pathlib
import secrets
from collections.abc import Callable

import numpy as np


def main(
    what: str | None, golden: pathlib.Path, draw: Callable[[], dict[str, np.ndarray]], check: Callable[[int], None]
) -> None:
    """Write what ``draw`` makes to ``golden``, or with ``--check`` call ``check`` on a new seed."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--check", action="store_true", help="compare live instead of writing the file")
    if parser.parse_args().check:
        check(secrets.randbelow(2**31))
    else:
        np.savez_compressed(golden, **draw())
        print(f"wrote {golden} ({golden.stat().st_size} bytes)")


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
