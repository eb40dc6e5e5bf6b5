"""Prompts: cleaning, tokens and rows, with a small tokenizer in the published file format."""

import functools
import json
import sys

import jax
import make_umt5 as golden
import numpy as np
import pytest

from causvid_jax.config import ConfigError, UMT5Config
from causvid_jax.models import umt5
from causvid_jax.text import tokenizer as prompts
from causvid_jax.text.prompt_cache import PromptCache
from configs.wan_1_3b import NEGATIVE_PROMPT
from tests.refusals import refused

pytest.importorskip("tokenizers", reason="the extra 'text' is not installed")
pytest.importorskip("ftfy", reason="the extra 'text' is not installed")

CONFIG = UMT5Config(**golden.SIZES, dtype="float32")
LENGTH = 48
TEXTS = ["warm neon", "", golden.PROMPTS[0], " warm   neon\n"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(golden.small_tokenizer(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(file):
    return prompts.load_tokenizer(file.parent)


@pytest.fixture(scope="module")
def params():
    return umt5.init(jax.random.key(3), CONFIG)


@pytest.mark.parametrize(
    "prompt, cleaned",
    [
        ("  a\t cat \r\n\n on\u3000a\u00a0mat ", "a cat on a mat"),
        ("black &amp;amp; white&nbsp;&lt;b&gt;", "black & white <b>"),
        ("schÃ¶n âœ”", "schön ✔"),
        ("\x1b[31mred\x07", "red"),
        ("", ""),
    ],
)
def test_clean_prompt(prompt, cleaned):
    assert prompts.clean_prompt(prompt) == cleaned


def test_cleaning_is_stable_and_narrows_full_width_commas():
    cleaned = prompts.clean_prompt(NEGATIVE_PROMPT)
    assert cleaned == NEGATIVE_PROMPT.replace("，", ",") == prompts.clean_prompt(cleaned)
    assert len(cleaned.split(",")) == 28


def test_tokens_end_and_are_padded_whatever_the_file_says(tokenizer):
    ids, mask = prompts.tokenize(tokenizer, ["warm neon", ""], LENGTH)
    assert (ids.shape, ids.dtype, mask.dtype) == ((2, LENGTH), np.int32, bool)
    assert (tokenizer.pad_id, tokenizer.end_id) == (0, 1)
    for row, valid, text in zip(ids, mask, ["warm neon", ""], strict=True):
        # The file's own template, which appends </s>, is the oracle.
        expected = tokenizer.library.encode(text).ids
        assert row[valid].tolist() == expected and expected[-1] == 1
        assert valid.tolist() == [True] * len(expected) + [False] * (LENGTH - len(expected))
        assert not row[~valid].any()
    assert tokenizer.library.decode(ids[0, mask[0]].tolist()) == "warm neon"
    assert mask[1].sum() == 1


def test_a_long_prompt_is_cut_before_its_end(tokenizer, caplog):
    whole = tokenizer.library.encode("word " * 60).ids
    for length in (1, 2, 20, len(whole) - 1, len(whole)):
        ids, mask = prompts.tokenize(tokenizer, ["word " * 60], length)
        assert mask.all() and ids[0].tolist() == [*whole[: length - 1], 1]
        cut = f"a prompt of {len(whole) - 1} tokens is cut to the first {length - 1}: word"
        assert (cut in caplog.text) == (length < len(whole)), length
        caplog.clear()
    refused("text length is 0; it must be at least 1", prompts.tokenize, tokenizer, ["a"], 0)


def test_tokenizer_files_that_do_not_fit(tmp_path, file):
    refused("tokenizer.json does not exist; it is the tokenizer.json of google", prompts.load_tokenizer, tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\x0a")
    refused("spiece.model is not a tokenizer.json", prompts.load_tokenizer, tmp_path / "spiece.model")
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    refused("cannot be read: ", prompts.load_tokenizer, bad)
    bad.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens": []}).replace("</s>", "<end>"))
    refused("has no token </s>", prompts.load_tokenizer, bad)


@pytest.mark.parametrize("package, call", [("tokenizers", prompts.load_tokenizer), ("ftfy", prompts.clean_prompt)])
def test_a_missing_extra_says_how_to_install_it(monkeypatch, file, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    refused(f"need the package '{package}'; .*causvid_jax\\[text\\]", call, str(file))


def test_rows_are_the_encoders_at_full_length(tokenizer, params):
    ids, mask = prompts.tokenize(tokenizer, [prompts.clean_prompt(t) for t in TEXTS], LENGTH)
    expected = jax.jit(functools.partial(umt5.encode, config=CONFIG))(params, ids, mask)
    rows = prompts.encode_prompts(TEXTS, tokenizer, params, CONFIG, length=LENGTH, batch=2)
    assert (rows.shape, rows.dtype) == ((4, LENGTH, CONFIG.dim), np.float32)
    np.testing.assert_allclose(rows, expected, atol=2e-5)
    assert not rows[~mask].any() and (np.abs(rows).max(-1) > 0).sum(1).tolist() == mask.sum(1).tolist()
    np.testing.assert_array_equal(rows[0], rows[3])
    assert prompts.encode_prompts([], tokenizer, params, CONFIG).shape == (0, 512, CONFIG.dim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_answers_without_weights(monkeypatch, tmp_path, tokenizer, params, dtype):
    calls = []

    def counted(params, ids, mask, *, config):
        calls.append(ids.shape)
        return umt5_forward(params, ids, mask, config=config)

    umt5_forward = prompts._forward
    monkeypatch.setattr(prompts, "_forward", counted)
    encode = functools.partial(prompts.encode_prompts, tokenizer=tokenizer, config=CONFIG, length=LENGTH)
    plain = encode(TEXTS, params=params)
    assert sorted(calls) == [(1, 48), (2, 32)]  # three distinct prompts, short ones short

    calls.clear()
    cache = PromptCache(tmp_path, "digest", dtype)
    made = encode(TEXTS[:2], params=lambda: params, cache=cache)
    np.testing.assert_allclose(made, plain[:2], rtol=0 if dtype == "float32" else 2.0**-8)

    def unavailable():
        raise AssertionError("the weights were loaded")

    np.testing.assert_array_equal(encode(TEXTS[:2], params=unavailable, cache=cache), made)
    assert calls == [(2, 32)]
    encode(TEXTS, params=params, cache=cache)
    assert calls == [(2, 32), (1, 48)]
    with pytest.raises(AssertionError, match="were loaded"):
        encode(TEXTS, params=unavailable, cache=PromptCache(tmp_path, "other weights", dtype))


def test_a_tokenizer_of_another_encoder_is_refused(tokenizer, params):
    small = UMT5Config(**{**golden.SIZES, "vocab_size": 4}, dtype="float32")
    with pytest.raises(ConfigError, match=r"gives token \d+, beyond the encoder's umt5.vocab_size 4"):
        prompts.encode_prompts(["warm neon"], tokenizer, params, small)
