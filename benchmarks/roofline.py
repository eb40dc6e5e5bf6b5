"""Sum a roofline over the instructions of a compiled program, from its text alone.

Every instruction of the entry and of the loops' bodies counts once for each iteration. It has the bytes that it reads
and writes in the device's memory, and the FLOPs of its matrix products. Its time is the larger of bytes over bandwidth
and FLOPs over the rate of the matrix units, so the sum is a lower bound of the program's time. A fusion reads of its
operands what its result needs: if it slices an operand, or what it computes from it, it reads the slice. An update in
place writes only its window. Kernels with FLOPs that the operands do not show (Pallas on a TPU) count only as traffic.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_FREE = re.compile(
    r"parameter|get-tuple-element|tuple|bitcast|constant|after-all|opt-barrier|partition-id|iota|domain|"
    r"(slice|copy|async|all-gather|all-reduce|collective-permute|send|recv)-done"
)
"""Instructions that move nothing."""
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "SliceBitcast")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_WHOLE = ("reduce", "reduce-window", "dot", "convolution", "sort", "scatter", "custom-call", "fusion", "while", "call")
"""Instructions that read all of their operands for any part of their result."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes and FLOPs of one instruction in one iteration, and the number of iterations."""

    name: str
    bytes: float
    flops: float
    turns: int


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Sums over a program on a chip.

    Attributes:
      flops: of matrix products that the program shows.
      bytes: read and written in the device's memory.
      launches: instructions that run.
      seconds: sum of every instruction's larger time.
      bound_by_bandwidth: seconds of the instructions whose bytes take longer than their products.
    """

    flops: float
    bytes: float
    launches: int
    seconds: float
    bound_by_bandwidth: float


def roofline(costs: list[Cost], rate: float, bandwidth: float) -> Roofline:
    """Sum ``costs`` for matrix units of ``rate`` FLOP/s and a memory of ``bandwidth`` bytes/s."""
    moving = [cost for cost in costs if cost.bytes / bandwidth > cost.flops / rate]
    return Roofline(
        flops=sum(cost.flops * cost.turns for cost in costs),
        bytes=sum(cost.bytes * cost.turns for cost in costs),
        launches=sum(cost.turns for cost in costs),
        seconds=sum(max(cost.bytes / bandwidth, cost.flops / rate) * cost.turns for cost in costs),
        bound_by_bandwidth=sum(cost.bytes / bandwidth * cost.turns for cost in moving),
    )


def costs(text: str) -> list[Cost]:
    """Return the cost of every instruction that runs, of ``compiled.as_text()``."""
    return list(_Program(text).costs())


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line: ``name = type op(arguments), attributes``."""

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, key: str = "calls") -> str:
        """Return the name of a computation that the instruction calls; "" if there is none."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""

    @property
    def target(self) -> str:
        """The target of a custom call."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match.group(1) if match else ""


def _close(text: str) -> int:
    """Return the index of the parenthesis that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text) - 1


def _parse(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, rest = match.groups()
    end = _close(rest) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end + 1 :]
    op, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    inner = rest[len(op) :]
    end = _close(inner)
    return _Instruction(name, kind, op, inner[1:end], inner[end + 1 :], bool(root))


def _size(kind: str) -> float:
    """Return the bytes of a type in the device's main memory; a TPU's nearer memories, S(1), cost no traffic."""
    return sum(
        math.prod(int(d) for d in dims.split(",") if d) * _BYTES.get(name, 0)
        for name, dims, layout in _ARRAY.findall(kind)
        if "S(" not in layout
    )


def _dims(kind: str) -> list[int]:
    match = _ARRAY.search(kind)
    return [int(d) for d in match.group(2).split(",") if d] if match else []


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    return [int(d) for d in re.findall(r"\d+", match.group(1))] if match else []


def _shares(inner: Mapping[str, _Instruction]) -> dict[str, float]:
    """Return which share of each array of a fusion its root needs; a fusion computes and reads nothing else.

    Elementwise instructions need the same share of their operands. Slices of one array are assumed to be disjoint.
    """
    whole: dict[str, float] = collections.defaultdict(float)
    parts: dict[str, float] = collections.defaultdict(float)

    def share(name: str) -> float:
        return min(1.0, max(whole[name], parts[name]))

    for each in reversed(inner.values()):  # users come after their operands
        if each.root:
            whole[each.name] = 1.0
        needed = 1.0 if each.op in _WHOLE else share(each.name)
        for i, name in enumerate(each.operands):
            if name not in inner or (i == 0 and each.op in _UPDATES):  # an update in place reads nothing
                continue
            if i == 0 and each.op in _SLICES:
                parts[name] += needed * math.prod(_dims(each.type)) / max(1, math.prod(_dims(inner[name].type)))
            else:
                whole[name] = max(whole[name], needed)
    return {name: share(name) for name in inner}


class _Program:
    """The computations of a program by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        table: dict[str, _Instruction] | None = None
        for raw in text.splitlines():
            line = re.sub(r"/\*index=\d+\*/", "", raw)
            if match := _COMPUTATION.match(line):
                table = self.computations.setdefault(match.group(2), {})
                self.entry = match.group(2) if match.group(1) else self.entry
            elif line.rstrip() == "}":
                table = None
            elif table is not None and (parsed := _parse(line)):
                table[parsed.name] = parsed

    def costs(self) -> Iterator[Cost]:
        """Yield every instruction that runs."""
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: str, turns: int) -> Iterator[Cost]:
        table = self.computations.get(computation, {})
        for one in table.values():
            if one.op == "while":
                yield from self._walk(one.called("body"), turns * self._trips(one))
            elif one.op == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
                names = re.findall(r"%?([\w.\-]+)", listed.group(1)) if listed else []
                for branch in names or [one.called("true_computation"), one.called("false_computation")]:
                    yield from self._walk(branch, turns)
            elif one.op == "call":
                yield from self._walk(one.called("to_apply"), turns)
            elif not _FREE.fullmatch(one.op) and one.target not in _FREE_CALLS:
                yield Cost(one.name, self._bytes(one, table), self._flops(one, table), turns)

    def _trips(self, loop: _Instruction) -> int:
        """Return the iterations of a loop: the count that XLA knows, else the largest constant of its condition."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.called("condition"), {})
        parts = [condition, *(self.computations.get(one.called(), {}) for one in condition.values())]
        constants = [one.arguments for part in parts for one in part.values() if one.op == "constant"]
        return max((int(x) for x in constants if re.fullmatch(r"\s*-?\d+\s*", x)), default=1)

    # ---- bytes ----

    def _bytes(self, one: _Instruction, table: Mapping[str, _Instruction]) -> float:
        operands = [_size(table[name].type) for name in one.operands if name in table]
        if one.op == "fusion":
            return self._fused_bytes(one, operands)
        if one.op in ("dynamic-slice", "slice"):
            return 2 * _size(one.type)
        if one.op == "dynamic-update-slice":
            return 2 * operands[1]
        if one.op in ("copy-start", "slice-start"):  # (destination, source, ...), or of a slice the other way round
            first, second = ("".join(part) for part in re.findall(r"([a-z]\w*\[[\d,]*\])(\{[^}]*\})?", one.type)[:2])
            least = min(_size(re.sub(r"\{.*", "", part)) for part in (first, second))
            return sum(least for part in (first, second) if "S(" not in part)
        # Without the scratch memory of a custom call.
        written = re.sub(r"[su]8\[\d+\]\{0\}", "", one.type) if one.op == "custom-call" else one.type
        return sum(operands) + _size(written)

    def _fused_bytes(self, one: _Instruction, operands: list[float]) -> float:
        """Return the bytes that a fusion reads and writes, of every operand only the share that it needs."""
        inner = self.computations.get(one.called(), {})
        shares, root = _shares(inner), next((each for each in inner.values() if each.root), None)
        parameters = {int(each.arguments): each.name for each in inner.values() if each.op == "parameter"}
        read = sum(size * shares.get(parameters.get(i, ""), 1.0) for i, size in enumerate(operands))
        return read + (_size(one.type) if root is None else self._written(root, inner))

    def _written(self, one: _Instruction, inner: Mapping[str, _Instruction]) -> float:
        operands = [inner[name] for name in one.operands if name in inner]
        if one.op == "tuple":
            return sum(self._written(each, inner) for each in operands)
        if one.op == "bitcast" and operands:
            return self._written(operands[0], inner)
        if one.op in _UPDATES and len(operands) > 1:
            return _size(operands[1 if one.op == "dynamic-update-slice" else -1].type)
        return _size(one.type)

    # ---- products ----

    def _flops(self, one: _Instruction, table: Mapping[str, _Instruction]) -> float:
        if one.op == "fusion":
            inner = self.computations.get(one.called(), {})
            return sum(self._flops(each, inner) for each in inner.values())
        types = [table[name].type for name in one.operands if name in table]
        if one.op == "dot":
            summed = [_dims(types[0])[d] for d in _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)]
        elif one.op == "convolution" or "conv" in one.target.lower():
            labels = re.search(r"dim_labels=[\w?]+_([\w?]+)->", one.attributes)
            summed = [
                d for label, d in zip(labels.group(1) if labels else "", _dims(types[1]), strict=False) if label != "o"
            ]
        elif "fmha" in one.target:
            (batch, queries, heads, width), keys = _dims(types[0]), _dims(types[1])[1]
            return 4.0 * batch * queries * heads * width * keys * (2.5 if "Backward" in one.target else 1.0)
        elif "cublas" in one.target or "gemm" in one.target.lower():
            axes = _numbers(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
            summed = [_dims(types[0])[d] for d in axes]
        else:
            return 0.0
        return 2.0 * math.prod(_dims(one.type)) * math.prod(summed)
