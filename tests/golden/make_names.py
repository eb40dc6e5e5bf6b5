"""Writes names.json: names and shapes of the full-size published models, by diffusers. Needs the ``parity`` extra.

``python tests/golden/make_names.py`` writes the file; ``--check`` compares the one that is there. Layers that are alike
are written once, with ``{}`` for their number and how many there are. Original names are those of the published
definitions (``wan_definitions.py``), and diffusers' own conversion must turn them into its names.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import tempfile

import wan_definitions

GOLDEN = pathlib.Path(__file__).with_name("names.json")
SIZES = {"1.3B": (12, 8960, 30), "14B": (40, 13824, 40), "I2V-14B": (40, 13824, 40)}
LAYER = re.compile(r"(^|.*?\.)(blocks|block|layers)\.\d+\.")
Shapes = dict[str, tuple[int, ...]]


def collapse(shapes: Shapes) -> dict[str, list]:
    """{name with {}: [shape, number of layers, 0 outside of them]}; refuses layers that differ."""
    collapsed: dict[str, list] = {}
    for name, shape in shapes.items():
        found = LAYER.match(name)
        key = f"{found[1]}{found[2]}.{{}}.{name[found.end() :]}" if found else name
        entry = collapsed.setdefault(key, [list(shape), 0])
        assert entry[0] == list(shape), f"layers differ in {key}"
        entry[1] += 1 if found else 0
    return collapsed


def original_transformer(size: str) -> Shapes:
    """Original names and shapes of the transformer of ``size``, a key of SIZES."""
    heads, ffn, layers = SIZES[size]
    image = {"in_channels": 36, "image_dim": 1280} if size.startswith("I2V") else {}
    return wan_definitions.transformer(dim=128 * heads, ffn_dim=ffn, num_layers=layers, **image)


def reference() -> dict[str, dict]:
    """Both namings of every published model that we read."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

    from causvid_jax.checkpoints import clip_vision, umt5
    from causvid_jax.config import CLIPConfig
    from causvid_jax.config import UMT5Config as TextEncoder

    def shapes_of(state) -> Shapes:
        return {name: tuple(value.shape) for name, value in state.items()}

    def meta(shapes: Shapes):
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    golden = {}
    with torch.device("meta"):
        for size, (heads, ffn, layers) in SIZES.items():
            image = size.startswith("I2V")
            model = WanTransformer3DModel(
                num_attention_heads=heads,
                ffn_dim=ffn,
                num_layers=layers,
                **({"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128 * heads} if image else {}),
            )
            original = original_transformer(size)
            assert shapes_of(convert_wan_transformer_to_diffusers(meta(original))) == shapes_of(model.state_dict())
            golden[f"{size} diffusers"] = collapse(shapes_of(model.state_dict()))
            golden[f"{size} original"] = collapse(original)
        coder = shapes_of(AutoencoderKLWan().state_dict())
        described = {"dense_act_fn": "gelu_new", **umt5.NETWORK.to_json(TextEncoder(), "diffusers")}
        text = shapes_of(UMT5EncoderModel(UMT5Config(**described)).state_dict())
        described = clip_vision.NETWORK.to_json(CLIPConfig(), "diffusers")
        image = shapes_of(CLIPVisionModelWithProjection(CLIPVisionConfig(**described)).state_dict())
    # A file holds the shared embedding once.
    golden["umT5-XXL diffusers"] = collapse({n: s for n, s in text.items() if n != "encoder.embed_tokens.weight"})
    golden["CLIP ViT-H/14 diffusers"] = collapse({n: s for n, s in image.items() if not n.endswith("position_ids")})
    original = wan_definitions.vae()
    assert shapes_of(convert_wan_vae_to_diffusers(meta(original))) == coder
    golden["VAE diffusers"], golden["VAE original"] = collapse(coder), collapse(original)
    return golden


def check_loading() -> None:
    """diffusers must load the folders that we export: shards, an index and a config, and give the same weights."""
    import jax
    import numpy as np
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionModelWithProjection, UMT5EncoderModel

    from causvid_jax.checkpoints import open_checkpoint, save, state_dict
    from causvid_jax.config import CLIPConfig, TransformerConfig, UMT5Config, VAEConfig
    from causvid_jax.models import clip_vision, transformer, umt5, vae

    sizes = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "in_channels": 4, "out_channels": 4}
    config = TransformerConfig(**sizes, text_dim=10, freq_dim=8)
    coder = VAEConfig(base_dim=4, z_dim=2, latent_mean=(1.0, 2.0), latent_std=(3.0, 4.0))
    video = dataclasses.replace(config, image_dim=6, in_channels=12)
    text = UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3)
    image = CLIPConfig(image_size=8, patch_size=4, dim=80, ffn_dim=6, num_heads=1, num_layers=2, projection_dim=3)
    rng = np.random.default_rng(0)
    for model, tree, sizes in (
        (WanTransformer3DModel, transformer.abstract(config), config),
        (WanTransformer3DModel, transformer.abstract(video), video),
        (UMT5EncoderModel, umt5.abstract(text), text),
        (CLIPVisionModelWithProjection, clip_vision.abstract(image), image),
        (AutoencoderKLWan, vae.abstract(coder), coder),
    ):
        params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tree)
        with tempfile.TemporaryDirectory() as folder:
            save(open_checkpoint(params, sizes), pathlib.Path(folder) / "out", "diffusers", shard_bytes=60_000)
            loaded, info = model.from_pretrained(pathlib.Path(folder) / "out", output_loading_info=True)
        assert not any(info.values()), info
        state = {name: value for name, value in loaded.state_dict().items() if name != "encoder.embed_tokens.weight"}
        expected = state_dict(params, sizes, "diffusers")
        assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
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
