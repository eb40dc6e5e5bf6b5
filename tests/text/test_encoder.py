"""A recipe's text encoder: what files it looks for, what it keeps, and that it gives what the network gives."""

import dataclasses
import pathlib

import jax
import make_umt5 as golden
import numpy as np
import pytest

from causvid_jax.checkpoints import store, workdir
from causvid_jax.config import ConfigError, Recipe, TextConfig, TransformerConfig, UMT5Config
from causvid_jax.models import umt5
from causvid_jax.text import encoder, tokenizer
from tests.refusals import refused

pytest.importorskip("tokenizers", reason="the extra 'text' is not installed")
pytest.importorskip("ftfy", reason="the extra 'text' is not installed")

NET = TransformerConfig(
    dim=16, ffn_dim=16, num_heads=2, num_layers=1, text_dim=golden.SIZES["dim"], text_length=32, freq_dim=8
)
RECIPE = Recipe(
    name="tiny",
    text=TextConfig(kind="umt5", length=32, dim=golden.SIZES["dim"], negative_prompt="neon"),
    umt5=UMT5Config(**golden.SIZES, dtype="float32"),
    teacher=NET,
    student=NET,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint")
    store.save_params(workdir.stage_path(place, "text_encoder"), umt5.init(jax.random.key(0), RECIPE.umt5), {})
    (place / "text_encoder" / "tokenizer.json").write_text(golden.small_tokenizer(), encoding="utf-8")
    return place


def test_rows_are_the_networks_and_are_kept(folder, tmp_path, monkeypatch):
    reader = encoder.open_encoder(RECIPE, folder, cache=tmp_path / "kept")
    assert encoder.missing(reader, ["warm neon", "neon"]) == ["warm neon", "neon"]
    rows = encoder.encode(reader, ["warm neon", "neon"])
    params, _ = store.load_params(workdir.stage_path(folder, "text_encoder"))
    expected = tokenizer.encode_prompts(["warm neon", "neon"], reader.tokenizer, params, RECIPE.umt5, length=32)
    np.testing.assert_array_equal(rows, expected)
    monkeypatch.setattr(encoder, "_load", lambda _: pytest.fail("the weights were read again"))
    assert encoder.missing(reader, ["warm  neon"]) == []
    again = encoder.open_encoder(RECIPE, folder, cache=tmp_path / "kept", compute=False)
    np.testing.assert_array_equal(encoder.encode(again, ["warm neon"]), rows[:1])
    np.testing.assert_array_equal(encoder.negative_prompt_embeds(again), rows[1])
    refused("1 prompt.s. are not encoded yet, first 'cold'; .*--stage=prompts", encoder.encode, again, ["neon", "cold"])


def test_filling_reads_the_weights_once(folder, tmp_path, monkeypatch):
    reader = encoder.open_encoder(RECIPE, folder, cache=tmp_path / "kept")
    loads, load = [], encoder._load
    monkeypatch.setattr(encoder, "_load", lambda e: loads.append(e) or load(e))
    monkeypatch.setattr(encoder, "AT_ONCE", 2)
    encoder.fill(reader, ["warm", "neon", "warm neon"])
    assert len(loads) == 1 and encoder.missing(reader, ["warm", "neon", "warm neon"]) == []
    encoder.fill(reader, ["neon"])
    assert len(loads) == 1
    refused("without a prompt cache", encoder.fill, encoder.open_encoder(RECIPE, folder, cache=""), ["neon"])


def stands_for(params):
    """Return int8 weights as what they stand for."""
    if not isinstance(params, dict):
        return params
    if "int8" in params:
        return params["int8"] * params["scale"]
    return {name: stands_for(value) for name, value in params.items()}


@pytest.mark.parametrize("dtype,atol", [("float32", 2e-5), ("bfloat16", 0.1)])
def test_int8_weights_are_rounded_by_channel_and_kept_apart(folder, tmp_path, dtype, atol):
    """The rows are those of the rounded weights, near those of the weights, and no prompt file mixes them."""
    sizes = dataclasses.replace(RECIPE.umt5, dtype=dtype, weights="int8")
    reader = encoder.open_encoder(dataclasses.replace(RECIPE, umt5=sizes), folder, cache=tmp_path / "kept")
    params, held = encoder._load(reader), encoder.inference_shapes(sizes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), held)
    whole, _ = store.load_params(workdir.stage_path(folder, "text_encoder"))
    for path in (("blocks", "ffn", "fc2", "kernel"), ("blocks", "attn", "q", "kernel"), ("token_embedding",)):
        ours, exact = params, whole
        for name in path:
            ours, exact = ours[name], exact[name]
        scale = np.abs(exact).max(-1 if len(path) == 1 else -2, keepdims=True) / 127
        np.testing.assert_allclose(ours["scale"], scale, rtol=1e-6 if dtype == "float32" else 5e-3)
        bound = 0.5001 * scale if dtype == "float32" else 0.5001 * scale + np.abs(exact) * 2**-8
        assert ours["int8"].dtype == np.int8 and np.all(np.abs(ours["int8"] * ours["scale"] - exact) <= bound)
    rows = encoder.encode(reader, ["warm neon"])
    plain = dataclasses.replace(RECIPE.umt5, dtype="float32")
    oracle = tokenizer.encode_prompts(["warm neon"], reader.tokenizer, stands_for(params), plain, length=32)
    np.testing.assert_allclose(rows, oracle, atol=atol)
    exact = tokenizer.encode_prompts(["warm neon"], reader.tokenizer, whole, plain, length=32)
    assert 1e-4 < np.abs(rows - exact).max() < 0.1 * np.abs(exact).max()
    assert encoder.missing(encoder.open_encoder(RECIPE, folder, cache=tmp_path / "kept"), ["warm neon"])


def test_the_files_it_looks_for(folder, tmp_path):
    refused("give the folder of a checkpoint", encoder.open_encoder, RECIPE)
    with pytest.raises(ConfigError, match="text_encoder/weights.safetensors does not exist .* copy the published one"):
        encoder.open_encoder(RECIPE, tmp_path)
    large = dataclasses.replace(RECIPE, umt5=dataclasses.replace(RECIPE.umt5, num_layers=5))
    refused("text_encoder/weights.safetensors does not fit the configuration", encoder.open_encoder, large, folder)
    weights = workdir.stage_path(tmp_path, "text_encoder")
    weights.parent.mkdir()
    weights.symlink_to(workdir.stage_path(folder, "text_encoder"))
    with pytest.raises(
        ConfigError, match="tokenizer of google/umt5-xxl; accepted: text_encoder/tokenizer.json, tokenizer/.*"
    ):
        encoder.open_encoder(RECIPE, tmp_path)
    file = folder / "text_encoder" / "tokenizer.json"
    digest = encoder.open_encoder(RECIPE, folder).tokenizer.digest
    published = tmp_path / "google" / "umt5-xxl" / "tokenizer.json"
    published.parent.mkdir(parents=True)
    published.write_text(file.read_text())
    reader = encoder.open_encoder(RECIPE, tmp_path)
    assert reader.tokenizer.digest == digest and reader.cache.folder == pathlib.Path(tmp_path) / "prompts"
    assert reader.cache.weights == store.open_own(weights)[1] and reader.cache.dtype == "float32"
    assert encoder.open_encoder(RECIPE, tmp_path, cache="").cache is None


def test_words_need_no_files():
    text = TextConfig(kind="words", vocabulary=("red", "3"), length=2, dim=4)
    net = dataclasses.replace(NET, text_dim=4, text_length=2)
    reader = encoder.open_encoder(dataclasses.replace(RECIPE, text=text, teacher=net, student=net))
    np.testing.assert_array_equal(encoder.encode(reader, ["red 3"]), [[[1, 0, 1, 0], [0, 1, 0, 1]]])
    assert not encoder.negative_prompt_embeds(reader).any() and encoder.missing(reader, ["red"]) == []
    refused("unknown word 'blue'", encoder.check, reader, ["blue"])


def test_an_encoder_of_another_width_is_refused():
    refused("umt5.dim is 4096; text.dim is 16, and they must be equal", dataclasses.replace, RECIPE, umt5=UMT5Config())
