"""Low-rank updates of a transformer: ``W + strength * alpha / rank * B A``, in float32, layer by layer.

Read are the names of peft (``base_model.model.blocks.0.self_attn.q.lora_A.weight``), diffusers
(``transformer.blocks.0.attn1.to_q.lora_A.weight``), the original layout (``diffusion_model.blocks.0.self_attn.q.
lora_down.weight``) and kohya (``lora_unet_blocks_0_self_attn_q.lora_down.weight``), with ``alpha`` per target, in an
``adapter_config.json`` or in the metadata; without one it equals the rank. Whole differences, which extracted LoRAs
carry beside the factors (``.diff`` of a weight, ``.diff_b`` of a bias), are added as they are, times the strength.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping

import numpy as np

from causvid_jax.checkpoints import layouts, sources
from causvid_jax.checkpoints.files import Tensor
from causvid_jax.checkpoints.layouts import Piece
from causvid_jax.config import ConfigError, TransformerConfig, require

_SUFFIX = re.compile(
    r"\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up))(?:\.(?!weight|bias)\w+)?\.(?P<leaf>weight|bias)$"
    r"|\.(?P<other>alpha|diff|diff_b)$"
)
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "lora_unet_", "lora_transformer_")


@dataclasses.dataclass(frozen=True)
class _Update:
    """What a LoRA holds for one module; any of it may be absent."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: Tensor | None = None
    diff: Tensor | None = None
    diff_b: Tensor | None = None
    up_bias: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Lora:
    """An opened LoRA; ``updates`` by original module name (``blocks.0.self_attn.q``), ``shapes`` by tensor name."""

    path: pathlib.Path
    strength: float
    updates: Mapping[str, _Update]
    shapes: Mapping[str, tuple[int, ...]]
    alpha: float | None
    rank_stabilised: bool
    layers: frozenset[int] | None

    def delta(self, piece: Piece, config: TransformerConfig) -> np.ndarray | None:
        """What to add to ``piece``, float32 in our orientation; None if this LoRA leaves it alone."""
        if self.layers is not None and piece.layer not in self.layers:
            return None
        name = layouts.TRANSFORMER.name(piece, "original", config)
        module, _, leaf = name.rpartition(".")
        update = self.updates.get(module, _Update())
        terms = []
        if leaf == "weight" and update.down is not None and update.up is not None:
            down, up = _read(update.down), _read(update.up)
            terms.append(self._scale(update) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)))
        if leaf == "weight" and update.diff is not None:
            terms.append(_read(update.diff))
        if leaf == "bias" and update.up_bias is not None:
            terms.append(self._scale(update) * _read(update.up_bias))
        if leaf == "bias" and update.diff_b is not None:
            terms.append(_read(update.diff_b))
        if not terms:
            return None
        total = sum(term.reshape(self.shapes[name]) for term in terms)
        return layouts.TRANSFORMER.to_ours(piece.path, np.float32(self.strength) * total, "original")

    def _scale(self, update: _Update) -> np.float32:
        assert update.down is not None
        rank = update.down.shape[0]
        alpha = float(_read(update.alpha).reshape(-1)[0]) if update.alpha is not None else self.alpha
        return np.float32(1.0 if alpha is None else alpha / (rank**0.5 if self.rank_stabilised else rank))


def open_lora(
    path: str | os.PathLike,
    strength: float,
    config: TransformerConfig,
    layers: Collection[int] | None = None,
    part: str | None = None,
) -> Lora:
    """Open the LoRA at ``path`` (a weights file, or a peft folder) for a transformer of ``config``'s sizes.

    Args:
        path: see the module's text.
        strength: factor of the whole update; 0 changes nothing.
        config: the transformer's sizes, which every target must fit.
        layers: only these; the parameters outside of the layers change only if it is None.
        part: of a pickle with several parts; default ``generator_lora``, as LongLive calls it.

    Raises:
        ConfigError: an unreadable file, targets that this transformer does not have (named), half a pair of factors,
            shapes that do not fit, or an update that is more than low-rank (DoRA).
    """
    require(np.isfinite(strength), f"the strength of LoRA {path} is {strength}; it must be a number")
    source = sources.open_source(path, part, sources.LORA_PARTS)
    shapes, aliases = layouts.TRANSFORMER.shapes(config, "original"), _aliases(config)
    raw: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in source.tensors.items():
        found = _SUFFIX.search(name)
        module = aliases.get(_bare(name[: found.start()])) if found else None
        if found is None or module is None:
            unknown.append(name)
            continue
        kind = found["other"] or ("down" if found["down"] else "up")
        if found["leaf"] == "bias":
            kind += "_bias"
        require(kind != "down_bias", f"LoRA {path} has a bias in its first factor ({name}), which no known LoRA has")
        raw.setdefault(module, {})[kind] = tensor
    doubled = [name for name in unknown if "dora_scale" in name or "magnitude" in name]
    require(not doubled, f"LoRA {path} is a DoRA ({doubled[:1]}), which is not a sum; accepted: LoRA")
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    require(
        not unknown,
        f"LoRA {path} has {len(unknown)} target(s) that this transformer ({layouts.describe(config)}) does not have: "
        f"{', '.join(unknown[:3])}{more}",
    )
    require(raw, f"LoRA {path} holds no updates")
    updates = {module: _Update(**kinds) for module, kinds in raw.items()}
    for module, update in updates.items():
        _check(f"target {module} of LoRA {path}", update, shapes[f"{module}.weight"], shapes.get(f"{module}.bias"))
    if layers is not None:
        absent = sorted(set(layers) - set(range(config.num_layers)))
        require(not absent, f"LoRA layers {absent[:3]} do not exist; accepted: 0 to {config.num_layers - 1}")
    alpha, stabilised = _adapter(source)
    return Lora(
        source.path, strength, updates, shapes, alpha, stabilised, None if layers is None else frozenset(layers)
    )


def _aliases(config: TransformerConfig) -> dict[str, str]:
    """Original module names by every way to write them: original and diffusers, with dots or (kohya) underscores."""
    aliases = {}
    for piece in layouts.TRANSFORMER.pieces(config):
        original, diffusers = (layouts.TRANSFORMER.name(piece, naming, config) for naming in ("original", "diffusers"))
        module, _, leaf = original.rpartition(".")
        if leaf in ("weight", "bias"):
            for name in (module, diffusers.rpartition(".")[0]):
                aliases[name] = aliases[name.replace(".", "_")] = module
    return aliases


def _bare(target: str) -> str:
    while outer := next((p for p in _PREFIXES if target.startswith(p)), None):
        target = target.removeprefix(outer)
    return target


def _check(what: str, update: _Update, weight: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    require((update.down is None) == (update.up is None), f"{what} has one of its two factors only")
    require(update.up_bias is None or update.up is not None, f"{what} has a bias but no factors")
    if update.down is not None and update.up is not None:
        rows, columns = weight[0], int(np.prod(weight[1:]))
        up, down = _matrix(update.up.shape), _matrix(update.down.shape)
        require(
            up[0] == rows and down[1] == columns and up[1] == down[0],
            f"{what} has factors of shapes {update.up.shape} and {update.down.shape}; a weight of {weight} needs "
            f"({rows}, r) and (r, {columns})",
        )
    for tensor, shape in ((update.diff, weight), (update.diff_b, bias), (update.up_bias, bias)):
        if tensor is not None:
            require(
                shape is not None and np.prod(tensor.shape) == np.prod(shape),
                f"{what} has a difference of shape {tensor.shape}; the parameter's is {shape}",
            )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], int(np.prod(shape[1:]))) if shape else (0, 0)


def _adapter(source: sources.Source) -> tuple[float | None, bool]:
    """(alpha for every target, whether it is divided by the root of the rank) from what stands beside the weights."""
    folder = source.path if source.path.is_dir() else source.path.parent
    described: dict = {}
    place = folder / "adapter_config.json"
    if place.is_file():
        described = sources.read_json(place)
    elif "lora_adapter_metadata" in source.metadata:
        try:
            described = json.loads(source.metadata["lora_adapter_metadata"])
        except ValueError as error:
            raise ConfigError(f"LoRA {source.path} has metadata that is not JSON") from error
        described = {key.rpartition("transformer.")[2]: value for key, value in described.items()}
    for key in ("alpha_pattern", "rank_pattern"):
        require(not described.get(key), f"LoRA {source.path} has a {key}, which is not read; accepted: one alpha")
    alpha = described.get("lora_alpha")
    require(
        alpha is None or isinstance(alpha, (int, float)), f"LoRA {source.path} has lora_alpha {alpha!r}, not a number"
    )
    return (None if alpha is None else float(alpha)), bool(described.get("use_rslora"))


def _read(tensor: Tensor) -> np.ndarray:
    with tensor.view() as array:
        return np.array(array, np.float32)
