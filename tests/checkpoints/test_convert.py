"""Conversions between every pair of layouts, bit for bit; straight into shardings; what a kill or a bad file leaves."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from causvid_jax.checkpoints import convert, files, layouts, sources, store, wan_transformer, wan_vae, workdir
from causvid_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, ConfigError

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = ("original", "diffusers")


def arrays(path):
    out = {}
    for name, tensor in sources.open_source(path).tensors.items():
        with tensor.view() as view:
            out[name] = np.array(view)
    return out


def assert_states(have, want):
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert have[name].dtype == value.dtype and have[name].shape == value.shape
        np.testing.assert_array_equal(have[name].view(np.uint8), np.ascontiguousarray(value).view(np.uint8))


def run(path, output, naming, **options):
    plan = convert.plan(sources.open_source(path), naming, **options)
    convert.run({"": plan}, output)
    return plan


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("naming", PUBLISHED)
def test_transformer_round_trips_are_bit_exact(tmp_path, save, tiny, params, half_params, naming, half):
    tree = half_params if half else params
    state = dict(wan_transformer.to_published(tree, tiny, naming))
    plan = run(save(tmp_path / "in.safetensors", state), tmp_path / "ours.safetensors", "causvid_jax", num_heads=2)
    assert (plan.match.naming, plan.match.config) == (naming, tiny)
    loaded, metadata = store.load_params(tmp_path / "ours.safetensors", dtype=None)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert metadata["component"] == "transformer" and json.loads(metadata["network"])["num_heads"] == 2
    for to in PUBLISHED:
        run(tmp_path / "ours.safetensors", tmp_path / f"{to}.safetensors", to)
        assert_states(arrays(tmp_path / f"{to}.safetensors"), dict(wan_transformer.to_published(tree, tiny, to)))
    # Between published names without ours in the middle, heads from the file's own metadata.
    run(tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors", "original")
    assert_states(arrays(tmp_path / "back.safetensors"), dict(wan_transformer.to_published(tree, tiny, "original")))
    assert workdir.load_transformer(tmp_path / "ours.safetensors", tiny, "teacher").keys() == tree.keys()


@pytest.mark.parametrize("naming", PUBLISHED)
def test_vae_round_trips_are_bit_exact_and_keep_the_statistics(tmp_path, tiny_vae, vae_params, vae_states, naming):
    statistics = {"latent_mean": "[0.5, -1.0]", "latent_std": "[2.0, 3.0]"}
    store.save_params(tmp_path / "ours.safetensors", vae_params, statistics)
    run(tmp_path / "ours.safetensors", tmp_path / "out", naming)
    assert_states(arrays(tmp_path / "out"), vae_states[naming])
    run(tmp_path / "out", tmp_path / "back.safetensors", "causvid_jax")
    loaded, coder = workdir.load_vae(tmp_path / "back.safetensors", tiny_vae)
    jax.tree.map(np.testing.assert_array_equal, loaded, vae_params)
    assert (coder.latent_mean, coder.latent_std) == ((0.5, -1.0), (2.0, 3.0))


def test_a_published_vae_brings_the_published_statistics(tmp_path, save):
    config = layouts.VAEConfig(base_dim=4)
    state = {n: np.zeros(shape, np.float32) for n, shape in layouts.VAE.shapes(config, "original").items()}
    run(save(tmp_path / "Wan2.1_VAE.safetensors", state), tmp_path / "vae.safetensors", "causvid_jax")
    _, coder = workdir.load_vae(tmp_path / "vae.safetensors", config)
    assert (coder.latent_mean, coder.latent_std) == (WAN_LATENT_MEAN, WAN_LATENT_STD)


def test_storage_types(tmp_path, save, tiny, states):
    path = save(tmp_path / "in.safetensors", states["original"])
    for dtype, kind in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        run(path, tmp_path / "out.safetensors", "original", dtype=dtype, num_heads=2)
        assert_states(arrays(tmp_path / "out.safetensors"), {n: v.astype(kind) for n, v in states["original"].items()})
    loud = states["original"] | {"head.head.bias": np.full(16, 7e4, np.float32)}
    save(path, loud)
    with pytest.raises(ConfigError, match="parameter head.head.bias holds 70000, beyond the largest float16"):
        run(path, tmp_path / "loud.safetensors", "original", dtype="float16", num_heads=2)
    eight = {n: v.astype(ml_dtypes.float8_e4m3fn) for n, v in states["original"].items()}
    save(path, eight)
    with pytest.raises(ConfigError, match="is float8_e4m3fn; give --dtype, one of float32, float16, bfloat16"):
        run(path, tmp_path / "x.safetensors", "causvid_jax", num_heads=2)
    run(path, tmp_path / "out.safetensors", "original", dtype="bfloat16", num_heads=2)
    assert_states(arrays(tmp_path / "out.safetensors"), {n: v.astype(ml_dtypes.bfloat16) for n, v in eight.items()})
    mixed = states["original"] | {"blocks.1.norm3.bias": np.zeros(24, np.float16)}
    save(path, mixed)
    with pytest.raises(ConfigError, match="layers of blocks/norm3/bias are stored as float32 and float16"):
        run(path, tmp_path / "x.safetensors", "causvid_jax", num_heads=2)
    run(path, tmp_path / "diffusers.safetensors", "diffusers", num_heads=2)
    assert arrays(tmp_path / "diffusers.safetensors")["blocks.1.norm2.bias"].dtype == np.float16
    save(path, states["original"] | {"head.head.bias": np.zeros(16, np.int32)})
    with pytest.raises(ConfigError, match="is int32; accepted: floating types"):
        run(path, tmp_path / "x.safetensors", "original", dtype="float32", num_heads=2)


@pytest.mark.parametrize("naming", PUBLISHED)
def test_shards_with_an_index_and_a_config(tmp_path, save, tiny, states, naming):
    path = save(tmp_path / "in.safetensors", states["original"])
    plan = convert.plan(sources.open_source(path), naming, num_heads=2)
    convert.run({"": plan}, tmp_path / "out", shard_bytes=40_000)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    shards = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names == ["config.json", *shards, "diffusion_pytorch_model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in states[naming].values())
    assert all((tmp_path / "out" / name).stat().st_size < 45_000 for name in shards)
    assert_states(arrays(tmp_path / "out"), states[naming])
    # config.json tells what shapes cannot.
    assert layouts.detect(sources.open_source(tmp_path / "out")).config == tiny
    with pytest.raises(ConfigError, match="out exists and is not empty"):
        convert.run({"": plan}, tmp_path / "out")


def test_a_file_that_does_not_fit_writes_nothing(tmp_path, save, states):
    state = {name: value for name, value in states["original"].items() if name != "blocks.1.ffn.2.bias"}
    path = save(tmp_path / "in" / "bad.safetensors", state)
    with pytest.raises(ConfigError, match="bad.safetensors is no checkpoint .* missing: blocks.1.ffn.2.bias"):
        run(path, tmp_path / "out" / "x.safetensors", "causvid_jax", num_heads=2)
    assert not (tmp_path / "out").exists()


def test_a_changed_file_of_ours_is_not_exported(tmp_path, params):
    path = tmp_path / "ours.safetensors"
    store.save_params(path, params, {})
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="ours.safetensors is corrupt"):
        run(path, tmp_path / "out.safetensors", "original", num_heads=2)
    assert [p.name for p in tmp_path.iterdir()] == ["ours.safetensors"]


def test_a_full_disk_is_refused_before_it_is_full(tmp_path, save, states, monkeypatch):
    path = save(tmp_path / "in.safetensors", states["original"])
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match=r"x.safetensors needs 109.41 kB, but .* has 1.00 kB free"):
        run(path, tmp_path / "x.safetensors", "causvid_jax", num_heads=2)


def test_a_conversion_killed_in_the_middle_leaves_no_half_checkpoint(tmp_path, save, states):
    """kill -9 at the third tensor of a folder (test_files has the same for a file); the next run cleans up."""
    path, output = save(tmp_path / "in.safetensors", states["original"]), tmp_path / "folder"
    script = textwrap.dedent(
        """
        import sys, time
        from causvid_jax.checkpoints import convert, sources

        count = 0
        def progress(size):
            global count
            count += 1
            if count == 3:
                print("middle", flush=True)
                time.sleep(60)

        plan = convert.plan(sources.open_source(sys.argv[1]), "diffusers", num_heads=2)
        convert.run({"": plan}, sys.argv[2], progress)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, path, output],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout.readline() == "middle\n"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not output.exists() and len(list(tmp_path.glob(".folder.*.tmp"))) == 1
    run(path, output, "diffusers", num_heads=2)
    assert output.exists() and not list(tmp_path.glob(".*"))


# ---- straight into arrays -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("naming", layouts.NAMINGS)
def test_load_into_a_sharding(tmp_path, save, tiny, params, states, mesh, naming):
    if naming == "causvid_jax":
        store.save_params(tmp_path / "in.safetensors", params, {})
    else:
        save(tmp_path / "in.safetensors", states[naming])

    def sharding(leaf):
        # The last axis that four divides, and the first of those of two.
        spec = [None] * len(leaf.shape)
        for axis in reversed(range(len(leaf.shape))):
            if leaf.shape[axis] % 4 == 0:
                spec[axis] = "model"
                break
        for axis in range(len(leaf.shape)):
            if spec[axis] is None and leaf.shape[axis] % 2 == 0:
                spec[axis] = "data"
                break
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(sharding, layouts.TRANSFORMER.abstract(tiny))
    loaded = convert.load_published(tmp_path / "in.safetensors", tiny, shardings)

    def compare(array, expected, sharding):
        assert array.sharding == sharding and array.dtype == jnp.float32
        np.testing.assert_array_equal(array, expected)

    jax.tree.map(compare, loaded, params, shardings)
    kernel = loaded["blocks"]["ffn"]["fc1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 12, 10)}


def test_load_reads_only_what_a_shard_needs_and_each_shard_once(tmp_path, save, tiny, states, mesh, monkeypatch):
    path = save(tmp_path / "in.safetensors", states["original"])
    source, made = sources.open_source(path), []
    monkeypatch.setattr(
        convert.jax, "device_put", lambda value, device, put=jax.device_put: made.append(value) or put(value, device)
    )
    sharding = NamedSharding(mesh, PartitionSpec())
    convert.load_published(source, tiny, sharding)
    assert len(made) == 8 * len(set(map(id, made)))
    made.clear()
    split = NamedSharding(mesh, PartitionSpec(None, None))
    each = jax.tree.map(lambda _: split, layouts.TRANSFORMER.abstract(tiny))
    each["blocks"]["ffn"]["fc1"]["kernel"] = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    each = jax.tree.map(
        lambda leaf, s: s if len(leaf.shape) >= 2 else sharding, layouts.TRANSFORMER.abstract(tiny), each
    )
    convert.load_published(source, tiny, each)
    assert sum(value.shape == (3, 12, 10) for value in made) == 8


def test_load_options_and_refusals(tmp_path, save, tiny, tiny_vae, states, vae_states, vae_params):
    path = save(tmp_path / "in.safetensors", states["diffusers"])
    half = convert.load_published(path, tiny, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    loaded = convert.load_published(save(tmp_path / "vae.safetensors", vae_states["diffusers"]), tiny_vae)
    jax.tree.map(np.testing.assert_array_equal, loaded, vae_params)
    with pytest.raises(ConfigError, match="does not fit the configuration"):
        convert.load_published(path, layouts.TransformerConfig())
    with pytest.raises(ConfigError, match="shardings do not fit the parameters .missing: blocks/"):
        convert.load_published(path, tiny, {"head": {"modulation": None}})


# ---- others' readers and writers ------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch, an optional extra, is not installed")
def test_a_torch_checkpoint_to_our_format(tmp_path, states, params):
    import torch

    state = {f"model._fsdp_wrapped_module.{n}": torch.from_numpy(v.copy()) for n, v in states["original"].items()}
    torch.save({"generator": state, "critic": state}, tmp_path / "model.pt")
    run(tmp_path / "model.pt", tmp_path / "ours.safetensors", "causvid_jax", num_heads=2)
    jax.tree.map(np.testing.assert_array_equal, store.load_params(tmp_path / "ours.safetensors")[0], params)


def test_published_files_carry_what_their_readers_insist_on(tmp_path, save, states):
    run(save(tmp_path / "in.safetensors", states["original"]), tmp_path / "x.safetensors", "diffusers", num_heads=2)
    assert files.open_safetensors(tmp_path / "x.safetensors")[1]["format"] == "pt"


def test_both_vae_namings_are_those_of_the_state_functions(tiny_vae, vae_states):
    for naming, state in vae_states.items():
        assert {n: v.shape for n, v in state.items()} == dict(layouts.VAE.shapes(tiny_vae, naming))
    assert wan_vae.from_original(vae_states["original"], tiny_vae).keys() == {"encoder", "conv1", "conv2", "decoder"}
