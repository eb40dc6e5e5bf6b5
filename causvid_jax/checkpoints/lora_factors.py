"""Read LoRA files as adapters of a transformer, and write adapters as LoRA files.

:func:`open_factors` reads several LoRAs for sampling with strengths that change while a stream runs;
:func:`save_lora` writes trained adapters under the names of peft or diffusers (``checkpoints.lora`` reads both).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from causvid_jax.checkpoints.lora import Lora, open_lora
from causvid_jax.checkpoints.store import flatten, unflatten
from causvid_jax.checkpoints.table import BLOCKS, Row
from causvid_jax.checkpoints.wan_transformer import NETWORK
from causvid_jax.config import LoraConfig, TransformerConfig, require
from causvid_jax.config.files import atomic, write_text
from causvid_jax.models import adapters

LoraNames = Literal["peft", "diffusers"]


@dataclasses.dataclass(frozen=True)
class Factors:
    """Adapters of several LoRAs, concatenated along r.

    Attributes:
        tree: ``blocks/.../lora/{down, up}`` with stacked layers, float32 ``[L, in, r]`` and ``[L, r, out]``;
            ``alpha / rank`` is multiplied into ``up``.
        columns: name of a LoRA to its slice of the r columns.
    """

    tree: dict[str, Any]
    columns: dict[str, slice]

    @property
    def rank(self) -> int:
        """Number of columns r of all LoRAs together."""
        return max(part.stop for part in self.columns.values())

    def scale(self, strengths: Mapping[str, float], before: np.ndarray | None = None) -> np.ndarray:
        """Return one factor per column, float32 ``[r]``: ``before`` (default: all 1) with the named strengths.

        Raises:
            ConfigError: a LoRA that was not loaded, or a strength that is not finite.
        """
        scale = np.ones(self.rank, np.float32) if before is None else np.array(before, np.float32)
        for name, strength in strengths.items():
            accepted = ", ".join(self.columns)
            require(name in self.columns, f"no LoRA is called {name!r}; accepted: {accepted}")
            require(np.isfinite(strength), f"the strength of LoRA {name!r} is {strength}; it must be a number")
            scale[self.columns[name]] = strength
        return scale


def open_factors(files: Mapping[str, str | os.PathLike], config: TransformerConfig) -> Factors:
    """Read the LoRAs ``files`` (name to file) for a transformer of ``config``'s sizes.

    Raises:
        ConfigError: :func:`open_lora` refuses a file; or a file has changes other than products of two matrices in the
            layers, because such changes can only be merged.
    """
    require(files, "no LoRA is given")
    # Sorted, so that the strengths of a saved stream belong to the same LoRAs in whatever order they are given.
    loras = {name: open_lora(files[name], 1.0, config) for name in sorted(files)}
    columns: dict[str, slice] = {}
    for name, lora in loras.items():
        start = max((part.stop for part in columns.values()), default=0)
        columns[name] = slice(start, start + _rank(lora))
    flat: dict[str, np.ndarray] = {}
    for path, layers in NETWORK.layers(config, "original").items():
        if any(lora.factors(row) is not None for lora in loras.values() for row in layers):
            module = path.removesuffix("/kernel")
            flat[f"{module}/lora/down"], flat[f"{module}/lora/up"] = _stack(layers, loras, columns, config)
    return Factors(unflatten(flat), columns)


def _rank(lora: Lora) -> int:
    """Return the largest rank of a LoRA's targets; refuse changes that are no product of two matrices."""
    ranks = []
    for module, update in lora.updates.items():
        plain = "down" in update and update.keys() <= {"down", "up", "alpha"}
        require(
            plain and module.startswith("blocks."),
            f"LoRA {lora.path} changes {module} by more than two factors of a layer; it can be merged only (--lora)",
        )
        ranks.append(update["down"].shape[0])
    return max(ranks)


def _stack(
    layers: list[Row], loras: Mapping[str, Lora], columns: Mapping[str, slice], config: TransformerConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the two matrices of all layers of a module; zeros where a LoRA does not change it."""
    total = max(part.stop for part in columns.values())
    shape = NETWORK.shapes(config, "causvid_jax")[layers[0].path]
    down = np.zeros((shape[0], shape[1], total), np.float32)
    up = np.zeros((shape[0], total, shape[2]), np.float32)
    for i, row in enumerate(layers):
        for name, lora in loras.items():
            factors = lora.factors(row)
            if factors is not None:
                rank = factors[0].shape[0]
                part = slice(columns[name].start, columns[name].start + rank)
                down[i, :, part], up[i, part] = factors[0].T, factors[1].T
    return down, up


def attach(params: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    """Return stacked ``params`` with the adapters added to their modules. The arrays of the base are not copied."""
    return adapters.join(jax.tree.map(jnp.asarray, factors.tree), dict(params))


# ---- to files --------------------------------------------------------------------------------------------------------


def save_lora(
    path: str | os.PathLike, params: Mapping[str, Any], config: TransformerConfig, names: LoraNames = "peft"
) -> None:
    """Write the adapters of ``params`` in float32, with the alpha of ``config.lora``; other parameters are ignored.

    Args:
        path: a folder for ``"peft"`` (``adapter_model.safetensors`` and ``adapter_config.json``), a file for
            ``"diffusers"`` (such as ``pytorch_lora_weights.safetensors``).
        params: parameters of the transformer, stacked.
        config: configuration of the transformer, with ``lora``.
        names: library whose names are written, ``"peft"`` or ``"diffusers"``.

    Raises:
        ConfigError: no adapters, or a path that cannot be written.
    """
    require(adapters.has_adapters(params), f"{path} is not written: the network has no adapters")
    lora, path = config.lora, pathlib.Path(path)
    alpha = lora.scale * lora.rank
    state = dict(_named(params, config, names))
    if names == "diffusers":
        described = json.dumps({"transformer.r": lora.rank, "transformer.lora_alpha": alpha})
        _write(path, state, {"format": "pt", "lora_adapter_metadata": described})
        return
    path.mkdir(parents=True, exist_ok=True)
    _write(path / "adapter_model.safetensors", state, {"format": "pt"})
    targets = sorted({".".join(name.split(".")[-4:-2]) for name in state})
    described = json.dumps({"peft_type": "LORA", "r": lora.rank, "lora_alpha": alpha, "target_modules": targets})
    write_text(path / "adapter_config.json", described)


def _named(params: Mapping[str, Any], config: TransformerConfig, names: LoraNames) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a LoRA file."""
    flat = {key: value for key, value in flatten(adapters.split(params)[0]).items() if key.startswith(BLOCKS)}
    prefix = "base_model.model." if names == "peft" else "transformer."
    plain = dataclasses.replace(config, lora=LoraConfig())
    for row in NETWORK.rows(plain, "original" if names == "peft" else "diffusers"):
        module = row.path.removesuffix("/kernel")
        if row.layer is not None and f"{module}/lora/down" in flat:
            if not row.path.endswith("/kernel"):
                continue
            key = prefix + row.key.removesuffix(".weight")
            for name, ours in (("lora_A", "down"), ("lora_B", "up")):
                value = np.asarray(flat[f"{module}/lora/{ours}"][row.layer], np.float32)
                yield f"{key}.{name}.weight", np.ascontiguousarray(value.T)


def _write(path: pathlib.Path, state: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with atomic(path) as temporary:
        safetensors.numpy.save_file(state, temporary, metadata)
