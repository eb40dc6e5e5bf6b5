"""Report a benchmark as JSON and as a Markdown table, and compare two reports.

Every line repeats its settings.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from causvid_jax.analysis.delivery import ratio_interval

SCHEMA = "causvid_jax.bench/2"
"""Version of the JSON. Keys of a line: :class:`Line`, the settings of ``NAMES``, ``tflops``, ``share_of_peak``; of an
entry of ``delivery``: :class:`causvid_jax.analysis.delivery.Delivery`."""
NAMES = ("resolution", "streams", "window", "steps", "precision")
"""Settings that every line repeats."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One measurement.

    Attributes:
        what: name of the measured call.
        seen: latent frames that the block attends to, including itself; None if lengths vary.
        codec: the decoder, "none" for latents.
        p50_ms, p99_ms: percentiles of the milliseconds of a call, each waited for.
        calls: number of timed calls.
        tflop: model TFLOP of one call, over all streams; None if it is not counted.
        fps: pixel frames per second of each stream; None if a call makes none.
        ms: milliseconds of each call; empty if the report has percentiles only.
    """

    what: str
    seen: int | None
    codec: str
    p50_ms: float
    p99_ms: float
    calls: int
    tflop: float | None = None
    fps: float | None = None
    ms: tuple[float, ...] = ()


def line(item: Line, settings: Mapping[str, Any], peak: float | None) -> dict[str, Any]:
    """Return ``item`` with its settings, achieved TFLOP/s and their share of ``peak`` (FLOP/s; None: unknown)."""
    rate = None if item.tflop is None else item.tflop / item.p50_ms * 1e3
    share = None if rate is None or peak is None else rate * 1e12 / peak
    return {**dataclasses.asdict(item), "tflops": rate, "share_of_peak": share, **{n: settings[n] for n in NAMES}}


def _number(value: float | None) -> str:
    """Format ``value`` with three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.7f}"


def _cells(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_cells(header), _cells(["---"] * len(header)), *map(_cells, rows)])


def _subject(item: Mapping[str, Any]) -> list[str]:
    """Return the first cells of a line: what was measured, and its settings."""
    seen = "-" if item["seen"] is None else str(item["seen"])
    return [item["what"], seen, *(str(item[name]) for name in NAMES), item["codec"]]


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown: device, settings, table, memory, notes."""
    device, settings, memory = report["device"], report["settings"], report["memory"]
    header = ["what", "frames seen", *NAMES, "codec", "p50 ms", "p99 ms", "TFLOP", "TFLOP/s", "of peak", "frames/s"]
    rows = []
    for item in report["lines"]:
        share = item["share_of_peak"]
        rows.append(
            [
                *_subject(item),
                _number(item["p50_ms"]),
                _number(item["p99_ms"]),
                _number(item["tflop"]),
                _number(item["tflops"]),
                "-" if share is None else f"{share:.1%}",
                _number(item["fps"]),
            ]
        )
    described = ", ".join(f"{name} {value}" for name, value in device.items())
    peaks = "; ".join(f"{name} {_number(size / 2**20)} MiB" for name, size in memory["bytes"].items())
    return "\n\n".join(
        [
            f"## {report['program']}: {settings['recipe']} on {device['kind']}",
            f"{report['date']}; {described}.",
            f"Weights: {report['weights']}. Attention: {settings['attention']}. Peak: {report['peak']}. Compiled in "
            f"{report['compile_seconds']:.0f} s, not part of any time below.",
            _table(header, rows),
            *_deliveries(report.get("delivery", ())),
            f"Memory ({memory['of']}): {peaks}.",
            *report["notes"],
        ]
    ) + "\n"  # fmt: skip


def _deliveries(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the paragraph and the table of the viewer's figures; empty without deliveries."""
    if not items:
        return []
    header = ["codec", "chunks", "first chunk ms", "gap p50 ms", "p95", "p99", "frames/s", "of real time"]
    header += ["on time", "underruns", "stalled ms"]
    names = ("first_ms", "gap_p50_ms", "gap_p95_ms", "gap_p99_ms", "fps", "real_time")
    rows = [
        [
            item["codec"],
            str(item["chunks"]),
            *(_number(item[name]) for name in names),
            f"{item['on_time']:.0%}",
            str(item["underruns"]),
            _number(item["stalled_ms"]),
        ]
        for item in items
    ]
    words = "For a viewer who starts to play when two chunks have arrived (`analysis/delivery.py`):"
    return [words, _table(header, rows)]


def comparison(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return a table of the common lines of two reports, with the ratio of their medians.

    A ratio above 1 means that the first report is faster. The ratio has a 95% interval if both reports have the times
    of every call.

    Raises:
        ValueError: reports of different devices or settings, or without a common line.
    """
    for name in ("kind", "platform"):
        if ours["device"][name] != theirs["device"][name]:
            raise ValueError(
                f"device {name} is {ours['device'][name]!r} and {theirs['device'][name]!r}: not comparable"
            )
    for name in NAMES:
        if ours["settings"][name] != theirs["settings"][name]:
            raise ValueError(f"{name} is {ours['settings'][name]} and {theirs['settings'][name]}: not comparable")

    def key(item: Any) -> Any:
        return item["what"], item["seen"], item["codec"]

    other = {key(item): item for item in theirs["lines"]}
    names = [f"{report['device']['framework']}, {report['settings']['attention']}" for report in (ours, theirs)]
    rows = []
    for item in ours["lines"]:
        if key(item) not in other:
            continue
        match = other[key(item)]
        rows.append(
            [
                *_subject(item),
                *(_number(value) for x in (item, match) for value in (x["p50_ms"], x["p99_ms"], x["tflops"])),
                f"{match['p50_ms'] / item['p50_ms']:.2f}",
                _interval(item, match),
            ]
        )
    if not rows:
        raise ValueError("the two reports have no line in common")
    header = ["what", "frames seen", *NAMES, "codec"]
    header += [f"{name}: {column}" for name in names for column in ("p50 ms", "p99 ms", "TFLOP/s")]
    return _table([*header, "ratio", "95% interval"], rows) + "\n"


def _interval(item: Mapping[str, Any], match: Mapping[str, Any]) -> str:
    if not item.get("ms") or not match.get("ms"):
        return "-"
    low, high = ratio_interval(item["ms"], match["ms"])
    return f"{low:.2f} to {high:.2f}"
