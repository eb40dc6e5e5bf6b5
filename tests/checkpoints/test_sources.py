"""Files and folders as they are published, opened without reading; parts, prefixes, shards; refusals."""

import importlib.util
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from causvid_jax.checkpoints import sources
from causvid_jax.config import ConfigError

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch, an optional extra, is not installed"
)


def read(source):
    arrays = {}
    for name, tensor in source.tensors.items():
        with tensor.view() as view:
            arrays[name] = np.array(view)
            assert view.shape == tensor.shape and view.dtype == tensor.dtype
    return arrays


def assert_state(source, state):
    arrays = read(source)
    assert arrays.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(arrays[name], state[name])


@pytest.mark.parametrize(
    "prefixes",
    [
        (),
        ("model.",),
        ("module.",),
        ("model.", "diffusion_model."),
        ("diffusion_model.",),
        ("_orig_mod.",),
        ("_fsdp_wrapped_module.", "model."),
    ],
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path, save, states, prefixes):
    state = {"".join(prefixes) + name: value for name, value in states["original"].items()}
    source = sources.open_source(save(tmp_path / "w.safetensors", state))
    assert_state(source, states["original"])
    assert source.prefixes == prefixes


def test_wrappers_inside_of_names():
    name = "model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0._orig_mod.weight"
    assert sources.strip(name)[0] == "blocks.3.ffn.0.weight"


def test_two_names_that_are_one(tmp_path, save):
    path = save(tmp_path / "w.safetensors", {"model.a": np.zeros(1, np.float32), "a": np.zeros(1, np.float32)})
    with pytest.raises(ConfigError, match="holds 'a' twice"):
        sources.open_source(path)


def test_parts_of_a_flattened_dict(tmp_path, save, states):
    state = {f"generator.model.{n}": v for n, v in states["original"].items()}
    state |= {f"generator_ema.model.{n}": v + 1 for n, v in states["original"].items()}
    path = save(tmp_path / "w.safetensors", state)
    source = sources.open_source(path)
    assert (source.part, set(source.parts)) == ("generator_ema", {"generator", "generator_ema"})
    assert_state(source, {n: v + 1 for n, v in states["original"].items()})
    assert_state(sources.open_source(path, "generator"), states["original"])
    with pytest.raises(ConfigError, match="has no part 'critic'; accepted: 'generator"):
        sources.open_source(path, "critic")


def shards(folder, save, state, count=3):
    names, weight_map = sorted(state), {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        save(folder / file, {name: state[name] for name in names[i::count]})
        weight_map |= dict.fromkeys(names[i::count], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards_with_an_index(tmp_path, save, states):
    index = shards(tmp_path, save, states["diffusers"])
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    source = sources.open_source(tmp_path)
    assert_state(source, states["diffusers"])
    assert source.config == {"num_attention_heads": 2}
    assert_state(sources.open_source(index), states["diffusers"])


def test_a_download_cache_of_links(tmp_path, save, states):
    """As download caches have it: links in one folder to files with meaningless names in another."""
    (tmp_path / "snapshot").mkdir()
    shards(tmp_path / "whole", save, states["diffusers"])
    for i, file in enumerate((tmp_path / "whole").iterdir()):
        file.rename(tmp_path / f"blob{i}")
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blob{i}")
    assert_state(sources.open_source(tmp_path / "snapshot"), states["diffusers"])


def test_damaged_indices(tmp_path, save, states):
    index = shards(tmp_path, save, states["diffusers"])
    whole = json.loads(index.read_text())
    some = min(whole["weight_map"])
    for change, sentence in (
        ({"weight_map": {**whole["weight_map"], "extra": whole["weight_map"][some]}}, "not there, first extra in"),
        ({"weight_map": {**whole["weight_map"], some: "gone.safetensors"}}, "lists gone.safetensors, which does not"),
        ({"weight_map": {**whole["weight_map"], some: "../x.safetensors"}}, "outside of its folder"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps(change))
        with pytest.raises(ConfigError, match=sentence):
            sources.open_source(tmp_path)
    index.write_text("{")
    with pytest.raises(ConfigError, match="is not readable JSON"):
        sources.open_source(tmp_path)


def test_folders_of_components(tmp_path, save, states, vae_states):
    original, pipeline = tmp_path / "original", tmp_path / "pipeline"
    save(original / "diffusion_pytorch_model.safetensors", states["original"])
    save(original / "Wan2.1_VAE.safetensors", vae_states["original"])
    (original / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
    (original / "config.json").write_text('{"num_heads": 2}')
    found = sources.components(original)
    assert {name: place.name for name, place in found.items()} == {
        "transformer": "original",
        "vae": "Wan2.1_VAE.safetensors",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    }
    transformer, vae = (sources.open_source(found[name]) for name in ("transformer", "vae"))
    assert_state(transformer, states["original"])
    assert_state(vae, vae_states["original"])
    assert transformer.config == {"num_heads": 2} and vae.config == {}
    save(pipeline / "transformer" / "diffusion_pytorch_model.safetensors", states["diffusers"])
    save(pipeline / "vae" / "diffusion_pytorch_model.safetensors", vae_states["diffusers"])
    (pipeline / "scheduler").mkdir()
    assert sources.components(pipeline) == {name: pipeline / name for name in ("transformer", "vae")}
    assert sources.components(pipeline / "vae") == sources.components(pipeline / "vae" / "none") == {}


def test_what_is_no_checkpoint(tmp_path, save):
    for path, sentence in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path, "holds 0 weights files"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            sources.open_source(path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ConfigError, match="x.txt is no weights file; accepted: .safetensors, .pt"):
        sources.open_source(tmp_path / "x.txt")
    whole = save(tmp_path / "a.safetensors", {"a": np.zeros(9, np.float32)}).read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match="cut.safetensors is not a readable safetensors file"):
            sources.open_source(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match=r"holds 2 weights files \(a.safetensors, cut.safetensors\)"):
        sources.open_source(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_a_pickle_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"anything")
    with pytest.raises(
        ConfigError, match=r"model.pt is a PyTorch pickle.*pip install causvid_jax\[torch\].*safetensors"
    ):
        sources.open_source(tmp_path / "model.pt")


# ---- PyTorch's files ------------------------------------------------------------------------------------------------


def torch_state(state, prefix=""):
    import torch

    return {prefix + name: torch.from_numpy(np.array(value)) for name, value in state.items()}


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_causvid_and_self_forcing(tmp_path, states, zipped):
    import torch

    path = tmp_path / "model.pt"
    other = {name: value + 1 for name, value in states["original"].items()}
    content = {
        "generator": torch_state(states["original"], "model."),
        "critic": torch_state(other, "model."),
        "step": 3,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    source = sources.open_source(path)
    assert (source.part, source.parts, source.prefixes) == ("generator", ("generator", "critic"), ("model.",))
    assert_state(source, states["original"])
    assert_state(source, states["original"])  # Again, after its pages were given up.
    assert_state(sources.open_source(path, "critic"), other)
    content["generator_ema"] = torch_state(other, "model._fsdp_wrapped_module.")
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert sources.open_source(tmp_path).part == "generator_ema"
    assert_state(sources.open_source(path), other)
    torch.save({"left": torch_state(other), "right": torch_state(other)}, path)
    with pytest.raises(ConfigError, match="has the parts 'left', 'right'; choose one with --part"):
        sources.open_source(path)


@needs_torch
def test_types_and_views_of_a_torch_file(tmp_path):
    import torch

    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    content = {
        "half": values.to(torch.bfloat16),
        "parameter": torch.nn.Parameter(values),
        "transposed": values.T,
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "eight": values.to(torch.float8_e4m3fn),
    }
    torch.save({"state_dict": content}, tmp_path / "x.pth")
    arrays = read(sources.open_source(tmp_path / "x.pth"))
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(arrays["half"], plain.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(arrays["parameter"], plain)
    np.testing.assert_array_equal(arrays["transposed"], plain.T)
    assert arrays["scalar"] == np.float16(2.5) and arrays["scalar"].shape == ()
    np.testing.assert_array_equal(arrays["eight"], plain.astype(ml_dtypes.float8_e4m3fn))


class Malicious:
    """Would create a file if it were ever unpickled by a loader that runs code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@needs_torch
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_by_name_and_not_run(tmp_path, kind):
    import torch

    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    content = {"generator": {"w": torch.zeros(3)}, "x": Malicious(marker)}
    if kind == "plain":
        path.write_bytes(pickle.dumps({"x": Malicious(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ConfigError) as caught:
        sources.open_source(path)
    assert not marker.exists()
    text = str(caught.value)
    assert str(path) in text and "mkdir" in text and "nothing in it was run" in text and "\n" not in text


@needs_torch
def test_damaged_torch_files(tmp_path):
    import torch

    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for data in (b"", b"text, not a pickle", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="x.pt is not a readable PyTorch checkpoint") as caught:
            sources.open_source(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    torch.save({"epoch": 3}, path)
    with pytest.raises(ConfigError, match="holds no tensors"):
        sources.open_source(path)
