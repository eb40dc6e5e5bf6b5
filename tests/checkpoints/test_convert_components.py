"""The text encoder, the image encoder, the tiny codec and the image-to-video transformer, between their layouts."""

import importlib.util
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from causvid_jax.checkpoints import convert, layouts, sources, store, wan_transformer
from causvid_jax.checkpoints import taehv as taehv_weights
from causvid_jax.checkpoints import umt5 as umt5_weights
from causvid_jax.config import CLIPConfig, ConfigError, TAEHVConfig, TransformerConfig, UMT5Config

sys.path.append("tests/golden")
import make_clip

TEXT = UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3)
# Heads as wide as the published ones, since the original file does not tell how many they are.
IMAGE = CLIPConfig(**{**make_clip.SIZES, "dim": 160, "num_heads": 2})
CODEC = TAEHVConfig(z_dim=4, encoder_dim=10, decoder_dims=(14, 12, 8, 6))
VIDEO = TransformerConfig(
    dim=128,
    ffn_dim=10,
    num_heads=1,
    num_layers=2,
    in_channels=12,
    out_channels=4,
    text_dim=10,
    freq_dim=8,
    image_dim=6,
)
CONFIGS = {"umt5": TEXT, "clip": IMAGE, "taehv": CODEC, "i2v": VIDEO}
TIED = "encoder.embed_tokens.weight"


def random_tree(config, dtype, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(dtype)  # noqa: E731
    return jax.tree.map(draw, layouts.network_of(config).abstract(config))


def published(name, dtype=np.float32):
    """(tree, {naming: state dict}) by functions that convert whole trees in memory, or tensor by tensor."""
    config = CONFIGS[name]
    tree = random_tree(config, dtype)
    if name == "umt5":
        namings = (("original", "original"), ("diffusers", "transformers"))
        return tree, {naming: umt5_weights.to_published(tree, config, theirs) for naming, theirs in namings}
    if name == "taehv":
        return tree, {"original": dict(taehv_weights.to_published(tree, config))}
    if name == "i2v":
        return tree, {n: dict(wan_transformer.to_published(tree, config, n)) for n in ("original", "diffusers")}
    shapes = layouts.CLIP.shapes(config, "diffusers")
    rng = np.random.default_rng(0)
    state = {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}
    states = {"diffusers": state, "original": make_clip.as_original(state)}
    return layouts.CLIP.tree(state, config, "diffusers"), states


def arrays(path):
    out = {}
    for name, tensor in sources.open_source(path).tensors.items():
        with tensor.view() as view:
            out[name] = np.array(view)
    return out


def assert_states(have, want):
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert have[name].dtype == value.dtype and have[name].shape == value.shape, name
        np.testing.assert_array_equal(have[name].view(np.uint8), np.ascontiguousarray(value).view(np.uint8))


def run(path, output, naming, **options):
    plan = convert.plan(sources.open_source(path), naming, **options)
    convert.run({"": plan}, output)
    return plan


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_bit_exact(tmp_path, save, name, dtype, monkeypatch):
    # Parts far smaller than any kernel: what is written must not depend on them.
    monkeypatch.setattr(convert, "PART_BYTES", 100)
    tree, states = published(name, dtype)
    for naming, state in states.items():
        path = save(tmp_path / f"{naming}.safetensors", state)
        plan = run(path, tmp_path / "ours.safetensors", "causvid_jax")
        assert (plan.match.naming, plan.match.config) == (naming, CONFIGS[name])
        loaded, metadata = store.load_params(tmp_path / "ours.safetensors", dtype=None)
        jax.tree.map(np.testing.assert_array_equal, loaded, tree)
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(dtype)}
        assert metadata["component"] == plan.match.network.component
        for to, expected in states.items():
            run(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", to)
            assert_states(arrays(tmp_path / "back.safetensors"), expected)
            run(path, tmp_path / "across.safetensors", to)
            assert_states(arrays(tmp_path / "across.safetensors"), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_straight_into_arrays(tmp_path, save, name):
    tree, states = published(name)
    for naming, state in states.items():
        path = save(tmp_path / f"{naming}.safetensors", state)
        jax.tree.map(np.testing.assert_array_equal, convert.load_published(path, CONFIGS[name]), tree)


def test_the_tied_embedding_is_dropped_or_taken_and_must_be_equal(tmp_path, save):
    tree, states = published("umt5")
    state = states["diffusers"]
    both = state | {TIED: state["shared.weight"].copy()}
    for accepted in (both, {name: value for name, value in both.items() if name != "shared.weight"}):
        run(save(tmp_path / "in.safetensors", accepted), tmp_path / "out.safetensors", "causvid_jax")
        jax.tree.map(np.testing.assert_array_equal, store.load_params(tmp_path / "out.safetensors")[0], tree)
    path = save(tmp_path / "in.safetensors", both | {TIED: -both[TIED]})
    with pytest.raises(ConfigError, match="in.safetensors holds two different tensors shared.weight"):
        run(path, tmp_path / "new.safetensors", "causvid_jax")
    with pytest.raises(ConfigError, match="in.safetensors holds two different tensors shared.weight"):
        convert.load_published(path, TEXT)
    assert not (tmp_path / "new.safetensors").exists()


def test_what_nothing_reads_is_left_out_and_said(tmp_path, save):
    tree, states = published("clip")
    extra = {"log_scale": np.array(1, np.float32), "textual.head.0.weight": np.ones((2, 3), np.float32)}
    path = save(tmp_path / "in.safetensors", states["original"] | extra)
    plan = run(path, tmp_path / "out.safetensors", "causvid_jax")
    assert ", without 2 tensors that nothing reads: CLIP image encoder of 3 layers" in str(plan)
    jax.tree.map(np.testing.assert_array_equal, store.load_params(tmp_path / "out.safetensors")[0], tree)
    video, states = published("i2v")
    unread = {f"blocks.{i}.attn2.norm_added_q.weight": np.ones(128, np.float32) for i in range(2)}
    run(save(tmp_path / "in.safetensors", states["diffusers"] | unread), tmp_path / "out.safetensors", "causvid_jax")
    jax.tree.map(np.testing.assert_array_equal, store.load_params(tmp_path / "out.safetensors")[0], video)


def test_a_codec_without_names_in_diffusers(tmp_path, save):
    path = save(tmp_path / "taew2_1.safetensors", published("taehv")[1]["original"])
    with pytest.raises(ConfigError, match="--to is 'diffusers', but .*TAEHV of .*; accepted: original, causvid_jax"):
        run(path, tmp_path / "x.safetensors", "diffusers")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_file_is_reported(tmp_path, save, name):
    for naming, state in published(name)[1].items():
        first = sorted(state)[0]
        bad = {n: v for n, v in state.items() if n != first} | {"extra": np.zeros(3, np.float32)}
        path = save(tmp_path / "bad.safetensors", bad)
        with pytest.raises(ConfigError) as caught:
            run(path, tmp_path / "x.safetensors", "causvid_jax")
        said = str(caught.value)
        closest = f"the closest layout is {layouts.describe(CONFIGS[name])}, {naming} names: missing: {first}; "
        assert closest in said and "unexpected: extra" in said
        assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("name,stem", [("umt5", "model"), ("clip", "model"), ("i2v", "diffusion_pytorch_model")])
def test_published_folders_have_the_files_that_their_readers_look_for(tmp_path, save, name, stem):
    """Shards, an index and a config.json that tells the sizes again."""
    state = published(name)[1]["diffusers"]
    path = save(tmp_path / "in.safetensors", state)
    plan = convert.plan(sources.open_source(path), "diffusers")
    convert.run({"": plan}, tmp_path / "out", shard_bytes=max(v.nbytes for v in state.values()))
    assert (tmp_path / "out" / f"{stem}.safetensors.index.json").is_file()
    assert_states(arrays(tmp_path / "out"), state)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    if name == "i2v":
        assert (described["image_dim"], described["added_kv_proj_dim"], described["in_channels"]) == (6, 128, 12)
    assert layouts.detect(sources.open_source(tmp_path / "out")).config == CONFIGS[name]


def test_memory_is_one_tensor_and_two_parts(tmp_path, save):
    """Planned, of the full-size text encoder: its embedding is 2.1 GB in bfloat16."""
    shapes = layouts.UMT5.shapes(UMT5Config(), "original")
    tensors = {n: sources.Tensor(shape, np.dtype(ml_dtypes.bfloat16), None) for n, shape in shapes.items()}
    plan = convert.plan(sources.Source(tmp_path / "t5.safetensors", tensors), "causvid_jax")
    assert plan.memory == 256384 * 4096 * 2 + 2 * convert.PART_BYTES + 2 * 2**24


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch, an optional extra, is not installed")
@pytest.mark.parametrize(
    "name,file",
    [
        ("umt5", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("taehv", "taew2_1.pth"),
        ("clip", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
    ],
)
def test_pickles_through_the_weights_only_loader(tmp_path, name, file):
    import torch

    tree, states = published(name)
    torch.save({n: torch.from_numpy(v.copy()) for n, v in states["original"].items()}, tmp_path / file)
    run(tmp_path / file, tmp_path / "ours.safetensors", "causvid_jax")
    jax.tree.map(np.testing.assert_array_equal, store.load_params(tmp_path / "ours.safetensors")[0], tree)
