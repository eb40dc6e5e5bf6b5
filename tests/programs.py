"""What tests that start programs share."""

import pathlib
import socket

from causvid_jax.config import Recipe, to_json


def write_recipe(folder: pathlib.Path, recipe: Recipe) -> pathlib.Path:
    """``recipe`` as ``recipe.json`` in ``folder`` and the recipe file that reads it."""
    (folder / "recipe.json").write_text(to_json(recipe))
    path = folder / "recipe.py"
    path.write_text(
        "import json, pathlib, ml_collections\n"
        "def get_config():\n"
        "    text = pathlib.Path(__file__).with_name('recipe.json').read_text()\n"
        "    return ml_collections.ConfigDict(json.loads(text))\n"
    )
    return path


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
