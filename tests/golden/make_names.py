"""Writes names.json: names and shapes of the full-size published models, by diffusers. Needs the ``parity`` extra.

``python tests/golden/make_names.py`` writes the file; ``--check`` compares the one that is there. Layers that are alike
are written once, with ``{}`` for their number and how many there are. Original names are checked by diffusers' own
conversion: it must turn them into its names.
"""

import argparse
import json
import pathlib
import re
import tempfile

GOLDEN = pathlib.Path(__file__).with_name("names.json")
SIZES = {"1.3B": (12, 8960, 30), "14B": (40, 13824, 40)}
Shapes = dict[str, tuple[int, ...]]


def collapse(shapes: Shapes) -> dict[str, list]:
    """{name with {}: [shape, number of layers, 0 outside of them]}; refuses layers that differ."""
    collapsed: dict[str, list] = {}
    for name, shape in shapes.items():
        found = re.match(r"blocks\.(\d+)\.", name)
        key = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
        entry = collapsed.setdefault(key, [list(shape), 0])
        assert entry[0] == list(shape), f"layers differ in {key}"
        entry[1] += 1 if found else 0
    return collapsed


def reference() -> dict[str, dict]:
    """Both namings of every published model that we read."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

    from causvid_jax.config import TransformerConfig, VAEConfig
    from causvid_jax.weights import layouts

    def shapes_of(state) -> Shapes:
        return {name: tuple(value.shape) for name, value in state.items()}

    def meta(shapes: Shapes):
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    golden = {}
    with torch.device("meta"):
        for size, (heads, ffn, layers) in SIZES.items():
            model = WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers)
            config = TransformerConfig(dim=128 * heads, ffn_dim=ffn, num_heads=heads, num_layers=layers)
            original = layouts.TRANSFORMER.shapes(config, "original")
            assert shapes_of(convert_wan_transformer_to_diffusers(meta(original))) == shapes_of(model.state_dict())
            golden[f"{size} diffusers"] = collapse(shapes_of(model.state_dict()))
            golden[f"{size} original"] = collapse(original)
        coder = shapes_of(AutoencoderKLWan().state_dict())
    original = layouts.VAE.shapes(VAEConfig(), "original")
    assert shapes_of(convert_wan_vae_to_diffusers(meta(original))) == coder
    golden["VAE diffusers"], golden["VAE original"] = collapse(coder), collapse(original)
    return golden


def check_loading() -> None:
    """diffusers must load the folders that we export: shards, an index and a config, and give the same weights."""
    import jax
    import numpy as np
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from causvid_jax.config import TransformerConfig, VAEConfig
    from causvid_jax.models import transformer, vae
    from causvid_jax.weights import convert, sources, store, wan_transformer, wan_vae

    sizes = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "in_channels": 4, "out_channels": 4}
    config, coder = TransformerConfig(**sizes, text_dim=10, freq_dim=8), VAEConfig(base_dim=4, z_dim=2)
    rng = np.random.default_rng(0)
    for model, tree, export in (
        (
            WanTransformer3DModel,
            transformer.abstract(config),
            lambda p: wan_transformer.to_published(p, config, "diffusers"),
        ),
        (AutoencoderKLWan, vae.abstract(coder), lambda p: wan_vae.to_diffusers(p, coder)),
    ):
        params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tree)
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder)
            store.save_params(
                place / "ours.safetensors", params, {"latent_mean": "[1.0, 2.0]", "latent_std": "[3.0, 4.0]"}
            )
            plan = convert.plan(sources.open_source(place / "ours.safetensors"), "diffusers", num_heads=2)
            convert.run({"": plan}, place / "out", shard_bytes=60_000)
            loaded, info = model.from_pretrained(place / "out", output_loading_info=True)
        assert not any(info.values()), info
        state, expected = loaded.state_dict(), export(params)
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[name].numpy(), value) for name, value in expected.items())
    assert (loaded.config.latents_mean, loaded.config.latents_std) == ([1.0, 2.0], [3.0, 4.0])


def as_text(golden: dict[str, dict]) -> str:
    """JSON with a tensor per line, sorted."""
    parts = []
    for model, tensors in golden.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(tensors.items()))
        parts.append(f" {json.dumps(model)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare live instead of writing the file")
    text = as_text(reference())
    if parser.parse_args().check:
        assert text == GOLDEN.read_text(), f"diffusers' names are no longer those of {GOLDEN.name}"
        check_loading()
        print(f"names: as diffusers has them, {text.count('[[')} different tensors; it loads what we export")
    else:
        GOLDEN.write_text(text)
        print(f"wrote {GOLDEN} ({GOLDEN.stat().st_size} bytes)")
