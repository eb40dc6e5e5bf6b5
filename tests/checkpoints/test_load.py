"""Loading: every format into the same parameters, onto devices and meshes, in the types asked for; refusals."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from causvid_jax.checkpoints import checkpoint, load, open_checkpoint, state_dict, store
from causvid_jax.config import ConfigError, UMT5Config
from tests.checkpoints.tiny_files import EVERY, TINY, TINY_VAE, published
from tests.refusals import refused

# (our parameter, layer, original key, diffusers key) of all that shapes cannot tell apart; written by hand from the
# published code. Kernels are transposed.
TRANSFORMER_KEYS = [
    (f"blocks/{ours}/kernel", 1, f"blocks.1.{original}.weight", f"blocks.1.{diffusers}.weight")
    for ours, original, diffusers in (
        ("self_attn/q", "self_attn.q", "attn1.to_q"),
        ("self_attn/k", "self_attn.k", "attn1.to_k"),
        ("self_attn/v", "self_attn.v", "attn1.to_v"),
        ("self_attn/o", "self_attn.o", "attn1.to_out.0"),
        ("cross_attn/q", "cross_attn.q", "attn2.to_q"),
        ("cross_attn/k", "cross_attn.k", "attn2.to_k"),
        ("cross_attn/v", "cross_attn.v", "attn2.to_v"),
        ("cross_attn/o", "cross_attn.o", "attn2.to_out.0"),
        ("ffn/fc1", "ffn.0", "ffn.net.0.proj"),
        ("ffn/fc2", "ffn.2", "ffn.net.2"),
    )
] + [
    ("blocks/self_attn/norm_q/scale", 2, "blocks.2.self_attn.norm_q.weight", "blocks.2.attn1.norm_q.weight"),
    ("blocks/self_attn/norm_k/scale", 2, "blocks.2.self_attn.norm_k.weight", "blocks.2.attn1.norm_k.weight"),
    ("blocks/cross_attn/norm_q/scale", 0, "blocks.0.cross_attn.norm_q.weight", "blocks.0.attn2.norm_q.weight"),
    ("blocks/cross_attn/norm_k/scale", 0, "blocks.0.cross_attn.norm_k.weight", "blocks.0.attn2.norm_k.weight"),
    ("blocks/norm3/bias", 0, "blocks.0.norm3.bias", "blocks.0.norm2.bias"),
    ("text_embedding/fc2/kernel", None, "text_embedding.2.weight", "condition_embedder.text_embedder.linear_2.weight"),
    ("time_embedding/fc2/kernel", None, "time_embedding.2.weight", "condition_embedder.time_embedder.linear_2.weight"),
]
UMT5_KEYS = [
    ("blocks/attn/q/kernel", 1, "blocks.1.attn.q.weight", "encoder.block.1.layer.0.SelfAttention.q.weight"),
    ("blocks/attn/k/kernel", 1, "blocks.1.attn.k.weight", "encoder.block.1.layer.0.SelfAttention.k.weight"),
    ("blocks/attn/v/kernel", 1, "blocks.1.attn.v.weight", "encoder.block.1.layer.0.SelfAttention.v.weight"),
    ("blocks/norm2/scale", 2, "blocks.2.norm2.weight", "encoder.block.2.layer.1.layer_norm.weight"),
    ("blocks/ffn/gate/kernel", 0, "blocks.0.ffn.gate.0.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks/ffn/fc1/kernel", 0, "blocks.0.ffn.fc1.weight", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"),
]


@pytest.mark.parametrize("keys,config", [(TRANSFORMER_KEYS, TINY), (UMT5_KEYS, EVERY[3])], ids=("transformer", "umt5"))
@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_each_tensor_becomes_the_parameter_that_the_published_code_makes_of_it(keys, config, form):
    params, state = published(config, form)
    loaded = store.flatten(load(state, config=config)[0])
    for path, layer, original, diffusers in keys:
        tensor = state[original if form == "original" else diffusers]
        value = loaded[path] if layer is None else loaded[path][layer]
        np.testing.assert_array_equal(value, tensor.T if path.endswith("kernel") else tensor, err_msg=path)


def test_layouts_of_tensors_that_are_no_plain_matrices(states, params):
    patch = states["original"]["patch_embedding.weight"]  # [out, in, 1, 2, 2]
    ours = params["patch_embedding"]["kernel"].reshape(1, 2, 2, 4, 24)
    assert patch[5, 3, 0, 1, 0] == ours[0, 1, 0, 3, 5]
    np.testing.assert_array_equal(states["original"]["head.modulation"], params["head"]["modulation"][None])
    clip = EVERY[4]
    tree, state = published(clip, "original")
    fused = state["visual.transformer.1.attn.to_qkv.weight"]
    for third, name in enumerate("qkv"):
        np.testing.assert_array_equal(fused[third * 80 : third * 80 + 80].T, tree["blocks"]["attn"][name]["kernel"][1])
    np.testing.assert_array_equal(state["visual.head"], tree["projection"]["kernel"])
    tree, state = published(TINY_VAE, "original")
    kernel = tree["encoder"]["conv1"]["kernel"]  # [kt, kh, kw, in, out]
    assert state["encoder.conv1.weight"][2, 1, 0, 1, 2] == kernel[0, 1, 2, 1, 2]
    assert state["encoder.middle.1.norm.gamma"].shape[1:] == (1, 1)
    assert state["encoder.head.0.gamma"].shape[1:] == (1, 1, 1)


def test_half_precision_and_a_tree_of_types(states, params):
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in states["original"].items()}
    loaded, _ = load(half, config=TINY)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(loaded["head"]["proj"]["bias"], half["head.head.bias"].astype(np.float32))
    kept, _ = load(half, config=TINY, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    types = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    types["head"]["proj"]["bias"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    mixed, _ = load(states["diffusers"], config=TINY, dtype=types)
    assert mixed["head"]["proj"]["bias"].dtype == jnp.float32 and mixed["head"]["modulation"].dtype == jnp.bfloat16
    stacked = half | {"blocks.1.norm3.bias": np.zeros(24, np.float16)}
    refused("layers of blocks/norm3/bias are stored as bfloat16 and float16", load, stacked, config=TINY, dtype=None)
    refused("is int32; accepted: floating types", load, half | {"head.head.bias": np.zeros(16, np.int32)}, config=TINY)
    with pytest.raises(ConfigError, match="types do not fit the parameters .missing: blocks/"):
        load(half, config=TINY, dtype={"head": {"modulation": jnp.float32}})


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def split(mesh, leaf):
    """Return a sharding that splits the last axis that four divides, and the first other one that two does."""
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


@pytest.mark.parametrize("form", ["original", "diffusers", "causvid_jax"])
def test_onto_a_mesh_each_part_is_read_once(tmp_path, save, params, states, mesh, form, monkeypatch):
    path = tmp_path / "in.safetensors"
    if form == "causvid_jax":
        store.save_params(path, params, {})
    else:
        save(path, states[form])
    shardings = jax.tree.map(lambda leaf: split(mesh, leaf), params)
    read, sizes = checkpoint.read_array, []

    def counted(*arguments):
        part = read(*arguments)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(checkpoint, "read_array", counted)
    loaded, _ = load(path, shardings, config=TINY)

    def compare(array, expected, sharding):
        assert array.sharding == sharding and array.dtype == jnp.float32
        np.testing.assert_array_equal(array, expected)

    jax.tree.map(compare, loaded, params, shardings)
    kernel = loaded["blocks"]["ffn"]["fc1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 12, 10)}
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))
    with pytest.raises(ConfigError, match="shardings do not fit the parameters .missing: blocks/"):
        load(path, {"head": {"modulation": None}}, config=TINY)


def test_a_nan_or_an_infinity_names_its_tensor(states):
    for value in (np.nan, np.inf, -np.inf):
        for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
            bad = {name: array.astype(kind) for name, array in states["original"].items()}
            bad["blocks.1.ffn.0.weight"][3, 2] = value
            refused("tensor blocks.1.ffn.0.weight of .* holds a NaN or an inf", load, bad, config=TINY, dtype=None)


def test_a_changed_file_of_ours_is_refused_unless_it_was_checked_before(tmp_path, params):
    path = tmp_path / "ours.safetensors"
    store.save_params(path, params, {"recipe": "x"})
    assert open_checkpoint(path, TINY).identity() == store.open_own(path)[1]
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    refused("ours.safetensors is corrupt", load, path, config=TINY)
    load(path, config=TINY, check=False)


def test_an_identity_changes_with_any_tensor(states):
    opened = open_checkpoint(states["original"], TINY)
    other = states["original"] | {"head.head.bias": states["original"]["head.head.bias"] + 1}
    assert opened.identity() == open_checkpoint(dict(states["original"]), TINY).identity()
    assert opened.identity() != open_checkpoint(other, TINY).identity()


def test_tied_embeddings(tmp_path, save):
    config = UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3)
    params, state = published(config, "diffusers")
    copy = {"encoder.embed_tokens.weight": state["shared.weight"]}
    alone = {name: value for name, value in state.items() if name != "shared.weight"} | copy
    for held in (state, alone, state | copy, state | {"spiece_model": np.zeros(9, np.uint8)}):
        loaded, _ = load(save(tmp_path / "umt5.safetensors", held))
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    other = state | {"encoder.embed_tokens.weight": state["shared.weight"] + 1}
    refused("holds two different tensors shared.weight", load, save(tmp_path / "umt5.safetensors", other))


def test_state_dict_refuses_other_sizes_and_formats(params):
    with pytest.raises(ConfigError, match="format is 'diffusers'; accepted: original, causvid_jax"):
        state_dict(published(EVERY[5], "original")[0], EVERY[5], "diffusers")
    refused("weights in memory does not fit the configuration", state_dict, {"head": params["head"]}, TINY, "original")
    half = state_dict(params, TINY, "original", dtype="float16")
    assert {value.dtype for value in half.values()} == {np.dtype(np.float16)}
