"""One table of two reports of the same device and settings, with the ratio of their times.

``python benchmarks/compare.py bench.json torch.json``: the reports of ``launch.bench`` and of
``benchmarks/torch_sampler.py``; a ratio above 1 means that the first is faster. ``--output`` writes the table.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from causvid_jax.analysis import report as report_format


def main() -> None:
    """Read both, refuse what cannot be compared, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=pathlib.Path)
    parser.add_argument("second", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=None, help="a .md file")
    given = parser.parse_args()
    try:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in (given.first, given.second)]
        table = report_format.comparison(*reports)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {given.first} and {given.second} cannot be compared: {error}") from None
    if given.output:
        given.output.write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
