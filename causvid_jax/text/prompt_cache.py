"""A cache of encoded prompts on disk: one file per prompt, named by a hash of everything its embeddings depend on.

A file holds the embeddings of real tokens only (a prompt of 60 tokens takes 0.5 MB in bfloat16 instead of 4), their
identity, and a checksum. Files are written atomically, and unreadable files are written again. Many processes can
therefore share a folder, and each may be stopped at any time.
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

    ``weights`` is a digest of the encoder's parameters; embeddings of other weights are not read. ``dtype`` is the
    stored type, ``"float32"`` or ``"bfloat16"``. Another type or an empty digest raises a ConfigError.
    """

    folder: str | os.PathLike
    weights: str
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"prompt cache dtype is {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        require(self.weights, "prompt cache needs a digest of the encoder's weights, not an empty text")


def identity(cache: PromptCache, prompt: str, tokenizer: str, length: int, config: UMT5Config) -> dict[str, str]:
    """Return everything that the embeddings of a cleaned ``prompt`` depend on, as text by name.

    ``tokenizer`` is the digest of the tokenizer's file, ``length`` the number of tokens of a prompt.
    """
    return {
        "prompt": prompt,
        "tokenizer": tokenizer,
        "weights": cache.weights,
        "length": str(length),
        "encoder": to_json(config),
        "dtype": cache.dtype,
    }


def path(cache: PromptCache, key: dict[str, str]) -> pathlib.Path:
    """Return the file of an :func:`identity`, named by its SHA-256, in a folder of the first two digits."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return pathlib.Path(cache.folder, name[:2], f"{name}.safetensors")


def read(cache: PromptCache, key: dict[str, str]) -> np.ndarray | None:
    """Return embeddings float32 ``[tokens, dim]``; None if there is no file, or if it is damaged, which is logged."""
    source = path(cache, key)
    if not source.exists():
        return None
    try:
        tree, header = store.load_params(source)
        require(header == key and set(tree) == {"rows"}, f"prompt file {source} is of another prompt")
    except ConfigError as error:
        _LOG.warning("%s; the prompt is encoded again", error)
        return None
    return tree["rows"]


def write(cache: PromptCache, key: dict[str, str], embeds: np.ndarray) -> np.ndarray:
    """Write embeddings ``[tokens, dim]`` and return them rounded to the stored type, as :func:`read` returns them.

    Raises:
        ConfigError: the folder cannot be written.
    """
    stored = np.asarray(embeds, np.float32).astype(store.STORAGE[cache.dtype])
    store.save_params(path(cache, key), {"rows": stored}, key)
    return stored.astype(np.float32)
