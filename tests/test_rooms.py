"""A room imports only rooms below it, so there is no circle and no arrow back up."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "causvid_jax"
ROOMS = (
    "config",
    "media",
    "progress",
    "sharding",
    "distributed",
    "diffusion",
    "models",
    "distill",
    "checkpoints",
    "text",
    "sampling",
    "data",
    "evaluation",
    "training",
    "analysis",
    "__init__",
    "serve",
    "cli",
)
"""From the ground up."""


def imported(path: pathlib.Path) -> set[str]:
    """Return the rooms that a module imports, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = (name.split(".") for name in names if name.split(".")[0] == PACKAGE.name)
    return {parts[1] for parts in inside if len(parts) > 1 and parts[1] in ROOMS}


def rooms() -> dict[str, set[str]]:
    """Return for each room those that its modules import."""
    result: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        result.setdefault(room, set()).update(imported(path) - {room})
    return result


def test_every_room_has_a_floor():
    assert set(rooms()) <= set(ROOMS)


REMAINING: set[str] = set()
"""Arrows back up that are still to be turned: nothing may be added."""


def test_rooms_import_only_rooms_below_them():
    floor = {room: i for i, room in enumerate(ROOMS)}
    pairs = [(room, other) for room, others in rooms().items() for other in others]
    assert {f"{room} -> {other}" for room, other in pairs if floor[other] > floor[room]} <= REMAINING
