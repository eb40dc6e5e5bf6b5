"""Count the collectives in the text of a compiled program: kind, number and bytes, inside and outside of layers."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation; ``bytes`` is the size of its result on one device."""

    kind: str
    bytes: int
    in_loop: bool  # inside a loop's body: once per layer


def _size(result: str) -> int:
    """Return the bytes of a result type. An asynchronous start has (operands, results); its largest array is moved."""
    sizes = [
        math.prod(int(d) for d in dims.split(",") if d) * _BYTES.get(kind, 4) for kind, dims in _SHAPE.findall(result)
    ]
    return max(sizes, default=0)


def collectives(text: str) -> Iterator[Collective]:
    """Yield every collective in the text of a compiled program (``compiled.as_text()``), in the order of the text."""
    bodies = set(_BODY.findall(text))
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line.strip()):
            computation = match.group(1)
        elif match := _CALL.search(line):
            yield Collective(match.group(2), _size(match.group(1)), computation in bodies)


def totals(text: str) -> dict[str, dict[str, int]]:
    """Return by kind ``count`` and ``bytes`` inside loops (a layer), ``count_once`` and ``bytes_once`` outside."""
    result: dict[str, dict[str, int]] = {}
    for one in collectives(text):
        entry = result.setdefault(one.kind, {"count": 0, "bytes": 0, "count_once": 0, "bytes_once": 0})
        suffix = "" if one.in_loop else "_once"
        entry[f"count{suffix}"] += 1
        entry[f"bytes{suffix}"] += one.bytes
    return result
