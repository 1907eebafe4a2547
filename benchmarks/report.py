"""Measured times and memory as a file of numbers, tables and a picture."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..evaluation.plots import Panel, plot_panels
from ..evaluation.results import environment
from ..evaluation.tables import Table
from ..storage.disk import write_text
from ..storage.machine import processor
from .speed import Works
from .systems import OFF, ON, STOCK_FULL, STOCK_WINDOW, SYSTEMS

# Columns of ratios: what is divided by what.
RATIOS = {"off / stock window": (OFF, STOCK_WINDOW), "on / stock window": (ON, STOCK_WINDOW), "on / off": (ON, OFF)}
RATIOS |= {"stock full / on": (STOCK_FULL, ON)}


def report(works: Works, times: Mapping, memory: Mapping, command: str) -> dict:
    """All that was measured, with what it depends on; plain values for JSON."""
    return {
        "environment": environment() | {"threads": 1, "processor": processor()},
        "command": command,
        "sizes": asdict(works.sizes),
        "works": {name: asdict(work) for name, work in works.timed.items()},
        "seconds": {name: dict(own) for name, own in times.items()},
        "memory_bytes": {name: dict(own) for name, own in memory.items()},
    }


def tables(measured: Mapping) -> list[Table]:
    """Milliseconds with ratios, and MiB."""
    rows = []
    for name, own in measured["seconds"].items():
        per_token = measured["works"][name]["kind"] in ("decode", "further")
        times = [f"{1000 * statistics.median(own[system]):.{1 if per_token else 0}f}" for system in SYSTEMS]
        rows.append([name, *times, *(ratio(own[one], own[other]) for one, other in RATIOS.values())])
    made = [Table("Milliseconds, and ratios", ["", *SYSTEMS, *RATIOS], rows)]
    of_memory = [
        [name, *(f"{own[system] / 2**20:.0f}" for system in SYSTEMS)] for name, own in measured["memory_bytes"].items()
    ]
    made.append(Table("Memory at the peak beyond model and input, MiB", ["", *SYSTEMS], of_memory))
    return made


def ratio(one: list[float], other: list[float]) -> str:
    """Median of the ratios of rounds, and half the distance between their lowest and their highest."""
    found = [first / second for first, second in zip(one, other, strict=True)]
    spread = f" ± {(max(found) - min(found)) / 2:.2f}" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f}{spread}"


def write_report(measured: Mapping, folder: Path) -> None:
    """Write bench.json, bench.md, bench.png and bench.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "bench.json", json.dumps(measured, indent=1) + "\n")
    write_text(folder / "bench.md", markdown(measured))
    plot(measured, folder / "bench")


def plot(measured: Mapping, path: Path) -> None:
    """Time per token by length, as path.png and path.svg."""
    plot_panels([_panels(measured)], path)


def markdown(measured: Mapping) -> str:
    """The tables, below a line that says where they were measured."""
    facts = ", ".join(f"{name} {value}" for name, value in measured["environment"].items())
    head = f"`{measured['command']}` ({facts})\n"
    return "\n".join([head, *(f"{table.title}:\n\n{table.markdown()}" for table in tables(measured))])


def _panels(measured: Mapping) -> list[Panel]:
    """Time per token of reading and training by length."""
    panels = []
    for title, kind in (("reading", "read"), ("training step, checkpointing", "train")):
        wanted = {"kind": kind, "checkpointing": kind == "train"}
        works = {name: own for name, own in measured["works"].items() if wanted.items() <= own.items()}
        lengths = [own["length"] for own in works.values()]
        curves = {}
        for system in SYSTEMS:
            seconds = (statistics.median(measured["seconds"][name][system]) for name in works)
            tokens = (own["length"] * own["rows"] for own in works.values())
            curves[system] = (lengths, [1e6 * own / count for own, count in zip(seconds, tokens, strict=True)])
        panels.append(Panel(title, "tokens of text", "microseconds per token", curves, lengths))
    return panels
