"""Encoded prompts on disk: one file per prompt, named by everything its rows depend on.

A file holds the rows of real tokens only (a prompt of 60 tokens is 0.5 MB in bfloat16, not 4), who made them, and a
checksum. It appears whole or not at all, and one that does not read back is made again, so that any number of processes
may share a folder and be stopped at any moment.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib

import numpy as np

from causvid_jax.checkpoints import store
from causvid_jax.config import ConfigError, UMT5Config, require, to_json

DTYPES = ("float32", "bfloat16")
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PromptCache:
    """A folder of encoded prompts.

    ``weights`` is a digest of the encoder's parameters (such as ``data.generate.weights_digest``): rows of other
    weights are never found. ``dtype`` is the stored type, ``"float32"`` or ``"bfloat16"``.
    """

    folder: str | os.PathLike
    weights: str
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"prompt cache dtype is {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        require(self.weights, "prompt cache needs a digest of the encoder's weights, not an empty text")


def identity(cache: PromptCache, prompt: str, tokenizer: str, length: int, config: UMT5Config) -> dict[str, str]:
    """Return all that the embeddings of a cleaned ``prompt`` depend on; ``tokenizer`` is its file's digest."""
    return {
        "prompt": prompt,
        "tokenizer": tokenizer,
        "weights": cache.weights,
        "length": str(length),
        "encoder": to_json(config),
        "dtype": cache.dtype,
    }


def path(cache: PromptCache, who: dict[str, str]) -> pathlib.Path:
    """Return the file of an :func:`identity`, by its SHA-256. Folders of two letters keep listings short."""
    name = hashlib.sha256(json.dumps(who, sort_keys=True).encode()).hexdigest()
    return pathlib.Path(cache.folder, name[:2], f"{name}.safetensors")


def read(cache: PromptCache, who: dict[str, str]) -> np.ndarray | None:
    """Read embeddings float32 ``[tokens, dim]``; None if there are none or the file is damaged, which is logged."""
    source = path(cache, who)
    if not source.exists():
        return None
    try:
        tree, header = store.load_params(source)
        require(header == who and set(tree) == {"rows"}, f"prompt file {source} is of another prompt")
    except ConfigError as error:
        _LOG.warning("%s; the prompt is encoded again", error)
        return None
    return tree["rows"]


def write(cache: PromptCache, who: dict[str, str], rows: np.ndarray) -> np.ndarray:
    """Keep ``rows [tokens, dim]``; returns what :func:`read` will find, rounded to the stored type.

    Raises:
        ConfigError: the folder cannot be written.
    """
    stored = np.asarray(rows, np.float32).astype(store.STORAGE[cache.dtype])
    store.save_params(path(cache, who), {"rows": stored}, who)
    return stored.astype(np.float32)
