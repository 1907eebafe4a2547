"""Tables of evaluation results, for the terminal and for Markdown files."""

import re
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


def between_marks(text: str, name: str, block: str) -> str:
    """A page with `block` between its marks `<!-- name: begin ... -->` and `<!-- name: end -->`.

    Raises:
        ValueError: there is not exactly one pair of them.
    """
    marks = re.compile(rf"(<!-- {re.escape(name)}: begin[^>]*-->\n).*?(<!-- {re.escape(name)}: end -->)", re.DOTALL)
    new, count = marks.subn(lambda found: f"{found[1]}{block.rstrip()}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"There must be one pair of the marks `<!-- {name}: begin -->` and `<!-- {name}: end -->`.")
    return new
