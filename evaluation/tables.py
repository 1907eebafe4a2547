"""Tables of evaluation results, for the terminal and for Markdown files."""

from collections.abc import Sequence
from dataclasses import dataclass

import rich.table


@dataclass
class Table:
    """A table of ready-made strings; the first column is the name of the row.

    Attributes:
        title: above the table.
        header: one string per column.
        rows: one list per row, as long as the header.
    """

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, numbers to the right, without the title."""
        alignment = ["---"] + ["---:"] * (len(self.header) - 1)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [self.header, alignment, *self.rows]) + "\n"

    def rich(self) -> rich.table.Table:
        """The table for a `rich.console.Console`."""
        table = rich.table.Table(title=self.title)
        for column, name in enumerate(self.header):
            table.add_column(name, justify="right" if column else "left")
        for cells in self.rows:
            table.add_row(*cells)
        return table


def loss_table(systems: Sequence[dict], bounds: Sequence[tuple[int, int]], title: str) -> Table:
    """Table of loss by token position, one column per system.

    Args:
        systems: each with `name`, `parameters`, `training_seconds`, `loss` (mean in nats) and `loss_by_bucket` (one
            mean per bucket).
        bounds: [start, end) of each bucket.
        title: of the table.
    """
    header = ["", *(system["name"] for system in systems)]
    rows = [
        ["parameters", *(f"{system['parameters']:,}" for system in systems)],
        ["seconds of training", *(f"{system['training_seconds']:.0f}" for system in systems)],
    ]
    for bucket, (start, end) in enumerate(bounds):
        rows.append([f"positions {start}-{end}", *(f"{system['loss_by_bucket'][bucket]:.3f}" for system in systems)])
    rows.append(["all positions", *(f"{system['loss']:.3f}" for system in systems)])
    return Table(title, header, rows)
