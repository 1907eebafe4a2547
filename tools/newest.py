"""Tests with the newest release of all that the package stands on, whatever upper bounds setup.py gives.

    python tools/newest.py install [--torch torch==2.13.0]      into the environment of the Python that runs this
    python tools/newest.py test tests/modeling -n 2             pytest's arguments; ends in tables of what broke

The tables are also written to `runs/test-newest.md`. The exit status is 1 where anything broke.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
TABLES = Path("runs/test-newest.md")
# The first pattern that fits a test file names its area.
AREAS = {
    "tests/modeling/test_*generation*": "generation",
    "tests/modeling/test_finished_rows*": "generation",
    "tests/modeling/test_*cache*": "cache",
    "tests/modeling/test_pipeline*": "pipeline",
    "tests/modeling/*": "models",
    "tests/storage/*": "storage",
    "tests/data/*": "data",
    "tests/conversion/*": "converters",
    "tests/training/*": "Trainer",
    "tests/serving/*": "serving",
    "tests/model_cards/*": "remote code",
}
COUNTED = ("passed", "failed", "errors", "skipped")
OUTCOMES = {"failure": "failed", "error": "errors", "skipped": "skipped"}


def without_upper_bounds(requirements: list[str]) -> list[str]:
    """The requirements with nothing but their lower bounds."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requirements]
    for requirement in parsed:
        requirement.specifier = type(requirement.specifier)(
            ",".join(str(part) for part in requirement.specifier if part.operator in (">=", ">", "!="))
        )
    return [str(requirement) for requirement in parsed]


def required() -> list[str]:
    """What setup.py asks for, with the extra `dev`."""
    from package_path import described

    return [*described().install_requires, *described().extras_require["dev"]]


def install(torch: str) -> None:
    """Install, or bring up to date."""
    pip = [sys.executable, "-m", "pip", "install", "--upgrade"]
    subprocess.run([*pip, "setuptools", "packaging", torch], check=True)
    subprocess.run([*pip, "--upgrade-strategy", "eager", torch, *without_upper_bounds(required())], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)


def test(arguments: list[str]) -> bool:
    """Run pytest and show the tables; whether all is well."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = ["pytest", "--continue-on-collection-errors", f"--junit-xml={results}", *arguments]
        status = subprocess.run([sys.executable, "-m", *command]).returncode
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    sections, broken = tables(cases)
    if not broken and status:
        broken = True
        sections.append(f"Broken: pytest itself ended with status {status}.")
    text = "\n\n".join(sections) + "\n"
    TABLES.parent.mkdir(exist_ok=True)
    TABLES.write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)
    return not broken


def tables(cases: list[ElementTree.Element]) -> tuple[list[str], bool]:
    """What to show of the cases of a JUnit file, in Markdown, and whether anything broke."""
    areas, messages = {}, {}
    for case in cases:
        file = _file(case)
        area = next((area for pattern, area in AREAS.items() if fnmatch(file, pattern)), Path(file).parent.name)
        child = next((child for child in case if child.tag in OUTCOMES), None)
        outcome = "passed" if child is None else OUTCOMES[child.tag]
        areas.setdefault(area, Counter())[outcome] += 1
        if outcome in ("failed", "errors"):
            messages.setdefault(_message(child), []).append(f"{file}::{case.get('name')}")
    rows = [[area, *(str(areas[area][name]) for name in COUNTED)] for area in sorted(areas)]
    sections = [_versions(), _table(["area", *COUNTED], rows)]
    if messages:
        ordered = sorted(messages.items(), key=lambda entry: -len(entry[1]))
        sections.append(_table(["what broke", "tests", "first"], [[m, str(len(t)), t[0]] for m, t in ordered]))
    elif any(counts["passed"] for counts in areas.values()):
        sections.append("Nothing broke.")
    else:
        sections.append("Broken: no test ran.")
    return sections, sections[-1] != "Nothing broke."


def _file(case: ElementTree.Element) -> str:
    """`tests/modeling/test_cache.py` of a case in it, of a class in it, or of a file that cannot be imported."""
    parts = (case.get("classname") or case.get("name")).split(".")
    last = next((index for index, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
    return "/".join(parts[: last + 1]) + ".py"


def _message(failure: ElementTree.Element) -> str:
    """One line: of a file that cannot be imported the exception, which stands only in the long text."""
    raised = [line[1:].strip() for line in (failure.text or "").splitlines() if line.startswith("E ")]
    short = (failure.get("message") or "").strip().splitlines() or ["(no message)"]
    return (raised[-1] if raised and short[0] == "collection failure" else short[0])[:200]


def _versions() -> str:
    """The packages that setup.py names, as they are here and as they are locked."""
    from packaging.requirements import Requirement

    locked = dict(line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    rows = []
    for name in sorted({Requirement(text).name for text in required()}):
        try:
            here = version(name)
        except PackageNotFoundError:
            here = "missing"
        rows.append([name, here, locked.get(name, "")])
    return _table(["package", "here", "locked"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=("install", "test"))
    parser.add_argument("--torch", default="torch", help="of install: the torch to test with")
    asked, others = parser.parse_known_args()
    if asked.command == "test":
        return 0 if test(others) else 1
    if others:
        parser.error(f"install takes no {others[0]!r}")
    install(asked.torch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
