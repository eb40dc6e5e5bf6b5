"""Writes lora.npz: a LoRA merged into a small transformer by peft. Needs the ``parity`` extra and peft.

``python tests/golden/make_lora.py`` writes the file; ``--check`` draws new weights and compares there and then, and has
diffusers translate the original names of a LoRA. The file holds the LoRA under peft's names (``lora/...``) and the
merged weights (``merged/...``); :func:`make_transformer.random_weights` draws the transformer again.
"""

import pathlib
import tempfile

import numpy as np
import script
from make_transformer import random_weights

GOLDEN = pathlib.Path(__file__).with_name("lora.npz")
SEED, RANK, ALPHA, STRENGTH = 11, 3, 5.0, 0.7
SIZES = {
    "dim": 24,
    "ffn_dim": 40,
    "num_heads": 2,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 8,
}
TARGETS = ("attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj", "patch_embedding")


def reference(seed: int) -> dict[str, np.ndarray]:
    """The LoRA under peft's names, and every weight that it changed, under diffusers'."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = script.diffusers_transformer(SIZES)
    state = random_weights(script.shapes_of(model), seed)
    script.load(model, state)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32))
    arrays = {f"lora/{name}": value.numpy().copy() for name, value in get_peft_model_state_dict(model).items()}
    model.fuse_lora(lora_scale=STRENGTH)
    for name, value in model.state_dict().items():
        if ".base_layer." in name and name.endswith("weight"):
            arrays[f"merged/{name.replace('.base_layer', '')}"] = value.numpy().copy()
    return arrays


def error_of(arrays: dict[str, np.ndarray], seed: int) -> float:
    """Largest difference of our merged weights from the recorded ones; every other weight must be untouched."""
    import safetensors.numpy

    from causvid_jax.checkpoints import load, lora, state_dict
    from causvid_jax.checkpoints.wan_transformer import NETWORK
    from causvid_jax.config import TransformerConfig

    config = TransformerConfig(**SIZES)
    state = random_weights(NETWORK.shapes(config, "diffusers"), seed)
    updates = {name.removeprefix("lora/"): value for name, value in arrays.items() if name.startswith("lora/")}
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        safetensors.numpy.save_file(state, place / "base.safetensors")
        (place / "lora").mkdir()
        safetensors.numpy.save_file(updates, place / "lora" / "adapter_model.safetensors")
        (place / "lora" / "adapter_config.json").write_text(f'{{"lora_alpha": {ALPHA}, "r": {RANK}}}')
        opened = lora.open_lora(place / "lora", STRENGTH, config)
        tree, _ = load(place / "base.safetensors", config=config, updates=(opened,))
    ours = state_dict(tree, config, "diffusers")
    merged = {name.removeprefix("merged/"): value for name, value in arrays.items() if name.startswith("merged/")}
    assert all(np.array_equal(ours[name], state[name]) for name in state.keys() - merged.keys())
    return max(float(np.abs(ours[name] - value).max()) for name, value in merged.items())


def check(seed: int) -> None:
    """Compare live, and our reading of original names with diffusers' translation of them."""
    import torch
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    from causvid_jax.checkpoints import lora
    from causvid_jax.checkpoints.wan_transformer import NETWORK
    from causvid_jax.config import TransformerConfig

    config = TransformerConfig(**SIZES)
    state, names = {}, []
    pairs = zip(NETWORK.rows(config, "original"), NETWORK.rows(config, "diffusers"), strict=True)
    for name, diffusers in ((first.key, second.key) for first, second in pairs):
        shape = NETWORK.shapes(config, "original")[name]
        if name.endswith(".weight") and len(shape) == 2:
            module = name.removesuffix(".weight")
            state[f"diffusion_model.{module}.lora_A.weight"] = torch.zeros(RANK, shape[1])
            state[f"diffusion_model.{module}.lora_B.weight"] = torch.zeros(shape[0], RANK)
            names.append((diffusers.removesuffix(".weight"), module))
    converted = _convert_non_diffusers_wan_lora_to_diffusers(dict(state))
    modules = {name.removeprefix("transformer.").partition(".lora_")[0] for name in converted}
    assert modules == {diffusers for diffusers, _ in names}, "targets disagree with diffusers' translation"
    aliases = lora._aliases(config)
    assert all(aliases[diffusers] == original for diffusers, original in names)
    arrays = reference(seed)
    error = error_of(arrays, seed)
    print(f"lora: max |merged - peft| = {error:.1e} in {sum(n.startswith('merged/') for n in arrays)} weights")
    assert error <= 1e-5


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED), check)
