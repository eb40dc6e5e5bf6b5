"""Open files and folders as they are published: parts, prefixes, shards, 8-bit scales; refusals by name."""

import importlib.util
import json
import os
import pathlib
import pickle
import tempfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from causvid_jax.checkpoints import load, source
from causvid_jax.config import ConfigError
from tests.checkpoints.tiny_files import TINY, arrays
from tests.refusals import refused

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch, an optional extra, is not installed"
)


def assert_state(opened, state):
    have = arrays(opened)
    assert have.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(have[name], state[name])


@pytest.mark.parametrize(
    "prefix,part",
    [
        ("", ""),
        ("model.", ""),
        ("module.", ""),
        ("model.diffusion_model.", ""),
        ("_orig_mod.", ""),
        ("_fsdp_wrapped_module.model.", ""),
        ("net.", ""),
        ("pipe.dit.", ""),
        ("dit.", ""),
        ("transformer.", ""),
        ("student.", "student"),
        ("ema.", "ema"),
        ("generator.model.", "generator"),
        ("generator_ema.model._fsdp_wrapped_module.", "generator_ema"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_prefixes_of_wrappers_are_removed(tmp_path, save, states, prefix, part, sharded):
    state = {prefix + name: value for name, value in states["original"].items()}
    path = tmp_path / "w"
    opened = source.open_source(shards(path, save, state) if sharded else save(path / "w.safetensors", state))
    assert_state(opened, states["original"])
    assert opened.part == part and "".join(sorted(opened.prefixes)) == "".join(
        sorted(f"{word}." for word in prefix.split(".") if word and word != part)
    )


def test_wrappers_inside_of_names():
    name = "model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0._orig_mod.weight"
    assert source.split_name(name)[1] == "blocks.3.ffn.0.weight"


def test_two_names_that_are_one(tmp_path, save):
    path = save(tmp_path / "w.safetensors", {"model.a": np.zeros(1, np.float32), "a": np.zeros(1, np.float32)})
    refused("holds 'a' twice", source.open_source, path)


def test_parts_of_a_flattened_dict(tmp_path, save, states):
    state = {f"generator.model.{n}": v for n, v in states["original"].items()}
    state |= {f"generator_ema.model.{n}": v + 1 for n, v in states["original"].items()}
    path = save(tmp_path / "w.safetensors", state)
    opened = source.open_source(path)
    assert (opened.part, set(opened.parts)) == ("generator_ema", {"generator", "generator_ema"})
    assert_state(opened, {n: v + 1 for n, v in states["original"].items()})
    assert_state(source.open_source(path, "generator"), states["original"])
    refused("has no part 'critic'; accepted: 'generator", source.open_source, path, "critic")


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
    opened = source.open_source(tmp_path)
    assert_state(opened, states["diffusers"])
    assert opened.config == {"num_attention_heads": 2}
    assert_state(source.open_source(index), states["diffusers"])


def test_a_download_cache_of_links(tmp_path, save, states):
    """As download caches have it: links in one folder to files with meaningless names in another."""
    (tmp_path / "snapshot").mkdir()
    shards(tmp_path / "whole", save, states["diffusers"])
    for i, file in enumerate((tmp_path / "whole").iterdir()):
        file.rename(tmp_path / f"blob{i}")
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blob{i}")
    assert_state(source.open_source(tmp_path / "snapshot"), states["diffusers"])


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
        refused(sentence, source.open_source, tmp_path)
    index.write_text("{")
    refused("is not readable JSON", source.open_source, tmp_path)


def test_averages_win_over_raw_weights(tmp_path, save, states):
    raw, other = states["original"], {name: value + 1 for name, value in states["original"].items()}
    for average in ("ema.", "model_ema."):
        opened = source.open_source(save(tmp_path / "w.safetensors", raw | {average + n: v for n, v in other.items()}))
        assert opened.part == average[:-1] and opened.of_parts == f"part {average[:-1]!r} of '', {average[:-1]!r}"
        assert_state(opened, other)


def eight_bit(state, weight, shape):
    """Return ``state`` with the matrices of its blocks as 8-bit floats with scales of ``shape(rows)``."""
    out, exact = {}, {}
    for name, value in state.items():
        exact[name] = value
        if value.ndim == 2 and name.startswith("blocks."):
            scale = np.full(shape(len(value)), np.abs(value).max() / 448, np.float32)
            out[name] = (value / scale.reshape(-1, 1)).astype(ml_dtypes.float8_e4m3fn)
            out[name.removesuffix("weight") + weight] = scale
            out[name.removesuffix("weight") + "input_scale"] = np.float32(1)
            exact[name] = out[name].astype(np.float32) * scale.reshape(-1, 1)
        else:
            out[name] = value
    return out, exact


@pytest.mark.parametrize("weight", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize(
    "shape", [lambda rows: (), lambda rows: (1,), lambda rows: (rows, 1)], ids=["0d", "1d", "rows"]
)
def test_eight_bit_weights_become_their_product_with_the_scales(tmp_path, save, states, weight, shape):
    state, exact = eight_bit(states["original"], weight, shape)
    marker = {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}
    path = save(tmp_path / "w.safetensors", state | marker)
    assert_state(source.open_source(path), exact)
    assert source.open_source(path).dequantised == 3 * 10
    np.testing.assert_array_equal(
        load(path, config=TINY)[0]["blocks"]["ffn"]["fc1"]["kernel"][1], exact["blocks.1.ffn.0.weight"].T
    )
    name = f"blocks.0.ffn.0.{weight}"
    with pytest.raises(ConfigError, match=r"has shape \(7,\); accepted: one number, or one per row"):
        source.open_source(save(tmp_path / "w.safetensors", state | {name: np.zeros(7, np.float32)}))
    with pytest.raises(ConfigError, match=f"holds the scale {name}, but no blocks.0.ffn.0.weight"):
        del state["blocks.0.ffn.0.weight"]
        source.open_source(save(tmp_path / "w.safetensors", state))


def test_formats_that_are_not_read_are_called_by_name(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5676070424\n"
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_text(pointer)
        refused(f"{name} is a Git LFS pointer: the weights were not downloaded", source.open_source, tmp_path / name)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "wan-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    for path in (tmp_path / "gguf", tmp_path / "gguf" / "wan-Q4_K_M.gguf"):
        refused("is a GGUF file, whose quantised weights are not read", source.open_source, path)
    (tmp_path / "dcp").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "dcp" / name).write_bytes(b"")
    refused("is a distributed checkpoint of PyTorch .*dcp_to_torch", source.open_source, tmp_path / "dcp")


@hypothesis.given(st.binary(max_size=300), st.integers(0, 200), st.booleans())
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_damaged_header_is_one_sentence(data, position, prefixed):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.safetensors"
        safetensors.numpy.save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones(3, np.float16)}, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:position] + data + whole[position + len(data) :] if prefixed else data)
        try:
            arrays(source.open_source(path))
        except ConfigError as error:
            assert "\n" not in str(error)


def test_what_is_no_checkpoint(tmp_path, save):
    for path, sentence in ((tmp_path / "nowhere", "nowhere does not exist"), (tmp_path, "holds 0 weights files")):
        refused(sentence, source.open_source, path)
    (tmp_path / "x.txt").write_text("")
    refused("x.txt is no weights file; accepted: .safetensors, .pt", source.open_source, tmp_path / "x.txt")
    whole = save(tmp_path / "a.safetensors", {"a": np.zeros(9, np.float32)}).read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        refused("cut.safetensors is not a readable safetensors file", source.open_source, tmp_path / "cut.safetensors")
    refused(r"holds 2 weights files \(a.safetensors, cut.safetensors\)", source.open_source, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_a_pickle_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"anything")
    with pytest.raises(
        ConfigError, match=r"model.pt is a PyTorch pickle.*pip install causvid_jax\[torch\].*safetensors"
    ):
        source.open_source(tmp_path / "model.pt")


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
    opened = source.open_source(path)
    assert (opened.part, opened.parts, opened.prefixes) == ("generator", ("generator", "critic"), ("model.",))
    assert_state(opened, states["original"])
    assert_state(opened, states["original"])  # Again, after its pages were given up.
    assert_state(source.open_source(path, "critic"), other)
    content["generator_ema"] = torch_state(other, "model._fsdp_wrapped_module.")
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert source.open_source(tmp_path).part == "generator_ema"
    assert_state(source.open_source(path), other)
    torch.save({"left": torch_state(other), "right": torch_state(other)}, path)
    refused("has the parts 'left', 'right'; choose one with --part", source.open_source, path)


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
    have = arrays(source.open_source(tmp_path / "x.pth"))
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(have["half"], plain.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(have["parameter"], plain)
    np.testing.assert_array_equal(have["transposed"], plain.T)
    assert have["scalar"] == np.float16(2.5) and have["scalar"].shape == ()
    np.testing.assert_array_equal(have["eight"], plain.astype(ml_dtypes.float8_e4m3fn))


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
        source.open_source(path)
    assert not marker.exists()
    text = str(caught.value)
    assert str(path) in text and "mkdir" in text and "nothing in it was run" in text and "\n" not in text


@needs_torch
def test_numbers_of_numpy_in_a_training_checkpoint_are_no_code(tmp_path, states):
    import torch

    content = {"model": torch_state(states["original"]), "loss": np.float64(0.5), "step": np.int64(3)}
    torch.save(content | {"model_ema": torch_state(states["diffusers"])}, tmp_path / "x.pt")
    opened = source.open_source(tmp_path / "x.pt")
    assert opened.of_parts == "part 'model_ema' of 'model', 'model_ema'"
    assert_state(opened, states["diffusers"])


@needs_torch
def test_damaged_torch_files(tmp_path):
    import torch

    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for data in (b"", b"text, not a pickle", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="x.pt is not a readable PyTorch checkpoint") as caught:
            source.open_source(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    torch.save({"epoch": 3}, path)
    refused("holds no tensors", source.open_source, path)
