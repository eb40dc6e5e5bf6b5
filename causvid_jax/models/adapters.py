"""Low-rank adapters (LoRA, arXiv 2106.09685) of the linear layers of the transformer's blocks.

    y = x W + b + scale (x A) B,    A [in, r], B [r, out]

A module with an adapter has a ``kernel`` and the parameters ``lora/down`` (A) and ``lora/up`` (B). The scale is
``alpha / rank`` of ``config.lora``, or ``lora/scale [r]``, one factor per column of A. Several adapters are
concatenated along r, and ``scale`` holds the strength of each. A strength is then an input of the compiled program, so
a new strength needs no compilation. The kernel is neither changed nor copied.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from causvid_jax.config import LoraConfig, TransformerConfig, require
from causvid_jax.models import layers
from causvid_jax.sharding.params import ParamSpec

Tree = dict[str, Any]
KEY = "lora"


def with_adapters(spec: Tree, lora: LoraConfig) -> Tree:
    """Return the specification of a layer with adapters for the modules that ``lora`` targets.

    A starts uniform in ``[-1, 1] / sqrt(in)`` and B at zero, as in peft, so training starts from the base.
    """
    if not lora.rank:
        return spec
    result: Tree = {}
    for name, inner in spec.items():
        if isinstance(inner, dict):
            inner = with_adapters(inner, lora)
            if name in lora.targets and "kernel" in inner:
                (fan_in, fan_out), (rows, columns) = inner["kernel"].shape, inner["kernel"].axes
                bound = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
                inner[KEY] = {
                    "down": ParamSpec((fan_in, lora.rank), (rows, None), bound),
                    "up": ParamSpec((lora.rank, fan_out), (None, columns), nn.initializers.zeros),
                }
        result[name] = inner
    return result


def product(p: Tree, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Return ``scale (x A) B``, float32 ``[..., out]``, for ``x [..., in]`` and a module's adapter ``p``.

    The operands are rounded to ``config.dtype``.
    """
    scale = p.get("scale", config.lora.scale)
    return layers.matmul(layers.matmul(x, p["down"], config.dtype) * scale, p["up"], config.dtype)


def has_adapters(params: Any) -> bool:
    """Return whether any module of ``params`` has an adapter."""
    return any(True for _ in modules(params))


def check(params: Tree, config: TransformerConfig) -> None:
    """Check that stacked layers have adapters only if ``config`` declares them: a scan reads declared parameters alone.

    Raises:
        ConfigError: the adapters would be ignored.
    """
    require(
        config.lora.rank > 0 or isinstance(params["blocks"], tuple) or not has_adapters(params["blocks"]),
        "the weights have LoRA adapters in stacked layers, and transformer.lora.rank is 0, so they would not be read; "
        "accepted: layers of models.transformer.unstack, or lora.rank",
    )


def modules(params: Any) -> Iterator[Tree]:
    """Yield the modules that have an adapter."""
    for inner in params if isinstance(params, tuple) else params.values():
        if isinstance(inner, (dict, tuple)):
            if KEY in inner:
                assert isinstance(inner, dict)
                yield inner
            yield from modules(inner)


def map_modules(change: Callable[[Tree], Tree], params: Any) -> Any:
    """Return ``params`` with ``change`` applied to every module that has an adapter; other arrays do not change."""
    if isinstance(params, tuple):
        return tuple(map_modules(change, inner) for inner in params)
    if not isinstance(params, dict):
        return params
    params = {name: map_modules(change, inner) for name, inner in params.items()}
    return change(params) if KEY in params else params


def scaled(params: Any, scale: jax.Array) -> Any:
    """Return ``params`` with the scale ``[r]`` in every adapter."""
    return map_modules(lambda module: {**module, KEY: {**module[KEY], "scale": scale}}, params)


def merged(params: Any, config: TransformerConfig) -> Any:
    """Return the parameters of a plain network: every kernel plus ``alpha / rank A B``, without adapters."""

    def merge(module: Tree) -> Tree:
        adapter = module[KEY]
        change = jnp.matmul(adapter["down"], adapter["up"], precision=jax.lax.Precision.HIGHEST)
        kernel = module["kernel"] + config.lora.scale * change
        return {**{name: value for name, value in module.items() if name != KEY}, "kernel": kernel}

    return map_modules(merge, params)


# ---- training: the adapters alone ------------------------------------------------------------------------------------


def split(params: Any) -> tuple[Any, Any]:
    """Split parameters into (trained, frozen): the adapters and the rest, or everything and {} without adapters."""
    if not isinstance(params, dict) or not has_adapters(params):
        return params, {}
    return _pick(params, adapters=True), _pick(params, adapters=False)


def join(trained: Any, frozen: Any) -> Any:
    """Merge the two results of :func:`split`."""
    if not isinstance(frozen, dict) or not isinstance(trained, dict):
        return trained
    both = {name: join(trained[name], frozen[name]) for name in trained if name in frozen}
    return {**frozen, **trained, **both}


def _pick(params: Tree, *, adapters: bool) -> Tree:
    result: Tree = {}
    for name, inner in params.items():
        if name == KEY:
            picked = inner if adapters else {}
        elif isinstance(inner, dict):
            picked = _pick(inner, adapters=adapters)
        else:
            picked = {} if adapters else inner
        if not isinstance(picked, dict) or picked:
            result[name] = picked
    return result
