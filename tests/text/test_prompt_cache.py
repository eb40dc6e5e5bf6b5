"""Encoded prompts on disk: found by everything they depend on, and by nothing less."""

import logging

import numpy as np
import pytest
import safetensors

from causvid_jax.config import UMT5Config
from causvid_jax.text import prompt_cache
from causvid_jax.text.prompt_cache import PromptCache
from tests.refusals import refused

CONFIG = UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=1)
ROWS = np.random.default_rng(0).standard_normal((5, CONFIG.dim)).astype(np.float32)


def identity(cache, prompt="a cat", tokenizer="t", length=512, config=CONFIG):
    return prompt_cache.identity(cache, prompt, tokenizer, length, config)


@pytest.mark.parametrize("dtype, bits", [("float32", 32), ("bfloat16", 8)])
def test_what_is_written_is_read(tmp_path, dtype, bits):
    cache = PromptCache(tmp_path / "deep", "w", dtype)
    who = identity(cache)
    assert prompt_cache.read(cache, who) is None
    stored = prompt_cache.write(cache, who, ROWS)
    found = prompt_cache.read(cache, who)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, stored)
    assert np.max(np.abs(found - ROWS) / np.abs(ROWS)) <= 2.0**-bits
    # Rows as they are, in the stored type, with their origin.
    with safetensors.safe_open(str(prompt_cache.path(cache, who)), framework="np") as file:
        assert file.get_tensor("rows").dtype.name == dtype and file.get_tensor("rows").shape == ROWS.shape
        assert file.metadata()["prompt"] == "a cat"


def test_anything_else_is_not_found(tmp_path):
    cache = PromptCache(tmp_path, "w", "float32")
    prompt_cache.write(cache, identity(cache), ROWS)
    others = [
        (cache, {"prompt": "a cat "}),
        (cache, {"tokenizer": "t2"}),
        (cache, {"length": 256}),
        (cache, {"config": UMT5Config(**{**vars(CONFIG), "dtype": "float32"})}),
        (PromptCache(tmp_path, "w2", "float32"), {}),
        (PromptCache(tmp_path, "w", "bfloat16"), {}),
    ]
    for other, changes in others:
        assert prompt_cache.read(other, identity(other, **changes)) is None, changes


def test_a_half_written_file_is_made_again(tmp_path, caplog):
    cache = PromptCache(tmp_path, "w", "float32")
    who = identity(cache)
    prompt_cache.write(cache, who, ROWS)
    file = prompt_cache.path(cache, who)
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], whole[:-2] + b"xx"):
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert prompt_cache.read(cache, who) is None
        assert str(file) in caplog.text and "the prompt is encoded again" in caplog.text
        caplog.clear()
        prompt_cache.write(cache, who, ROWS)
        np.testing.assert_array_equal(prompt_cache.read(cache, who), ROWS)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [file.name]


def test_a_file_under_anothers_name_is_not_believed(tmp_path):
    cache = PromptCache(tmp_path, "w")
    prompt_cache.write(cache, identity(cache, prompt="a dog"), ROWS)
    target = prompt_cache.path(cache, identity(cache))
    target.parent.mkdir(exist_ok=True)
    prompt_cache.path(cache, identity(cache, prompt="a dog")).rename(target)
    assert prompt_cache.read(cache, identity(cache)) is None


def test_refusals(tmp_path):
    refused("prompt cache dtype is 'float16'; accepted: float32, bfloat16", PromptCache, tmp_path, "w", "float16")
    refused("needs a digest of the encoder's weights", PromptCache, tmp_path, "")
    (tmp_path / "file").write_text("")
    cache = PromptCache(tmp_path / "file", "w")
    refused("cannot be written: Not a directory", prompt_cache.write, cache, identity(cache), ROWS)
