"""Published names and layouts of TAEHV, both ways."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from causvid_jax.checkpoints import store, taehv, workdir
from causvid_jax.config import ConfigError, TAEHVConfig
from causvid_jax.models import taehv as model

CONFIG = TAEHVConfig(z_dim=2, encoder_dim=3, decoder_dims=(5, 4, 3, 2))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), model.abstract(CONFIG))


def test_round_trip_is_bit_exact(params):
    state = taehv.to_published(params, CONFIG)
    assert {name: value.shape for name, value in state.items()} == taehv.published_shapes(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, taehv.from_published(state, CONFIG), params)
    assert len(state) == len(jax.tree.leaves(params))


def test_half_precision_files_come_back_as_they_were(params):
    """The published files are float16; our parameters are float32, which holds every float16."""
    state = {name: value.astype(np.float16) for name, value in taehv.to_published(params, CONFIG).items()}
    loaded = taehv.from_published(state, CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    back = taehv.to_published(loaded, CONFIG)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name].astype(np.float16), value)


def test_published_names_and_shapes():
    """As they stand in the published definition, at full size."""
    shapes = taehv.published_shapes()
    assert len(shapes) == 2 * 4 + 3 * 2 * (2 + 3 * 6)
    for name, shape in (
        ("encoder.0.weight", (64, 3, 3, 3)),
        ("encoder.2.conv.weight", (64, 128, 1, 1)),
        ("encoder.3.weight", (64, 64, 3, 3)),
        ("encoder.4.conv.0.weight", (64, 128, 3, 3)),
        ("encoder.6.conv.4.bias", (64,)),
        ("encoder.12.conv.weight", (64, 64, 1, 1)),
        ("encoder.16.conv.2.weight", (64, 64, 3, 3)),
        ("encoder.17.weight", (16, 64, 3, 3)),
        ("encoder.17.bias", (16,)),
        ("decoder.1.weight", (256, 16, 3, 3)),
        ("decoder.3.conv.0.weight", (256, 512, 3, 3)),
        ("decoder.7.conv.weight", (256, 256, 1, 1)),
        ("decoder.8.weight", (128, 256, 3, 3)),
        ("decoder.11.conv.4.bias", (128,)),
        ("decoder.13.conv.weight", (256, 128, 1, 1)),
        ("decoder.14.weight", (64, 128, 3, 3)),
        ("decoder.17.conv.2.weight", (64, 64, 3, 3)),
        ("decoder.19.conv.weight", (128, 64, 1, 1)),
        ("decoder.20.weight", (64, 64, 3, 3)),
        ("decoder.22.weight", (3, 64, 3, 3)),
        ("decoder.22.bias", (3,)),
    ):
        assert shapes[name] == shape, name
    # Upsampling, growing, pooling and the strided convolutions have no biases.
    assert not shapes.keys() & {f"decoder.{i}.bias" for i in (8, 14, 20)} | shapes.keys() & {"encoder.3.bias"}


def test_refusals(params):
    state = taehv.to_published(params, CONFIG)
    with pytest.raises(ConfigError, match="1 tensor\\(s\\) missing, first decoder.22.bias"):
        taehv.from_published({name: value for name, value in state.items() if name != "decoder.22.bias"}, CONFIG)
    with pytest.raises(ConfigError, match="1 tensor\\(s\\) unexpected, first extra"):
        taehv.from_published({**state, "extra": np.zeros(1)}, CONFIG)
    with pytest.raises(ConfigError, match="decoder.22.bias \\(3, 1\\) instead of \\(3,\\)"):
        taehv.from_published({**state, "decoder.22.bias": np.zeros((3, 1))}, CONFIG)


def test_a_working_directory_may_have_the_published_file(params, tmp_path):
    with pytest.raises(ConfigError, match="holds no weights of TAEHV; accepted: taehv/weights.safetensors, taew2_1.sa"):
        workdir.find_taehv("tiny", tmp_path)
    state = {name: np.ascontiguousarray(value) for name, value in taehv.to_published(params, CONFIG).items()}
    safetensors.numpy.save_file(state, tmp_path / "taew2_1.safetensors", {"format": "pt"})
    jax.tree.map(
        np.testing.assert_array_equal, workdir.load_taehv(workdir.find_taehv("tiny", tmp_path), CONFIG), params
    )
    store.save_params(workdir.stage_path(tmp_path, "taehv"), params, {})
    assert workdir.find_taehv("tiny", tmp_path) == tmp_path / "taehv" / "weights.safetensors"
