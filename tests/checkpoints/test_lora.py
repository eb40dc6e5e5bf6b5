"""LoRA files of every naming merged at a strength, against peft's merge and NumPy; refusals by name."""

import dataclasses
import json

import jax
import make_lora
import ml_dtypes
import numpy as np
import pytest

from causvid_jax.checkpoints import load, lora, open_checkpoint, state_dict
from causvid_jax.checkpoints import save as save_checkpoint
from causvid_jax.config import ConfigError
from tests.refusals import refused

RANK = 3
# Targets under the three ways to name them.
TARGETS = {
    "blocks.1.self_attn.v": ("blocks.1.attn1.to_v", "blocks_1_self_attn_v"),
    "blocks.2.cross_attn.o": ("blocks.2.attn2.to_out.0", "blocks_2_cross_attn_o"),
    "blocks.0.ffn.2": ("blocks.0.ffn.net.2", "blocks_0_ffn_2"),
    "head.head": ("proj_out", "head_head"),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1", "text_embedding_0"),
    "patch_embedding": ("patch_embedding", "patch_embedding"),
}


@pytest.fixture(scope="module")
def factors(states):
    rng = np.random.default_rng(3)
    found = {}
    for module in TARGETS:
        shape = states["original"][f"{module}.weight"].shape
        # A convolution's factors are convolutions.
        down, up = (RANK, *shape[1:]), (shape[0], RANK, *(1,) * (len(shape) - 2))
        found[module] = rng.standard_normal(down).astype(np.float32), rng.standard_normal(up).astype(np.float32)
    return found


def expected(states, factors, scale):
    merged = dict(states["original"])
    for module, (down, up) in factors.items():
        name = f"{module}.weight"
        delta = np.einsum("or,r...->o...", up.reshape(len(up), RANK).astype(np.float64), down.astype(np.float64))
        merged[name] = merged[name] + scale * delta
    return merged


def merge(states, config, loras):
    """Return the merged state dict in original names, in the types of ``states``."""
    dtype = next(iter(states["original"].values())).dtype.name
    return state_dict(load(states["original"], config=config, dtype=None, updates=loras)[0], config, "original", dtype)


def named(factors, style):
    """The LoRA's state dict under one of the published styles."""
    state = {}
    for module, (down, up) in factors.items():
        diffusers, kohya = TARGETS[module]
        name, first, second = {
            "original": (f"diffusion_model.{module}", "lora_down", "lora_up"),
            "original peft": (f"base_model.model.{module}", "lora_A.default", "lora_B.default"),
            "diffusers": (f"transformer.{diffusers}", "lora_A", "lora_B"),
            "kohya": (f"lora_unet_{kohya}", "lora_down", "lora_up"),
            "videox": (f"lora_unet__{kohya}", "lora_down", "lora_up"),
            "diffsynth": (f"pipe.dit.{module}", "lora_A.default", "lora_B.default"),
        }[style]
        state |= {f"{name}.{first}.weight": down, f"{name}.{second}.weight": up}
        if style in ("kohya", "original"):
            state[f"{name}.alpha"] = np.array(1.5, np.float32)
    return state


@pytest.mark.parametrize("style", ["original", "original peft", "diffusers", "kohya", "videox", "diffsynth"])
def test_every_naming_merges_alike(tmp_path, save, states, tiny, factors, style):
    path = save(tmp_path / "lora.safetensors", named(factors, style))
    opened = lora.open_lora(path, 0.8, tiny)
    merged = merge(states, tiny, [opened])
    alpha = 1.5 if style in ("kohya", "original") else RANK
    for name, value in expected(states, factors, 0.8 * alpha / RANK).items():
        if name.removesuffix(".weight") in factors:
            np.testing.assert_allclose(merged[name], value, atol=2e-5)
        else:
            np.testing.assert_array_equal(merged[name], states["original"][name])


def test_peft_merges_the_same():
    """The golden: peft and diffusers, alpha from adapter_config.json."""
    with np.load(make_lora.GOLDEN) as file:
        recorded = dict(file)
    assert sum(name.startswith("merged/") for name in recorded) == 2 + 2 * 4
    assert make_lora.error_of(recorded, make_lora.SEED) <= 1e-5


def test_strength_zero_changes_nothing_and_two_add_up(tmp_path, save, states, tiny, factors):
    path = save(tmp_path / "lora.safetensors", named(factors, "diffusers"))
    none, once = lora.open_lora(path, 0.0, tiny), lora.open_lora(path, 0.5, tiny)
    untouched = merge(states, tiny, [none])
    assert all(np.array_equal(untouched[name], value) for name, value in states["original"].items())
    twice = merge(states, tiny, [once, once])
    for name, value in expected(states, factors, 1.0).items():
        np.testing.assert_allclose(twice[name], value, atol=2e-5)


def test_an_identity_depends_on_content_strength_and_layers_not_on_the_name(tmp_path, save, states, tiny, factors):
    base = open_checkpoint(states["original"], tiny)
    doubled = {module: (down, 2 * up) for module, (down, up) in factors.items()}
    first, second, copy = (
        save(tmp_path / folder / "lora.safetensors", named(some, "original"))
        for folder, some in (("a", factors), ("b", doubled), ("c", factors))
    )
    loras = [lora.open_lora(first, 1.0, tiny), lora.open_lora(second, 1.0, tiny), lora.open_lora(first, 0.5, tiny)]
    loras.append(lora.open_lora(first, 1.0, tiny, layers={0}))
    identities = [dataclasses.replace(base, updates=(one,)).identity() for one in loras]
    assert len({base.identity(), *identities}) == 5
    again = dataclasses.replace(base, updates=(lora.open_lora(copy, 1.0, tiny),))
    assert again.identity() == identities[0]


def test_only_chosen_layers(tmp_path, save, states, tiny, factors):
    path = save(tmp_path / "lora.safetensors", named(factors, "original"))
    merged = merge(states, tiny, [lora.open_lora(path, 1.0, tiny, layers={0, 1})])
    changed = {name for name, value in states["original"].items() if not np.array_equal(merged[name], value)}
    assert changed == {"blocks.1.self_attn.v.weight", "blocks.0.ffn.2.weight"}
    refused(r"LoRA layers \[7\] do not exist; accepted: 0 to 2", lora.open_lora, path, 1.0, tiny, layers={0, 7})


def test_whole_differences_and_biases(tmp_path, save, states, tiny):
    rng = np.random.default_rng(5)
    draw = lambda name: rng.standard_normal(states["original"][name].shape).astype(np.float32)  # noqa: E731
    differences = {
        "blocks.0.norm3.weight": ("diffusion_model.blocks.0.norm3.diff", draw("blocks.0.norm3.weight")),
        "blocks.0.norm3.bias": ("diffusion_model.blocks.0.norm3.diff_b", draw("blocks.0.norm3.bias")),
        "blocks.2.ffn.0.bias": ("diffusion_model.blocks.2.ffn.0.diff_b", draw("blocks.2.ffn.0.bias")),
        "head.head.weight": ("diffusion_model.head.head.diff", draw("head.head.weight")),
    }
    path = save(tmp_path / "lora.safetensors", dict(differences.values()))
    merged = merge(states, tiny, [lora.open_lora(path, -0.5, tiny)])
    for name, value in states["original"].items():
        delta = -0.5 * differences[name][1] if name in differences else 0
        np.testing.assert_allclose(merged[name], value + delta, atol=1e-6)


def test_half_precision_rounds_once(tmp_path, save, tiny, half_params, factors):
    """W + delta in float32, rounded to W's type; not the rounded delta added in it."""
    state = {"original": state_dict(half_params, tiny, "original")}
    path = save(tmp_path / "lora.safetensors", named(factors, "diffusers"))
    merged = merge(state, tiny, [lora.open_lora(path, 0.3, tiny)])
    wide = {"original": {name: value.astype(np.float64) for name, value in state["original"].items()}}
    for name, value in expected(wide, factors, np.float32(0.3)).items():
        assert merged[name].dtype == ml_dtypes.bfloat16
        error = np.abs(merged[name].astype(np.float64) - value)
        assert (error <= 2.0**-8 * (1 + 1e-3) * np.abs(value) + 1e-6).all()


def test_alpha_beside_the_weights(tmp_path, save, states, tiny, factors):
    state = named(factors, "diffusers")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": RANK})}
    told = save(tmp_path / "told.safetensors", state, metadata)
    folder = save(tmp_path / "peft" / "adapter_model.safetensors", state).parent
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": RANK, "use_rslora": True}))
    for path, scale in ((told, 6 / RANK), (folder, 6 / RANK**0.5)):
        merged = merge(states, tiny, [lora.open_lora(path, 1.0, tiny)])
        for name, value in expected(states, factors, scale).items():
            np.testing.assert_allclose(merged[name], value, atol=5e-5)
    (folder / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {"to_q": 3}}))
    refused("has a alpha_pattern, which is not read", lora.open_lora, folder, 1.0, tiny)


def test_refusals(tmp_path, save, tiny, factors, vae_states):
    good = named(factors, "diffusers")

    def refuse(state, sentence):
        with pytest.raises(ConfigError, match=sentence) as caught:
            lora.open_lora(save(tmp_path / "bad.safetensors", state), 1.0, tiny)
        assert "\n" not in str(caught.value)

    some = np.zeros((RANK, 24), np.float32)
    unknown = {f"transformer.blocks.0.attn2.add_k_proj.{f}.weight": some for f in ("lora_A", "lora_B")}
    beyond = {f"diffusion_model.blocks.9.ffn.0.{f}.weight": some for f in ("lora_A", "lora_B")}
    refuse(
        good | unknown, r"has 2 target\(s\) that this transformer .* does not have: blocks.0.attn2.add_k_proj|transf"
    )
    refuse(good | beyond, r"does not have: blocks.9.ffn.0.lora_A.weight")
    refuse({"transformer.proj_out.lora_A.weight": some}, "target head.head of LoRA .* has one of its two factors only")
    pair = {"transformer.proj_out.lora_A.weight": some, "transformer.proj_out.lora_B.weight": some}
    refuse(pair, r"has factors of shapes \(3, 24\) and \(3, 24\); a weight of \(16, 24\) needs \(16, r\) and \(r, 24\)")
    refuse({"transformer.proj_out.diff": some}, r"has a difference of shape \(3, 24\); the parameter's is \(16, 24\)")
    refuse(good | {"transformer.proj_out.lora_magnitude_vector": some}, "is a DoRA, which is not a product")
    refuse(
        good | {"transformer.proj_out.lokr_w1": some},
        "is a LoKr, which is not a product of two factors; accepted: LoRA",
    )
    refuse(good | {"transformer.proj_out.hada_w1_a": some}, "is a LoHa")
    refused("strength of LoRA .* is nan", lora.open_lora, tmp_path / "bad.safetensors", float("nan"), tiny)


def test_into_a_file_of_our_own_format(tmp_path, save, states, tiny, factors):
    opened = lora.open_lora(save(tmp_path / "lora.safetensors", named(factors, "kohya")), 2.0, tiny)
    base = dataclasses.replace(open_checkpoint(states["original"], tiny), updates=(opened,))
    save_checkpoint(base, tmp_path / "ours.safetensors")
    assert open_checkpoint(tmp_path / "ours.safetensors").source.metadata["merged"] == "2 x lora.safetensors"
    params, _ = load(tmp_path / "ours.safetensors", config=tiny)
    merged, _ = load(expected(states, factors, 2.0 * 1.5 / RANK), config=tiny)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), params, merged)


def test_the_modulation_of_a_block(tmp_path, save, states, tiny):
    change = np.full((1, 6, 24), 0.1, np.float32)
    for target in ("diffusion_model.blocks.0.diff_m", "blocks.0.modulation.diff", "blocks.0.scale_shift_table.diff"):
        path = save(tmp_path / "lora.safetensors", {target: change})
        merged = merge(states, tiny, [lora.open_lora(path, 0.5, tiny)])
        changed = {name for name, value in states["original"].items() if not np.array_equal(merged[name], value)}
        assert changed == {"blocks.0.modulation"}
        difference = merged["blocks.0.modulation"] - states["original"]["blocks.0.modulation"]
        np.testing.assert_allclose(difference, 0.05, atol=1e-6)


def test_targets_of_an_image_branch_on_a_model_without_one(tmp_path, save, states, tiny, factors):
    some = np.zeros((RANK, 24), np.float32)
    foreign = {f"diffusion_model.blocks.0.cross_attn.k_img.{f}.weight": some for f in ("lora_down", "lora_up")}
    path = save(tmp_path / "lora.safetensors", named(factors, "original") | foreign)
    with pytest.raises(ConfigError, match="does not have: blocks.0.cross_attn.k_img.* --skip_foreign leaves them out"):
        lora.open_lora(path, 1.0, tiny)
    opened = lora.open_lora(path, 1.0, tiny, skip_foreign=True)
    assert len(opened.skipped) == 2 and len(opened.updates) == len(TARGETS)
    with pytest.raises(ConfigError, match="--skip_foreign"):
        lora.open_lora(save(tmp_path / "lora.safetensors", foreign), 1.0, tiny, skip_foreign=True)
