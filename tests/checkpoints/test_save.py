"""Saving in every format, bit for bit: types, shards, folders; what a kill, a full disk or a bad file leaves."""

import importlib.util
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from causvid_jax.checkpoints import load, open_checkpoint, store, wan_vae
from causvid_jax.checkpoints import save as save_as
from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.checkpoints.save import layout, size, summary
from causvid_jax.checkpoints.source import open_source
from causvid_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, ConfigError, VAEConfig
from tests.checkpoints.tiny_files import EVERY, TINY, TINY_VAE, arrays, assert_states, published
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: type(config).__name__)
def test_every_network_goes_through_every_format_bit_for_bit(tmp_path, config):
    """From one format to the next, each opened again by what the file itself says."""
    params, _ = published(config, "original")
    opened = open_checkpoint(params, config)
    for form in (*network_of(config).formats, "original"):
        path = tmp_path / f"{form}.safetensors"
        save_as(opened, path, form)
        assert_states(arrays(open_source(path)), published(config, form)[1])
        opened = open_checkpoint(path)
        assert (opened.format, opened.network) == (form, network_of(config))
        assert getattr(opened.config, "num_heads", 0) == getattr(config, "num_heads", 0)
    loaded, metadata = store.load_params(tmp_path / "causvid_jax.safetensors", dtype=None)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert metadata["component"] == network_of(config).component and "format" not in metadata
    assert opened.source.metadata["format"] == "pt"  # Readers of published files insist on it.


def test_a_vae_keeps_its_statistics_or_gets_the_published_ones(tmp_path, vae_params, vae_states):
    store.save_params(
        tmp_path / "a.safetensors", vae_params, {"latent_mean": "[0.5, -1.0]", "latent_std": "[2.0, 3.0]"}
    )
    for form in ("diffusers", "original", "causvid_jax"):
        save_as(open_checkpoint(tmp_path / "a.safetensors", TINY_VAE), tmp_path / f"{form}.safetensors", form)
        coder = open_checkpoint(tmp_path / f"{form}.safetensors").config
        assert (coder.latent_mean, coder.latent_std) == ((0.5, -1.0), (2.0, 3.0))
    save_as(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "folder", "diffusers")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["latents_std"] == [2.0, 3.0]
    assert open_checkpoint(tmp_path / "folder").config.latent_mean == (0.5, -1.0)
    full = VAEConfig(base_dim=4)
    coder = load(published(full, "original")[1], config=full)[1]
    assert (coder.latent_mean, coder.latent_std) == (WAN_LATENT_MEAN, WAN_LATENT_STD)
    assert wan_vae.metadata(coder)["latent_std"] == json.dumps(WAN_LATENT_STD)


def test_storage_types(tmp_path, save, states):
    path, out = save(tmp_path / "in.safetensors", states["original"]), tmp_path / "out.safetensors"
    for dtype, kind in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        save_as(open_checkpoint(path, TINY), out, "original", dtype)
        assert_states(arrays(open_source(out)), {n: v.astype(kind) for n, v in states["original"].items()})
    save(path, states["original"] | {"head.head.bias": np.full(16, 7e4, np.float32)})
    with pytest.raises(ConfigError, match="parameter head.head.bias holds 70000, beyond the largest float16"):
        save_as(open_checkpoint(path, TINY), tmp_path / "x.safetensors", "original", "float16")
    eight = {n: v.astype(ml_dtypes.float8_e4m3fn) for n, v in states["original"].items()}
    save(path, eight)
    with pytest.raises(ConfigError, match="is float8_e4m3fn; give --dtype, one of float32, float16, bfloat16"):
        save_as(open_checkpoint(path, TINY), tmp_path / "x.safetensors")
    save_as(open_checkpoint(path, TINY), out, "original", "bfloat16")
    assert_states(arrays(open_source(out)), {n: v.astype(ml_dtypes.bfloat16) for n, v in eight.items()})
    save(path, states["original"] | {"blocks.1.norm3.bias": np.zeros(24, np.float16)})
    with pytest.raises(ConfigError, match="layers of blocks/norm3/bias are stored as float32 and float16"):
        save_as(open_checkpoint(path, TINY), tmp_path / "x.safetensors")
    save_as(open_checkpoint(path, TINY), out, "diffusers")
    assert arrays(open_source(out))["blocks.1.norm2.bias"].dtype == np.float16
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_shards_with_an_index_and_a_config(tmp_path, states, form):
    opened = open_checkpoint(states["original"], TINY)
    save_as(opened, tmp_path / "out", form, shard_bytes=40_000)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    shards = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names == ["config.json", *shards, "diffusion_pytorch_model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / names[-1]).read_text())
    total = sum(value.nbytes for value in states[form].values())
    assert index["metadata"]["total_size"] == size(layout(opened, form)) == total
    assert all((tmp_path / "out" / name).stat().st_size < 45_000 for name in shards)
    assert_states(arrays(open_source(tmp_path / "out")), states[form])
    # config.json tells what shapes cannot.
    assert open_checkpoint(tmp_path / "out").config == TINY
    refused("out exists and is not empty", save_as, opened, tmp_path / "out", form)


def test_a_summary_in_one_line(tmp_path, save, states):
    state = {f"generator.model.{name}": value for name, value in states["original"].items()}
    opened = open_checkpoint(save(tmp_path / "w.safetensors", state), num_heads=2)
    said = summary(opened, "diffusers", "bfloat16")
    assert said == (
        f"{tmp_path}/w.safetensors: transformer of 3 layers, width 24, 2 heads, 4 channels, original names, float32, "
        "part 'generator', without model.; 27,352 parameters, 109.41 kB -> diffusers names, bfloat16, 54.70 kB"
    )


def test_damage_writes_nothing(tmp_path, save, states, params, monkeypatch):
    ours, out = tmp_path / "in" / "ours.safetensors", tmp_path / "out" / "x.safetensors"
    store.save_params(ours, params, {})
    data = bytearray(ours.read_bytes())
    data[-9] ^= 4
    ours.write_bytes(data)
    refused("ours.safetensors is corrupt", save_as, open_checkpoint(ours, TINY), out, "original")
    bad = {name: value.copy() for name, value in states["original"].items()}
    bad["blocks.2.ffn.2.bias"][1] = np.nan
    path = save(tmp_path / "in" / "nan.safetensors", bad)
    for target in (out, out.parent):
        with pytest.raises(ConfigError, match="tensor blocks.2.ffn.2.bias of .*nan.safetensors holds a NaN"):
            save_as(open_checkpoint(path, TINY), target, "diffusers")
    refused("our own format is one file", save_as, open_checkpoint(states["original"], TINY), out.parent)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match=r"x.safetensors needs 109.41 kB, but .* has 1.00 kB free"):
        save_as(open_checkpoint(states["original"], TINY), out)
    assert not out.exists() and not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch, an optional extra, is not installed")
def test_a_torch_checkpoint_to_our_format(tmp_path, states, params):
    import torch

    state = {f"model._fsdp_wrapped_module.{n}": torch.from_numpy(v.copy()) for n, v in states["original"].items()}
    torch.save({"generator": state, "critic": state}, tmp_path / "model.pt")
    save_as(open_checkpoint(tmp_path / "model.pt", num_heads=2), tmp_path / "ours.safetensors")
    jax.tree.map(np.testing.assert_array_equal, store.load_params(tmp_path / "ours.safetensors")[0], params)
