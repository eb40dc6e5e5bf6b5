"""Weights on disk: bit-exact round trips, checksums, and one-sentence errors for every bad file."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from causvid_jax.checkpoints import store
from causvid_jax.config import ConfigError
from tests.refusals import refused


def tree():
    rng = np.random.default_rng(0)
    return {
        "blocks": {"q": {"kernel": rng.normal(size=(3, 4, 5)).astype(np.float32)}, "step": np.int32(7)},
        "scale": np.float32(0.25),
        "head": jnp.asarray(rng.normal(size=(2, 6)), jnp.float32),
        "empty": np.zeros((0, 3), np.float32),
        "strided": rng.normal(size=(4, 6)).astype(np.float32).T,
    }


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_bit_exact_and_keeps_metadata(tmp_path):
    params = tree()
    store.save_params(tmp_path / "deep" / "w.safetensors", params, {"recipe": "digits", "steps": "3"})
    loaded, metadata = store.load_params(tmp_path / "deep" / "w.safetensors")
    assert_same(params, loaded)
    assert metadata == {"recipe": "digits", "steps": "3"}
    assert loaded["blocks"]["step"].dtype == np.int32
    assert loaded["scale"].shape == ()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("dtype,bits", [("float16", 11), ("bfloat16", 8)])
def test_half_storage_rounds_to_nearest_and_halves_the_file(tmp_path, dtype, bits):
    params = {"w": np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)}
    path = tmp_path / "w.safetensors"
    store.save_params(path, params, {}, dtype=dtype)
    loaded, _ = store.load_params(path)
    assert loaded["w"].dtype == np.float32
    assert np.max(np.abs(loaded["w"] - params["w"]) / np.abs(params["w"])) <= 2.0**-bits
    assert 2 * 64 * 64 < path.stat().st_size < 2 * 64 * 64 + 400
    kept, _ = store.load_params(path, dtype=None)
    assert kept["w"].dtype.name == dtype
    np.testing.assert_array_equal(kept["w"].astype(np.float32), loaded["w"])


def test_float16_overflow_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="parameter big holds 70000, beyond the largest float16"):
        store.save_params(tmp_path / "w.safetensors", {"big": np.float32([7e4])}, {}, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_other_tools_read_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    store.save_params(path, tree(), {"note": "x"})
    flat = safetensors.numpy.load_file(path)
    assert sorted(flat) == ["blocks/q/kernel", "blocks/step", "empty", "head", "scale", "strided"]
    np.testing.assert_array_equal(flat["strided"], tree()["strided"])


def test_checksum_is_sha256_of_what_the_docstring_says():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(json.dumps({"k": "v"}).encode() + b"a/b float32 (2, 3)" + array.tobytes()).hexdigest()
    assert store.checksum({"a/b": array}, {"k": "v"}) == expected
    assert store.checksum({"a/b": array}, {"k": "v", store.CHECKSUM: "ignored"}) == expected


def test_every_kind_of_damage_is_one_sentence(tmp_path):
    path = tmp_path / "w.safetensors"
    store.save_params(path, {"w": np.arange(400, dtype=np.float32)}, {"mean": "0.5"})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    damages = {
        "truncated": (whole[:-1], "not a readable safetensors file"),
        "half a header": (whole[:30], "not a readable safetensors file"),
        "empty": (b"", "not a readable safetensors file"),
        "text": (b"these are no weights at all", "not a readable safetensors file"),
        "one bit": (bytes(flipped), "corrupt: its checksum does not match"),
        "metadata": (whole.replace(b'"0.5"', b'"0.7"'), "corrupt: its checksum does not match"),
    }
    for name, (data, message) in damages.items():
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(data)
        for read in (store.load_params, store.verify):
            with pytest.raises(ConfigError, match=message) as caught:
                read(bad)
            assert "\n" not in str(caught.value) and str(bad) in str(caught.value), name


def test_missing_directory_and_foreign_files(tmp_path):
    refused("nowhere.safetensors does not exist", store.load_params, tmp_path / "nowhere.safetensors")
    refused("is not a file", store.load_params, tmp_path)
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    refused("has no checksum", store.load_params, tmp_path / "foreign.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    store.save_params(path, {"w": np.ones(3, np.float32)}, {})
    refused("must be text without '/'", store.save_params, path, {"a/b": np.ones(3, np.float32)}, {})
    with pytest.raises(ConfigError, match="storage type is 'int4'; accepted: float32, float16, bfloat16"):
        store.save_params(path, {"w": np.zeros(3, np.float32)}, {}, dtype="int4")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        store.save_params(tmp_path / "file" / "w.safetensors", {"w": np.zeros(3, np.float32)}, {})
    assert store.load_params(path)[0]["w"].tolist() == [1, 1, 1]
