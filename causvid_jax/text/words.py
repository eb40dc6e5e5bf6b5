"""Word embeddings of a closed vocabulary ``[B, length, dim]``, zero beyond the last word of a prompt."""

import string
from collections.abc import Sequence

import numpy as np

from causvid_jax.config import ConfigError, TextConfig, require, suggest

PUNCTUATION = string.punctuation + "\u2018\u2019\u201c\u201d\u2026\u2013\u2014"
LONGEST_SHOWN = 200
"""Characters of a prompt that a message repeats."""


def split_words(prompt: str, config: TextConfig) -> list[str]:
    """Return the words of a prompt, spelled as in the vocabulary; case and surrounding punctuation are ignored.

    Raises:
        ConfigError: a word outside the vocabulary.
    """
    folded = {word.casefold(): word for word in reversed(config.vocabulary)}
    words = []
    for token in prompt.split():
        word = token if token in config.vocabulary else folded.get(token.strip(PUNCTUATION).casefold())
        if word is not None:
            words.append(word)
        elif token.strip(PUNCTUATION):
            where = f"{_short(token)!r} in prompt {_short(prompt)!r}"
            raise ConfigError(f"unknown word {where}; {suggest(token, config.vocabulary)}")
    return words


def _short(text: str) -> str:
    """Return a text, or the start of a long text."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def encode_words(prompts: Sequence[str], config: TextConfig) -> np.ndarray:
    """Return the embeddings of prompts: word i is ``[onehot(word), onehot(i)]``, without parameters.

    ``onehot(word)`` has the length of the vocabulary, ``onehot(i)`` has ``config.length``; cross-attention reads the
    order of words from it. With ``config.separator`` a third part, of the length of the vocabulary, counts how often
    each word occurs in the phrase of word i (between separators); it is zero for a separator. An empty prompt is all
    zeros: the unconditional branch.

    Returns:
        float32 ``[B, length, dim]``.

    Raises:
        ConfigError: a word outside the vocabulary, or more than ``config.length`` words.
    """
    index = {word: i for i, word in enumerate(config.vocabulary)}
    embeds = np.zeros((len(prompts), config.length, config.dim), np.float32)
    for b, prompt in enumerate(prompts):
        words = split_words(prompt, config)
        require(
            len(words) <= config.length,
            f"prompt {_short(prompt)!r} has {len(words)} words; at most {config.length} are accepted",
        )
        for i, word in enumerate(words):
            embeds[b, i, index[word]] = 1.0
            embeds[b, i, len(index) + i] = 1.0
        if config.separator and words:
            is_separator = np.array(words) == config.separator
            phrase = np.cumsum(is_separator)
            same_phrase = (phrase[:, None] == phrase) & ~is_separator[:, None] & ~is_separator
            embeds[b, : len(words), -len(index) :] = same_phrase @ embeds[b, : len(words), : len(index)]
    return embeds
