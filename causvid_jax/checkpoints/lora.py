"""Low-rank updates of a transformer (LoRA, arXiv 2106.09685): ``W + strength * alpha / rank * B A`` in float32.

W is ``[out, in]``, B ``[out, rank]`` and A ``[rank, in]``, as PyTorch stores them. With peft's ``use_rslora`` alpha is
divided by the square root of the rank.

The key names of these programs are read: peft (``base_model.model.blocks.0.self_attn.q.lora_A.weight``), diffusers
(``transformer.blocks.0.attn1.to_q.lora_A.weight``), DiffSynth (``pipe.dit.``), the original layout
(``diffusion_model.blocks.0.self_attn.q.lora_down.weight``), kohya and VideoX-Fun
(``lora_unet__blocks_0_self_attn_q.lora_down.weight``). ``alpha`` is a tensor of the target, or a number in
``adapter_config.json`` or the metadata; by default it equals the rank. Full differences are added too, times the
strength: ``.diff`` of a weight or modulation, ``.diff_b`` of a bias, ``.diff_m`` of a block's modulation.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping

import numpy as np

from causvid_jax.checkpoints import source as sources
from causvid_jax.checkpoints.safetensors_io import Tensor, sample_digest
from causvid_jax.checkpoints.table import Row
from causvid_jax.checkpoints.wan_transformer import NETWORK
from causvid_jax.config import ConfigError, TransformerConfig, require

_SUFFIX = re.compile(
    r"\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up))(?:\.(?!weight|bias)\w+)?\.(?P<leaf>weight|bias)$"
    r"|\.(?P<other>alpha|diff|diff_b|diff_m)$"
)
_PREFIX = re.compile(r"lora_(?:unet|transformer)_+")
_OTHER_KINDS = {"dora_scale": "a DoRA", "magnitude": "a DoRA", "lokr_": "a LoKr", "hada_": "a LoHa"}
_Update = Mapping[str, Tensor]  # of one module: some of down and up, alpha, diff, diff_b, up_bias


@dataclasses.dataclass(frozen=True)
class Lora:
    """An opened LoRA.

    Attributes:
        path: the file.
        strength: factor of the whole update.
        updates: tensors by original module name (``blocks.0.self_attn.q``) or modulation (``blocks.0.modulation``).
        shapes: shapes of the original tensors by key.
        rows: rows of the original table by (path, layer).
        alpha: for every target that has no own alpha; None means the rank.
        rank_stabilised: whether alpha is divided by the square root of the rank.
        layers: the layers that change; None for all parameters.
        skipped: names of the file's tensors that the transformer has no parameter for.
    """

    path: pathlib.Path
    strength: float
    updates: Mapping[str, _Update]
    shapes: Mapping[str, tuple[int, ...]]
    rows: Mapping[tuple[str, int | None], Row]
    alpha: float | None
    rank_stabilised: bool
    layers: frozenset[int] | None
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.strength:g} x {self.path.name}"

    def delta(self, row: Row, config: TransformerConfig) -> np.ndarray | None:
        """Return the array to add to a parameter, float32 in our layout; None if this LoRA does not change it."""
        if self.layers is not None and row.layer not in self.layers:
            return None
        original = self.rows[row.path, row.layer]
        module, _, leaf = original.key.rpartition(".")
        if leaf == "modulation":
            module, leaf = original.key, "weight"
        update = self.updates.get(module, {})
        terms = []
        if leaf == "weight" and "down" in update:
            down, up = _read(update["down"]), _read(update["up"])
            terms.append(self._scale(update) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)))
        if leaf == "weight" and "diff" in update:
            terms.append(_read(update["diff"]))
        if leaf == "bias" and "up_bias" in update:
            terms.append(self._scale(update) * _read(update["up_bias"]))
        if leaf == "bias" and "diff_b" in update:
            terms.append(_read(update["diff_b"]))
        if not terms:
            return None
        total = sum(term.reshape(self.shapes[original.key]) for term in terms)
        return original.transform.to_ours(np.float32(self.strength) * total)

    def identity(self) -> str:
        """Return a SHA-256 of the strength, the settings and a sample of every tensor (:func:`sample_digest`)."""
        tensors = {
            f"{module}.{name}": tensor for module, update in self.updates.items() for name, tensor in update.items()
        }
        layers = None if self.layers is None else sorted(self.layers)
        settings = self.strength, self.alpha, self.rank_stabilised, layers
        return hashlib.sha256(f"{settings} {sample_digest(tensors)}".encode()).hexdigest()

    def factors(self, row: Row) -> tuple[np.ndarray, np.ndarray] | None:
        """Return A ``[r, in]`` and ``alpha / rank * B [out, r]`` of a kernel, float32; None without factors."""
        original = self.rows[row.path, row.layer]
        update = self.updates.get(original.key.removesuffix(".weight"), {})
        if not original.key.endswith(".weight") or "down" not in update:
            return None
        down, up = _read(update["down"]), _read(update["up"])
        return down.reshape(len(down), -1), self._scale(update) * up.reshape(len(up), -1)

    def _scale(self, update: _Update) -> np.float32:
        rank = update["down"].shape[0]
        alpha = float(_read(update["alpha"]).reshape(-1)[0]) if "alpha" in update else self.alpha
        return np.float32(1.0 if alpha is None else alpha / (rank**0.5 if self.rank_stabilised else rank))


def open_lora(
    path: str | os.PathLike,
    strength: float,
    config: TransformerConfig,
    layers: Collection[int] | None = None,
    skip_foreign: bool = False,
) -> Lora:
    """Open the LoRA at ``path`` (a weights file, or a peft folder) for a transformer of ``config``'s sizes.

    Args:
        path: a weights file with one of the spellings above, or a peft folder.
        strength: factor of the whole update; 0 changes nothing.
        config: the transformer's sizes, which every target must fit.
        layers: only these change, and no parameter outside of the layers; None changes everything.
        skip_foreign: whether to leave out targets that this transformer does not have (such as the image branch of an
            image-to-video LoRA) instead of refusing the file.

    Raises:
        ConfigError: the strength is not finite; or the file is unreadable, names targets that this transformer does not
            have, holds only one of two factors, has other shapes, or is no LoRA (DoRA, LoKr, LoHa).
    """
    require(np.isfinite(strength), f"the strength of LoRA {path} is {strength}; it must be a number")
    # LongLive's pickle calls the part ``generator_lora``.
    opened = sources.open_source(path, None, sources.LORA_PREFERRED, config=False)
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if any(mark in name for name in opened.tensors)), None)
    require(kind is None, f"{path} is {kind}, which is not a product of two factors; accepted: LoRA")
    updates, unknown = _by_module(opened, config)
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    require(
        not unknown or (skip_foreign and updates),
        f"LoRA {path} has {len(unknown)} target(s) that this transformer ({NETWORK.describe(config)}) does not have: "
        f"{', '.join(unknown[:3])}{more}; --skip_foreign leaves them out",
    )
    require(updates, f"LoRA {path} holds no updates")
    shapes = NETWORK.shapes(config, "original")
    for module, update in updates.items():
        weight = shapes[module] if module in shapes else shapes[f"{module}.weight"]
        _check(f"target {module} of LoRA {path}", update, weight, shapes.get(f"{module}.bias"))
    if layers is not None:
        nonexistent = sorted(set(layers) - set(range(config.num_layers)))
        require(not nonexistent, f"LoRA layers {nonexistent[:3]} do not exist; accepted: 0 to {config.num_layers - 1}")
    alpha, stabilised = _adapter(opened)
    rows = {(row.path, row.layer): row for row in NETWORK.rows(config, "original")}
    changed_layers = None if layers is None else frozenset(layers)
    return Lora(opened.path, strength, updates, shapes, rows, alpha, stabilised, changed_layers, tuple(unknown))


def _by_module(opened: sources.Source, config: TransformerConfig) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the tensors by original module and kind, and the names that this transformer does not have."""
    aliases = _aliases(config)
    raw: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in opened.tensors.items():
        match = _SUFFIX.search(name)
        target = _PREFIX.sub("", name[: match.start()], count=1) if match else ""
        kind = "" if match is None else match["other"] or ("down" if match["down"] else "up")
        if kind == "diff_m":
            target, kind = f"{target}.modulation", "diff"
        module = aliases.get(target)
        if match is None or module is None:
            unknown.append(name)
            continue
        if match["leaf"] == "bias":
            kind += "_bias"
        require(kind != "down_bias", f"LoRA {opened.path} has a bias in its first factor ({name}); no known LoRA has")
        raw.setdefault(module, {})[kind] = tensor
    return raw, unknown


def _aliases(config: TransformerConfig) -> dict[str, str]:
    """Return original module names by every spelling: original and diffusers, with dots or (kohya) underscores."""
    aliases = {}
    pairs = zip(NETWORK.rows(config, "original"), NETWORK.rows(config, "diffusers"), strict=True)
    for original, diffusers in pairs:
        module, _, leaf = original.key.rpartition(".")
        names = (original.key, diffusers.key)
        if leaf in ("weight", "bias"):
            names = (module, diffusers.key.rpartition(".")[0])
        else:
            module = original.key
        for name in names:
            aliases[name] = aliases[name.replace(".", "_")] = module
    return aliases


def _check(what: str, update: _Update, weight: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    require(("down" in update) == ("up" in update), f"{what} has one of its two factors only")
    require("up_bias" not in update or "up" in update, f"{what} has a bias but no factors")
    if "down" in update:
        rows, columns = weight[0], int(np.prod(weight[1:]))
        shapes = update["up"].shape, update["down"].shape
        up, down = map(_matrix, shapes)
        require(
            up[0] == rows and down[1] == columns and up[1] == down[0],
            f"{what} has factors of shapes {update['up'].shape} and {update['down'].shape}; a weight of {weight} needs "
            f"({rows}, r) and (r, {columns})",
        )
    for kind, shape in (("diff", weight), ("diff_b", bias), ("up_bias", bias)):
        if kind in update:
            have = update[kind].shape
            require(
                shape is not None and np.prod(have) == np.prod(shape),
                f"{what} has a difference of shape {have}; the parameter's is {shape}",
            )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], int(np.prod(shape[1:]))) if shape else (0, 0)


def _adapter(opened: sources.Source) -> tuple[float | None, bool]:
    """Return alpha and whether it is divided by the root of the rank, from the file's metadata, else its folder."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    content: dict = {}
    file = folder / "adapter_config.json"
    if "lora_adapter_metadata" in opened.metadata:  # of this file, while the folder may hold others
        try:
            content = json.loads(opened.metadata["lora_adapter_metadata"])
        except ValueError as error:
            raise ConfigError(f"LoRA {opened.path} has metadata that is not JSON") from error
        content = {key.rpartition("transformer.")[2]: value for key, value in content.items()}
    elif file.is_file():
        content = sources.read_json(file)
    for key in ("alpha_pattern", "rank_pattern"):
        require(not content.get(key), f"LoRA {opened.path} has a {key}, which is not read; accepted: one alpha")
    alpha = content.get("lora_alpha")
    require(
        alpha is None or isinstance(alpha, (int, float)), f"LoRA {opened.path} has lora_alpha {alpha!r}, not a number"
    )
    return (None if alpha is None else float(alpha)), bool(content.get("use_rslora"))


def _read(tensor: Tensor) -> np.ndarray:
    with tensor.view() as array:
        return np.array(array, np.float32)
