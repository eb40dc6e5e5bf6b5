"""Key tables: map the tensors of a checkpoint to the parameters of one of our networks.

A network's table has one row per parameter of one layer: our path, the key in the file, and a transform that converts
the tensor between the two layouts. Reading, writing and the shapes of every format follow from the rows. Formats:
``original`` (Wan2.1 and models distilled from it), ``diffusers``, and ``causvid_jax`` (ours: paths as keys, layers
stacked).
"""

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from causvid_jax.checkpoints.safetensors_io import Tensor
from causvid_jax.checkpoints.store import flatten
from causvid_jax.config import CLIPConfig, ConfigError, TAEHVConfig, TransformerConfig, UMT5Config, VAEConfig

Config = TransformerConfig | VAEConfig | UMT5Config | TAEHVConfig | CLIPConfig
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
OURS = "causvid_jax"
FORMATS = ("original", "diffusers", OURS)
BLOCKS = "blocks/"
"""Prefix of the paths whose arrays are stacked by layer."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Conversion of a tensor between our layout and that of a file. Both functions return views where possible.

    If several parameters share a key, they follow each other along its first axis; ``part`` is the position of this
    parameter among them.
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_file: Callable[[np.ndarray], np.ndarray]
    part: int = 0


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)
"""File [out, in] <-> ours [in, out]."""
CONVOLUTION = Transform(lambda x: np.moveaxis(x, (1, 0), (-2, -1)), lambda x: np.moveaxis(x, (-2, -1), (1, 0)))
"""File [out, in, ...] <-> ours [..., in, out]."""


def leading(axes: int) -> Transform:
    """Return the transform of a tensor that has ``axes`` leading axes of length 1 in the file."""
    return Transform(lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape))


def patches(*patch: int) -> Transform:
    """Return the transform of a patch embedding: file [out, in, *patch] <-> ours, a matrix [(*patch in), out]."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        moved = np.moveaxis(x, (1, 0), (-2, -1))
        return moved.reshape(int(np.prod(moved.shape[:-1])), moved.shape[-1])

    def to_file(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(*patch, -1, x.shape[-1]), (-2, -1), (1, 0))

    return Transform(to_ours, to_file)


def trailing(axes: int) -> Transform:
    """Return the transform of a vector that has ``axes`` trailing axes of length 1 in the file."""
    return Transform(lambda x: x.reshape(x.shape[:1]), lambda x: x.reshape(x.shape + (1,) * axes))


def third(part: int, inner: Transform) -> Transform:
    """Return the transform of parameter ``part`` of three that share a key, such as a query-key-value matrix."""
    return Transform(lambda x: inner.to_ours(x[part * (len(x) // 3) : (part + 1) * (len(x) // 3)]), inner.to_file, part)


def _layer(number: int) -> Transform:
    return Transform(lambda x: x[number], lambda x: x[None], number)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of one layer: our path (``blocks/ffn/fc1/kernel``), its layer or None, key and transform."""

    path: str
    layer: int | None
    key: str
    transform: Transform


LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "gamma": "gamma"}
"""Last name of our paths to that of published keys."""


def rows_of(
    table: Mapping[str, tuple[str, str]], form: str, shapes: Shapes, transform: Callable[[str], Transform]
) -> Iterator[Row]:
    """Yield the rows of a published format.

    Args:
        table: path of a module, or of a parameter, to its keys (original, diffusers) in a file. ``{n}`` stands for the
            layer. The key of a module is completed by the leaf's name, such as ``.weight``.
        form: the format.
        shapes: path to shape of our parameters.
        transform: returns the transform of a path.
    """
    column = FORMATS.index(form)
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        pattern = table[path][column] if path in table else f"{table[module][column]}.{LEAVES[leaf]}"
        for layer in range(shape[0]) if path.startswith(BLOCKS) else (None,):
            yield Row(path, layer, pattern.replace("{n}", str(layer)), transform(path))


def linear_transform(path: str) -> Transform:
    """Return :data:`LINEAR` for kernels and ``SAME`` for everything else."""
    return LINEAR if path.endswith("/kernel") else SAME


class Sizes:
    """Read the sizes of a network from the shapes of a file.

    ``sizes("blocks/ffn/fc1/bias", 0)`` is the length of that axis in our layout, 0 if the file lacks the tensor.
    """

    def __init__(self, network: "Network", shapes: Shapes, form: str, template: Config | None = None) -> None:
        self.shapes, self.form = shapes, form
        rows = network.rows(template or network.template, form)
        self._rows = {row.path: row for row in rows if row.layer in (None, 0)}

    def __call__(self, path: str, axis: int) -> int:
        row = self._rows.get(path)
        shape = self.shapes.get(row.key) if row else None
        if row is None or shape is None:
            return 0
        try:
            return row.transform.to_ours(nothing(shape)).shape[axis]
        except (ValueError, IndexError):
            return 0

    def key_shape(self, path: str) -> Shape:
        """Return the shape that the parameter ``path`` has in the file, () if the file lacks it."""
        row = self._rows.get(path)
        return self.shapes.get(row.key, ()) if row else ()

    def layers(self) -> int:
        """Return the number of layers, 0 if the file has none."""
        row = next(row for row in self._rows.values() if row.layer == 0)
        if self.form == OURS:
            return next((shape[0] for key, shape in self.shapes.items() if key.startswith(BLOCKS) and shape), 0)
        prefix = re.escape(row.key[: row.key.index(".0.") + 1])
        numbers = [int(m.group(1)) for key in self.shapes if (m := re.match(rf"{prefix}(\d{{1,4}})\.", key))]
        return max(numbers, default=-1) + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Description of one of our networks for reading and writing its checkpoints.

    Attributes:
        component: its name: transformer, vae, text_encoder, image_encoder or taehv.
        config: its configuration class.
        abstract: returns the tree of ``jax.ShapeDtypeStruct`` that also serves init, sharding and restore.
        published: yields the rows of a published format; its arguments are (config, format, shapes of our paths).
        template: a configuration with every optional branch, used to recognise keys.
        presets: the published configurations.
        infer: builds a configuration from :class:`Sizes` and the file's metadata; None if it cannot.
        aliases: names in a published ``config.json`` to fields of ``config``.
        describe: returns a short text with the sizes.
        to_json: returns ``config.json`` of a published format; None for a format without this file.
        formats: the formats that exist.
        ignored: returns whether a key of a file belongs to no parameter.
        tied: keys that hold a copy of another key's tensor, to that key.
        adapt: reshapes a tensor of a file to the shape in the table, for files that store another shape.
    """

    component: str
    config: type
    abstract: Callable[[Any], Any]
    published: Callable[[Any, str, Shapes], Iterator[Row]]
    template: Config
    presets: tuple[Config, ...]
    infer: Callable[[Sizes, Mapping[str, Any]], Config | None]
    aliases: Mapping[str, str]
    describe: Callable[[Any], str]
    to_json: Callable[[Any, str], dict[str, Any] | None]
    formats: tuple[str, ...] = FORMATS
    ignored: Callable[[str], bool] = lambda key: False
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adapt: Callable[[str, Tensor], Tensor] = lambda key, tensor: tensor

    def rows(self, config: Config, form: str) -> tuple[Row, ...]:
        """Return the table of the format ``form``; parameters that share a key are in order of their parts."""
        return _tables(self, config, form)[0]

    def layers(self, config: Config, form: str) -> dict[str, list[Row]]:
        """Return the rows of every path: one, or one for each of its stacked layers."""
        result: dict[str, list[Row]] = {}
        for row in self.rows(config, form):
            result.setdefault(row.path, []).append(row)
        return result

    def pairs(self, config: Config, own: str, form: str) -> dict[str, list[tuple[Row, Row]]]:
        """Return the rows of every key of the format ``form``, each with its parameter's row in the format ``own``."""
        own_rows = {(row.path, row.layer): row for row in self.rows(config, own)}
        result: dict[str, list[tuple[Row, Row]]] = {}
        for row in self.rows(config, form):
            result.setdefault(row.key, []).append((row, own_rows[row.path, row.layer]))
        return result

    def shapes(self, config: Config, form: str) -> Shapes:
        """Return key to shape of every tensor of a checkpoint of the format ``form``."""
        return _tables(self, config, form)[1]

    def parameters(self, config: Config) -> int:
        """Return the number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes(config, OURS).values())


@functools.lru_cache(maxsize=64)
def _tables(network: Network, config: Config, form: str) -> tuple[tuple[Row, ...], Shapes]:
    ours = {path: tuple(leaf.shape) for path, leaf in flatten(network.abstract(config)).items()}
    if form == OURS:
        rows = [
            Row(path, layer, path, SAME if layer is None else _layer(layer))
            for path, shape in ours.items()
            for layer in (range(shape[0]) if path.startswith(BLOCKS) else (None,))
        ]
    else:
        rows = sorted(network.published(config, form, ours), key=lambda row: row.transform.part)
    shapes: dict[str, Shape] = {}
    for row in rows:
        inner = ours[row.path] if row.layer is None else ours[row.path][1:]
        shape = row.transform.to_file(nothing(inner)).shape
        before = shapes.get(row.key)
        shapes[row.key] = (before[0] + shape[0], *shape[1:]) if before else tuple(shape)
    return tuple(rows), types.MappingProxyType(shapes)


def nothing(shape: Shape) -> np.ndarray:
    """Return an int8 array of ``shape`` that occupies one byte, to compute shapes with."""
    return np.broadcast_to(np.int8(0), shape)


def build(cls: type, **values: Any) -> Any:
    """Return ``cls(**values)``, or None if the values make no valid configuration."""
    try:
        return cls(**values)
    except (ConfigError, TypeError, ValueError, ZeroDivisionError):
        return None
