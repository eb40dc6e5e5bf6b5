"""Prompts to text rows ``[B, length, dim]``, zero beyond the prompt's last token (as Wan zero-pads umT5's output)."""

import difflib
from collections.abc import Sequence

import numpy as np

from causvid_jax.config import ConfigError, TextConfig, require


def encode_words(prompts: Sequence[str], config: TextConfig) -> np.ndarray:
    """Closed-vocabulary encoding: row i is the one-hot of word i beside the one-hot of position i.

    The position is part of the row because cross-attention has no other way to tell word order. With
    ``config.separator`` a row goes on with how often each word of the vocabulary is in its phrase, from one separator
    to the next; the separator's own row has zeros there. An empty prompt is all zeros: the unconditional branch.
    Returns float32 ``[B, length, dim]``; a word outside the vocabulary or a prompt that is too long is a ConfigError.
    """
    index = {word: i for i, word in enumerate(config.vocabulary)}
    rows = np.zeros((len(prompts), config.length, config.dim), np.float32)
    for b, prompt in enumerate(prompts):
        words = prompt.split()
        require(
            len(words) <= config.length,
            f"prompt {prompt!r} has {len(words)} words; at most {config.length} are accepted",
        )
        for i, word in enumerate(words):
            if word not in index:
                close = difflib.get_close_matches(word, config.vocabulary, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ConfigError(f"unknown word {word!r} in prompt {prompt!r}; {hint}accepted: {' '.join(index)}")
            rows[b, i, index[word]] = 1.0
            rows[b, i, len(index) + i] = 1.0
        if config.separator and words:
            apart = np.array(words) == config.separator
            phrase = np.cumsum(apart)
            together = (phrase[:, None] == phrase) & ~apart[:, None] & ~apart
            rows[b, : len(words), -len(index) :] = together @ rows[b, : len(words), : len(index)]
    return rows
