"""Encode prompts as Wan2.1 does (published code, ``wan/modules/tokenizers.py``, ``t5.py``): clean, tokenize, run UMT5.

The network is :mod:`causvid_jax.models.umt5`. The tokenizer is the published ``tokenizer.json`` of google/umt5-xxl,
which Wan was trained with. The packages ``tokenizers`` and ``ftfy`` are in the extra ``text``.
"""

import dataclasses
import functools
import hashlib
import html
import importlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from causvid_jax.config import ConfigError, UMT5Config, require
from causvid_jax.config.files import reason
from causvid_jax.models import umt5
from causvid_jax.text import prompt_cache
from causvid_jax.text.prompt_cache import PromptCache

_LOG = logging.getLogger(__name__)
LENGTH = 512
_SHORTEST = 32


def clean_prompt(prompt: str) -> str:
    """Clean ``prompt`` as Wan does: repair mojibake (``ftfy``), unescape HTML twice, reduce white space to one space.

    Raises:
        ConfigError: the package ``ftfy`` is not installed.
    """
    text = _extra("ftfy").fix_text(prompt)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer, with its file's SHA-256 ``digest`` and the ids of ``<pad>`` and ``</s>``."""

    library: Any
    digest: str
    pad_id: int
    end_id: int


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Load the tokenizer in ``path``, a ``tokenizer.json`` or a folder with one.

    Raises:
        ConfigError: the package ``tokenizers`` is not installed, there is no such file, or it is no tokenizer with
            ``<pad>`` and ``</s>``.
    """
    source = pathlib.Path(path)
    if source.is_dir():
        source = source / "tokenizer.json"
    require(source.is_file(), f"tokenizer file {source} does not exist; it is the tokenizer.json of google/umt5-xxl")
    require(
        source.suffix == ".json",
        f"tokenizer file {source} is not a tokenizer.json; the one published beside it is accepted",
    )
    library = _extra("tokenizers")
    data = source.read_bytes()
    try:
        tokenizer = library.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"tokenizer file {source} cannot be read: {reason(error)}") from error
    # The file may set truncation and padding; here ``length`` decides.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {name: tokenizer.token_to_id(name) for name in ("<pad>", "</s>")}
    for name, number in special.items():
        require(number is not None, f"tokenizer file {source} has no token {name}; UMT5's tokenizer is expected")
    return Tokenizer(tokenizer, hashlib.sha256(data).hexdigest(), special["<pad>"], special["</s>"])


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids int32 ``[B, length]`` and the mask bool ``[B, length]`` of cleaned prompts.

    Every prompt ends with ``</s>``. A longer prompt is cut to ``length - 1`` tokens and ``</s>``, which is logged; a
    shorter one is padded. The mask is true for all tokens except padding.
    """
    require(length >= 1, f"text length is {length}; it must be at least 1")
    ids = np.full((len(prompts), length), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        whole = tokenizer.library.encode(prompt, add_special_tokens=False).ids
        if len(whole) >= length:
            _LOG.warning("a prompt of %d tokens is cut to the first %d: %.80s ...", len(whole), length - 1, prompt)
        tokens = [*whole[: length - 1], tokenizer.end_id]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    params: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    config: UMT5Config,
    *,
    length: int = LENGTH,
    cache: PromptCache | None = None,
    batch: int = 4,
) -> np.ndarray:
    """Return the embeddings of ``prompts``, zero beyond each prompt's last token.

    A prompt is padded to the next power of two of its length, at least 32. This changes its embeddings by rounding
    only. Equal prompts are computed once, and prompts in ``cache`` are read from it. With a cache all embeddings are
    rounded to its type.

    Args:
        prompts: raw prompts; :func:`clean_prompt` is applied.
        tokenizer: the result of :func:`load_tokenizer`.
        params: parameters of UMT5 (:func:`umt5.spec`), or a function that loads them, called only if a prompt must be
            computed.
        config: configuration of UMT5.
        length: tokens per prompt.
        cache: the cache of encoded prompts; None: no cache.
        batch: prompts per call of the network.

    Returns:
        float32 ``[B, length, config.dim]``.

    Raises:
        ConfigError: a package of the extra ``text`` is not installed, the tokenizer has more tokens than the encoder,
            or the cache cannot be written.
    """
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    embeds: dict[str, np.ndarray] = {}
    names = {}
    for prompt in dict.fromkeys(cleaned):
        if cache is not None:
            names[prompt] = prompt_cache.identity(cache, prompt, tokenizer.digest, length, config)
            stored = prompt_cache.read(cache, names[prompt])
            if stored is not None:
                embeds[prompt] = stored
    uncached = [prompt for prompt in dict.fromkeys(cleaned) if prompt not in embeds]
    if uncached:
        tree = jax.device_put(params() if callable(params) else params)
        for prompt, computed in _encode(uncached, tokenizer, tree, config, length, batch):
            embeds[prompt] = computed if cache is None else prompt_cache.write(cache, names[prompt], computed)
    out = np.zeros((len(cleaned), length, config.dim), np.float32)
    for b, prompt in enumerate(cleaned):
        out[b, : len(embeds[prompt])] = embeds[prompt]
    return out


def not_cached(
    prompts: Sequence[str], tokenizer: Tokenizer, config: UMT5Config, cache: PromptCache | None, length: int = LENGTH
) -> list[str]:
    """Return the ``prompts`` that :func:`encode_prompts` would have to compute."""
    if cache is None:
        return list(prompts)
    named = {p: prompt_cache.identity(cache, clean_prompt(p), tokenizer.digest, length, config) for p in prompts}
    return [p for p, key in named.items() if prompt_cache.read(cache, key) is None]


def _encode(
    prompts: list[str], tokenizer: Tokenizer, params: Any, config: UMT5Config, length: int, batch: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (prompt, embeddings float32 [tokens, dim]) of distinct cleaned prompts, shortest first."""
    ids, mask = tokenize(tokenizer, prompts, length)
    require(
        ids.max(initial=0) < config.vocab_size,
        f"the tokenizer gives token {ids.max(initial=0)}, beyond the encoder's umt5.vocab_size {config.vocab_size}",
    )
    counts = mask.sum(1)
    padded = np.minimum(length, np.maximum(_SHORTEST, 2 ** np.ceil(np.log2(counts)).astype(int)))
    for size in np.unique(padded):
        same = np.flatnonzero(padded == size)
        for numbers in (same[i : i + batch] for i in range(0, len(same), batch)):
            computed = np.asarray(_forward(params, ids[numbers, :size], mask[numbers, :size], config=config))
            yield from ((prompts[n], computed[i, : counts[n]]) for i, n in enumerate(numbers))


_forward = functools.partial(jax.jit, static_argnames="config")(umt5.encode)


def _extra(package: str) -> Any:
    """Import a package of the extra ``text``."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"UMT5 prompts need the package {package!r}; install the extra: pip install 'causvid_jax[text]'"
        ) from error
