"""Tables and lines on the terminal."""

import sys

from rich.console import Console
from rich.table import Table


def console() -> Console:
    # A pipe gets the whole table, not one folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 200)


def print_table(title: str, header, rows) -> None:
    table = Table(title=title or None, title_justify="left")
    for i, name in enumerate(header):
        numbers = all(row[i][:1].isdigit() or row[i][:1] == "-" for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_evaluation(result) -> None:
    title = f"{len(result.captions)} captions, {len(result.seeds)} seeds; against the floating pictures"
    print_table(title, result.header(), result.table())
