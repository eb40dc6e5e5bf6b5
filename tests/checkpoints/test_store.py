"""Weights on disk: bit-exact round trips, checksums, and one-sentence errors for every bad file."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from causvid_jax.checkpoints import store, workdir
from causvid_jax.config import ConfigError


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
        with pytest.raises(ConfigError, match=message) as caught:
            store.load_params(bad)
        assert "\n" not in str(caught.value) and str(bad) in str(caught.value), name


def test_missing_directory_and_foreign_files(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.safetensors does not exist"):
        store.load_params(tmp_path / "nowhere.safetensors")
    with pytest.raises(ConfigError, match="is not a file"):
        store.load_params(tmp_path)
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ConfigError, match="carries no checksum"):
        store.load_params(tmp_path / "foreign.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    store.save_params(path, {"w": np.ones(3, np.float32)}, {})
    with pytest.raises(ConfigError, match="must be text without '/'"):
        store.save_params(path, {"a/b": np.ones(3, np.float32)}, {})
    with pytest.raises(ConfigError, match="storage type is 'int4'; accepted: float32, float16, bfloat16"):
        store.save_params(path, {"w": np.zeros(3, np.float32)}, {}, dtype="int4")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        store.save_params(tmp_path / "file" / "w.safetensors", {"w": np.zeros(3, np.float32)}, {})
    assert store.load_params(path)[0]["w"].tolist() == [1, 1, 1]


def test_check_tree_names_what_does_not_fit():
    expected = jax.eval_shape(lambda: {"a": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, "c": jnp.zeros(())})
    good = {"a": {"w": np.zeros((2, 3)), "b": np.zeros(3)}, "c": np.float32(0)}
    store.check_tree(good, expected, "student weights")
    bad = {"a": {"w": np.zeros((3, 2))}, "c": np.float32(0), **{f"x{i}": np.zeros(1) for i in range(5)}}
    with pytest.raises(ConfigError) as caught:
        store.check_tree(bad, expected, "student weights")
    assert str(caught.value) == (
        "student weights do not fit the configuration (missing: a/b; unexpected: x0, x1, x2 and 2 more; "
        "misshapen: a/w (3, 2) instead of (2, 3))"
    )


def test_publishing_copies_three_stages_in_half_precision_and_needs_all_of_them(tmp_path, monkeypatch):
    for stage in ("vae", "teacher"):
        store.save_params(workdir.stage_path(tmp_path / "run", stage), {"a": np.float32([0.1, 2.0])}, {"stage": stage})
    with pytest.raises(ConfigError, match="distill/weights.safetensors does not exist"):
        workdir.publish("mine", tmp_path / "run", tmp_path / "assets")
    assert not (tmp_path / "assets").exists()
    store.save_params(workdir.stage_path(tmp_path / "run", "distill"), {"a": np.float32([0.3])}, {"stage": "distill"})
    written = workdir.publish("mine", tmp_path / "run", tmp_path / "assets")
    assert [path.relative_to(tmp_path / "assets").as_posix() for path in written] == [
        "mine/vae.safetensors",
        "mine/teacher.safetensors",
        "mine/distill.safetensors",
    ]
    # The tiny codec goes along where it was trained, and is found among the package's weights.
    store.save_params(workdir.stage_path(tmp_path / "run", "taehv"), {"a": np.float32([0.5])}, {"stage": "taehv"})
    assert [path.stem for path in workdir.publish("mine", tmp_path / "run", tmp_path / "assets")] == [
        "vae", "taehv", "teacher", "distill",
    ]  # fmt: skip
    monkeypatch.setattr(workdir, "ASSETS", tmp_path / "assets")
    assert workdir.find_taehv("mine", tmp_path) == tmp_path / "assets" / "mine" / "taehv.safetensors"
    assert workdir.find_taehv("mine", tmp_path / "run") == workdir.stage_path(tmp_path / "run", "taehv")
    with pytest.raises(ConfigError, match="holds no weights of TAEHV; accepted: taehv/weights.safetensors, taew2_1"):
        workdir.find_taehv("yours", tmp_path)
    params, metadata = store.load_params(written[0], dtype=None)
    assert params["a"].dtype == np.float16 and metadata["stage"] == "vae"
    np.testing.assert_array_equal(params["a"], np.float16([0.1, 2.0]))


def test_arrays_come_straight_in_the_types_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.normal(size=(3, 5)), "bias": rng.normal(size=5)}, "scalar": np.float64(2.0)}
    tree = jax.tree.map(np.float32, tree)
    path = tmp_path / "w.safetensors"
    store.save_params(path, tree, {"who": "me"})
    expected = {
        "a": {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "bias": jax.ShapeDtypeStruct((5,), jnp.float32)},
        "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    }
    arrays, metadata = store.load_arrays(path, expected, "weights")
    assert metadata == {"who": "me"} == store.check_file(path, expected, "weights")
    for got, given, leaf in zip(*map(jax.tree.leaves, (arrays, tree, expected)), strict=True):
        assert isinstance(got, jax.Array) and got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, jnp.asarray(given).astype(leaf.dtype))
    assert store.stored_checksum(path) == store.checksum(store.flatten(tree), {"who": "me"})
    expected["a"]["bias"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    for refuse in (store.check_file, store.load_arrays):
        with pytest.raises(ConfigError, match="weights do not fit the configuration .misshapen: a/bias"):
            refuse(path, expected, "weights")
    expected["a"]["bias"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="is corrupt: its checksum does not match"):
        store.load_arrays(path, expected, "weights")


def test_onto_a_mesh_every_part_is_read_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.normal(size=(8, 6, 4)), "bias": rng.normal(size=4)}, "scalar": np.float64(2.0)}
    tree = jax.tree.map(np.float32, tree)
    path = tmp_path / "w.safetensors"
    store.save_params(path, tree, {"who": "me"})
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    places = {
        "a": {
            "kernel": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")),
            "bias": NamedSharding(mesh, PartitionSpec("tensor")),
        },
        "scalar": NamedSharding(mesh, PartitionSpec()),
    }
    read, bytes_read = store._read_part, []

    def counted(name, tensor, index, dtype):
        part = read(name, tensor, index, dtype)
        bytes_read.append(part.size * tensor.dtype.itemsize)
        return part

    monkeypatch.setattr(store, "_read_part", counted)
    arrays, metadata = store.load_sharded(path, expected, places, "weights")
    assert metadata == {"who": "me"}
    for got, given, place in zip(*map(jax.tree.leaves, (arrays, tree, places)), strict=True):
        assert got.sharding == place and got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, jnp.asarray(given).astype(jnp.bfloat16))
    # Two devices hold every part of the kernel, four every half of the bias, all the scalar.
    assert sum(bytes_read) == 4 * (8 * 6 * 4 + 4 + 1) and len(bytes_read) == 4 + 2 + 1
    with pytest.raises(ConfigError, match="weights do not fit the configuration"):
        store.load_sharded(path, {"a": expected["a"]}, places, "weights")
