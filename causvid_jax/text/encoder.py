"""The text encoder of a recipe: encode prompts as embeddings ``[B, length, dim]``, for every ``text.kind``.

``words`` needs no files (:mod:`causvid_jax.text.words`). ``umt5`` reads these from the folder of a checkpoint:

    text_encoder/                        the encoder, ours or published (``checkpoints.workdir.components``)
    text_encoder/tokenizer.json          the tokenizer of google/umt5-xxl; published folders have it elsewhere
                                         (``checkpoints.workdir.TOKENIZERS``)
    prompts/                             the cache of encoded prompts, filled on demand

The weights are loaded only if a prompt is not in the cache. They are freed after it is encoded.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from causvid_jax.checkpoints import Checkpoint, load, open_checkpoint, workdir
from causvid_jax.config import ConfigError, Recipe, TextConfig, UMT5Config, require
from causvid_jax.models import umt5
from causvid_jax.sharding.params import inference_tree
from causvid_jax.text import tokenizer as umt5_prompts
from causvid_jax.text import words
from causvid_jax.text.prompt_cache import PromptCache

AT_ONCE = 256
"""Prompts that :func:`fill` holds in memory at a time: 2 GB of Wan's embeddings in float32."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An opened text encoder, made by :func:`open_encoder`. All fields except ``config`` are for UMT5.

    With ``compute=False`` only cached prompts are accepted, for programs without memory for the encoder.
    """

    config: TextConfig
    umt5: UMT5Config | None = None
    weights: Checkpoint | None = None
    tokenizer: umt5_prompts.Tokenizer | None = None
    cache: PromptCache | None = None
    compute: bool = True


def open_encoder(
    recipe: Recipe,
    folder: str | os.PathLike | None = None,
    *,
    cache: str | os.PathLike | None = None,
    compute: bool = True,
) -> Encoder:
    """Open the encoder of ``recipe`` and check it. Its weights are not read yet.

    Args:
        recipe: its fields ``text`` and, for UMT5, ``umt5`` are read. The dtypes of teacher and student decide the type
            of the cache.
        folder: the checkpoint or working directory; a recipe of words needs none.
        cache: folder of encoded prompts; None: ``prompts`` under ``folder``; "": no cache.
        compute: as in :class:`Encoder`.

    Raises:
        ConfigError: a file is missing, cannot be read or does not fit the recipe, or a package of the extra ``text`` is
            not installed.
    """
    if recipe.text.kind == "words":
        return Encoder(recipe.text)
    if folder is None:
        raise ConfigError("text.kind is 'umt5', whose weights are not in the package; give the folder of a checkpoint")
    weights = open_checkpoint(workdir.find(recipe.name, "text_encoder", folder), recipe.umt5)
    # The transformer rounds embeddings to its compute type, so the cache stores no more bits.
    storage = "float32" if "float32" in (recipe.student.dtype, recipe.teacher.dtype) else "bfloat16"
    cache_folder = pathlib.Path(folder) / "prompts" if cache is None else cache
    return Encoder(
        config=recipe.text,
        umt5=recipe.umt5,
        weights=weights,
        tokenizer=umt5_prompts.load_tokenizer(_find_tokenizer(pathlib.Path(folder))),
        cache=PromptCache(cache_folder, weights.identity(), storage) if cache_folder else None,
        compute=compute,
    )


def _find_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    files = workdir.tokenizer_files(folder)
    listed = ", ".join(f"{inner}/tokenizer.json" for inner in workdir.TOKENIZERS)
    require(
        "tokenizer.json" in files,
        f"{folder} holds no tokenizer of google/umt5-xxl; accepted: {listed} in it",
    )
    return files["tokenizer.json"]


def read_shapes(config: UMT5Config) -> Any:
    """Return shape and type of every parameter when it is read: kernels and token table in the compute type."""
    shapes = inference_tree(umt5.abstract(config), config.dtype)
    return shapes | {"token_embedding": jax.ShapeDtypeStruct(shapes["token_embedding"].shape, config.dtype)}


def inference_shapes(config: UMT5Config) -> Any:
    """Return shape and type of every parameter on the device, which depend on ``config.weights``."""
    shapes = read_shapes(config)
    return jax.eval_shape(_quantized, shapes) if config.weights == "int8" else shapes


def _quantized(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: umt5.quantize(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), params
    )


def encode(encoder: Encoder, prompts: Sequence[str]) -> np.ndarray:
    """Return the embeddings of ``prompts``, float32 ``[B, length, dim]``, zero beyond each prompt's last token.

    Raises:
        ConfigError: a word outside the vocabulary or too many words; with ``compute=False``, a prompt that is not in
            the cache; or weights or a cache that cannot be read or written.
    """
    config = encoder.config
    if encoder.umt5 is None or encoder.tokenizer is None:
        return words.encode_words(prompts, config)
    if not encoder.compute:
        uncached = missing(encoder, prompts)
        require(
            not uncached,
            f"{len(uncached)} prompt(s) are not encoded yet, first {next(iter(uncached), '')!r}; encode them with "
            "causvid prepare --stage=prompts",
        )
    loaded: list[Any] = []

    def load() -> Any:
        loaded.append(_load(encoder))
        return loaded[-1]

    try:
        return umt5_prompts.encode_prompts(
            prompts, encoder.tokenizer, load, encoder.umt5, length=config.length, cache=encoder.cache
        )
    finally:
        for params in loaded:
            jax.tree.map(lambda leaf: leaf.delete(), params)


def check(encoder: Encoder, prompts: Sequence[str]) -> None:
    """Raise a ConfigError for a word outside the vocabulary or for too many words; UMT5 accepts every prompt."""
    if encoder.umt5 is None:
        words.encode_words(prompts, encoder.config)


def fill(encoder: Encoder, prompts: Sequence[str]) -> None:
    """Encode the ``prompts`` that are not in the cache, so that :func:`encode` needs no weights for them.

    The weights are loaded once.

    Raises:
        ConfigError: there is no cache to fill, or it cannot be written.
    """
    uncached = missing(encoder, prompts)
    if not uncached or encoder.umt5 is None or encoder.tokenizer is None:
        return
    require(encoder.cache is not None, "prompts cannot be encoded in advance without a prompt cache")
    params = _load(encoder)
    for start in range(0, len(uncached), AT_ONCE):
        lot = uncached[start : start + AT_ONCE]
        umt5_prompts.encode_prompts(
            lot, encoder.tokenizer, params, encoder.umt5, length=encoder.config.length, cache=encoder.cache
        )
    jax.tree.map(lambda leaf: leaf.delete(), params)


def missing(encoder: Encoder, prompts: Sequence[str]) -> list[str]:
    """Return the ``prompts`` that are not in the cache; for words none."""
    if encoder.umt5 is None or encoder.tokenizer is None:
        return []
    return umt5_prompts.not_cached(prompts, encoder.tokenizer, encoder.umt5, encoder.cache, encoder.config.length)


def negative_prompt_embeds(encoder: Encoder) -> np.ndarray:
    """Return the embeddings float32 ``[length, dim]`` of ``text.negative_prompt``; zeros for an empty one of words."""
    return encode(encoder, [encoder.config.negative_prompt])[0]


def _load(encoder: Encoder) -> Any:
    assert encoder.umt5 is not None and encoder.weights is not None
    given: dict[str, Any] = {"convert": umt5.quantize} if encoder.umt5.weights == "int8" else {}
    return load(encoder.weights, dtype=read_shapes(encoder.umt5), **given)[0]
