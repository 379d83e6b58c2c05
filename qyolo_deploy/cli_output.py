"""What all commands share: the options for what is printed, and tables on stdout."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 240

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]


def stdout() -> Console:
    """For tables and results; in a file or a pipe nothing is cut off to fit a screen that is not there."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def make_table(*columns: str) -> Table:
    """An empty table with these heads."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
