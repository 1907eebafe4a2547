"""Writes what was measured into the README and docs/speed.md, between their `bench` marks, and the picture beside it.

    python tools/speed_tables.py [--check]

The numbers are those of benchmarks/results/cpu.json, which `ttt-e2e bench --output` writes as bench.json.
"""

import argparse
import json
import sys
from pathlib import Path

from ttt_e2e.benchmarks.report import RATIOS, markdown, plot, ratio
from ttt_e2e.evaluation.tables import Table, between_marks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
PICTURE = ROOT / "docs" / "speed"
# What the README shows of all works.
TOLD = (
    "training step, 1K",
    "training step, 8K, checkpointing",
    "reading 1K",
    "reading 32K",
    "decoding",
    "generate, 512 read and 1 written",
)


def summary(measured: dict) -> str:
    """The ratios of the most telling works."""
    times = measured["seconds"]
    rows = [
        [name, *(ratio(times[name][one], times[name][other]) for one, other in RATIOS.values())]
        for name in TOLD
        if name in times
    ]
    return Table("", ["", *RATIOS], rows).markdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the pages say something else")
    check = parser.parse_args().check
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    blocks = {ROOT / "README.md": summary(measured), ROOT / "docs" / "speed.md": markdown(measured)}
    stale = []
    for path, block in blocks.items():
        text = path.read_text(encoding="utf-8")
        new = between_marks(text, "bench", block)
        if new != text:
            stale.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"{' and '.join(stale)} do not say what {RESULTS.name} holds: run `python tools/speed_tables.py`.")
        return 1
    lengths = [work for work in measured["works"].values() if work["kind"] == "read"]
    if not check and len(lengths) > 1:  # a quick measurement has one, of which there is nothing to see
        plot(measured, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
