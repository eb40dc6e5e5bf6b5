"""Rows of the closed vocabulary, against rows written by hand."""

import numpy as np
import pytest

from causvid_jax.config import ConfigError, TextConfig
from causvid_jax.text.words import encode_words
from tests.refusals import refused

WORDS = ("red", "blue", "1", "and")
PLAIN = TextConfig(kind="words", vocabulary=WORDS, length=5, dim=9)
PHRASES = TextConfig(kind="words", vocabulary=WORDS, length=5, dim=13, separator="and")


def test_a_row_is_the_word_and_its_place():
    rows = encode_words(["blue 1", ""], PLAIN)
    assert rows.shape == (2, 5, 9) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows[0, 0], [0, 1, 0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows[0, 1], [0, 0, 1, 0, 0, 1, 0, 0, 0])
    assert not rows[0, 2:].any() and not rows[1].any()


def test_a_phrase_counts_its_own_words_only():
    prompts = ["red 1 and 1 1", "blue", "", "red and and blue"]
    rows = encode_words(prompts, PHRASES)
    np.testing.assert_array_equal(rows[..., :9], encode_words(prompts, PLAIN))
    expected = [
        [[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 2, 0]],
        [[0, 1, 0, 0], *[[0, 0, 0, 0]] * 4],
        [[0, 0, 0, 0]] * 5,
        [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    ]
    np.testing.assert_array_equal(rows[..., 9:], expected)


def test_refused_prompts():
    refused("unknown word 'rde' in prompt 'rde 1'; did you mean 'red'", encode_words, ["rde 1"], PLAIN)
    refused("has 6 words; at most 5 are accepted", encode_words, ["1 1 1 1 1 1"], PLAIN)
    for prompt in ("x" * 10**5, "1 " * 10**5):
        with pytest.raises(ConfigError) as error:
            encode_words([prompt], PLAIN)
        assert len(str(error.value)) < 600


def test_case_and_punctuation_are_ignored():
    expected = encode_words(["red 1 and blue 1"], PHRASES)
    np.testing.assert_array_equal(encode_words(["Red 1, AND \u201cblue\u201d \u2014 1."], PHRASES), expected)
    refused("unknown word '\u00b9'", encode_words, ["red \u00b9"], PLAIN)
