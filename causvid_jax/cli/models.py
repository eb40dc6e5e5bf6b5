"""List the published models that this library knows: ``causvid models``, or one with ``--name=self_forcing_dmd``.

Each row has files, bytes, licence and the settings that go with the weights. ``--config=published:NAME`` is its recipe.
"""

import dataclasses
import json
import math

from causvid_jax.cli.options import option
from causvid_jax.config import published
from causvid_jax.config.files import format_bytes


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    name: str | None = option(None, "Only this model.")
    json: bool = option(False, "Print the table as JSON.")


def main(options: Options) -> None:
    """Print the table."""
    models = [published.get(options.name)] if options.name else list(published.MODELS)
    if options.json:
        print(json.dumps([_row(model) for model in models], indent=1))
        return
    print("\n\n".join(_describe(model) for model in models))


def _row(model: published.PublishedModel) -> dict[str, object]:
    """Return a model as values for JSON, with the name of its recipe."""
    row = dataclasses.asdict(model)
    row["files"] = [{"file": file, "bytes": size} for file, size in model.files]
    return row | {"config": f"published:{model.name}" if model.readable else None}


def _describe(model: published.PublishedModel) -> str:
    """Describe a model in a few lines."""
    files = ", ".join(f"{file} ({format_bytes(size) if size else 'size not known'})" for file, size in model.files)
    paper = f"arXiv {model.paper}, " if model.paper else ""
    settings = [
        f"{group}.{field}={_short(value)}"
        for group, fields in model.settings.items()
        for field, value in fields.items()
    ]
    settings += [f"rolling_blocks={model.rolling_blocks}"] if model.rolling_blocks else []
    without = "those of the recipe" if model.readable else "not known"
    lines = [
        f"{model.name}{'' if model.readable else ' (not sampled by this version)'}: {model.what}",
        f"  {paper}{model.kind}, {model.network}; licence: {model.licence}",
        f"  {model.repository}: {files}",
        f"  settings: {' '.join(settings) or without}",
        f"  known from: {model.known_from}",
        f"  not known: {model.not_known}",
    ]
    return "\n".join(lines)


def _short(value: object) -> str:
    """Format a setting for the command line, without needless digits."""
    if isinstance(value, tuple):
        return f"({','.join(map(_short, value))},)"
    return f"{math.floor(value * 1000 + 0.5) / 1000:g}" if isinstance(value, float) else str(value)
