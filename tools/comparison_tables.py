"""Writes what long documents showed into the README and docs/evaluation.md, between their `comparison` marks, and the
picture beside it.

    python tools/comparison_tables.py [--check]

The numbers are those of results/context-length-extended, which `ttt-e2e reproduce context-length-extended` writes.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ttt_e2e.evaluation.tables import Table, between_marks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "context-length-extended"
PICTURE = {RESULTS / "0-context-length" / "results.png": ROOT / "docs" / "context_length.png"}
# By label in the report, the rows of the README; the lowest loss of those that are systems is in bold.
SYSTEMS = {
    "full attention": "full attention",
    "full attention, equal time": "full attention, trained as long",
    "sliding window": "sliding window",
    "sliding window, equal time": "sliding window, trained as long",
    "Mamba 2": "Mamba 2",
    "static twin": "static twin",
    "TTT-E2E": "**TTT-E2E**",
}
OTHERS = {"TTT-E2E, learning off": "TTT-E2E, learning off", "5-gram": "5-gram model of the same text"}
TOKENS, FIRST, LAST = "training tokens", "512", "8,192"


def report_table(report: str) -> Table:
    """The first table of a report."""
    lines = [line for line in report.partition("\n| claim |")[0].splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return Table("", [cell.strip(" |") for cell in header], [[cell.strip(" |") for cell in row] for row in rows])


def summary(whole: Table) -> Table:
    """The rows and columns that the README shows, without standard errors."""
    first, last = whole.header.index(FIRST), whole.header.index(LAST) + 1
    columns = whole.header[first:last]
    rows = {row[0]: [cell.split(" ")[0] for cell in row] for row in whole.rows}
    lowest = [min(float(rows[label][n]) for label in SYSTEMS if label in rows) for n in range(first, last)]
    shown = []
    for label, name in (SYSTEMS | OTHERS).items():
        if label not in rows:
            continue
        tokens, losses = rows[label][whole.header.index(TOKENS)], rows[label][first:last]
        if label in SYSTEMS:
            pairs = zip(losses, lowest, strict=True)
            losses = [f"**{loss}**" if float(loss) == least else loss for loss, least in pairs]
        shown.append([name, f"{int(tokens.replace(',', '')) / 1e6:.1f}M" if tokens else "", *losses])
    return Table("", ["", TOKENS, *columns], shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the pages say something else")
    check = parser.parse_args().check
    whole = report_table((RESULTS / "report.md").read_text(encoding="utf-8"))
    blocks = {ROOT / "README.md": summary(whole), ROOT / "docs" / "evaluation.md": whole}
    stale = []
    for path, table in blocks.items():
        text = path.read_text(encoding="utf-8")
        new = between_marks(text, "comparison", table.markdown())
        if new != text:
            stale.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    for measured, picture in PICTURE.items():
        if measured.read_bytes() != picture.read_bytes():
            stale.append(picture.name)
            if not check:
                shutil.copyfile(measured, picture)
    if check and stale:
        print(f"{', '.join(stale)}: not what {RESULTS.name} holds: run `python tools/comparison_tables.py`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
