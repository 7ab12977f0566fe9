"""Tables in the terminal: rich's where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    import rich.box
    import rich.console
    import rich.table
except ImportError:
    rich = None  # type: ignore[assignment]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Prints `rows` under `columns` to stdout; the first `left` columns are aligned left, the others right."""
    if rich is None or not sys.stdout.isatty():
        print(plain_table(title, columns, rows, left=left))
        return
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """The same as text, two spaces between columns."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        pads = (str.ljust if i < left else str.rjust for i in range(len(columns)))
        return "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([title, "", line(columns), rule, *map(line, rows)])
