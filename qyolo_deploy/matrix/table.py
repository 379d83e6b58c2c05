"""Matrix results for people: table, CSV and plot."""

import csv
import io
import statistics

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.matrix.results import MatrixResult, spread
from qyolo_deploy.release.charts import Dot, dot_plot

_STYLE = (
    "<style>:root{--ink:#222;--soft:#888;--grid:#ddd;--card:#fff}text{font-family:sans-serif}.one{--c:#2563eb}"
    ".published{--c:#d97706}</style>"
)


def table(result: MatrixResult) -> tuple[list[str], list[list[str]]]:
    """Head and rows: mean over seeds with its standard deviation, the published number in brackets behind it."""
    head = ["", *(column.name for column in result.matrix.columns)]
    rows = [
        [row.name, *(_text(result, row.name, column.name) for column in result.matrix.columns)]
        for row in result.matrix.rows
    ]
    return head, rows


def caption(result: MatrixResult) -> str:
    """What the table shows, under which conditions."""
    matrix = result.matrix
    seeds = len({cell.seed for cell in result.cells})
    base = [100 * cell.values["float"] for cell in result.cells if "float" in cell.values]
    others = [f"; of {entry.view} in {entry.name}" for entry in (*matrix.rows, *matrix.columns) if entry.view]
    parts = [f"{matrix.metric} of {matrix.view} in points{''.join(others)}"]
    parts.append(f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed")
    if base:
        parts.append(f"float {statistics.mean(base):.2f}")
    parts.append("share of oscillating weights after the bar")
    if matrix.published:
        parts.append("published in brackets")
    text = f"{'; '.join(parts)}."
    return f"{text} Budget: {result.note}" if result.note else text


def _text(result: MatrixResult, row: str, column: str) -> str:
    values = result.points(row, column)
    if not values:
        return "failed"
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {spread(values):.2f}"
    if (oscillating := result.oscillating(row, column)) is not None:
        text += f" | {oscillating:.1f} %"
    published = result.matrix.published.get(row, {}).get(column)
    return text if published is None else f"{text} ({published:g})"


def write_csv(result: MatrixResult) -> None:
    """One line a cell and view: `cells.csv`."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["row", "column", "seed", "view", result.matrix.metric, "oscillating", "error"])
    for cell in result.cells:
        for view in cell.values or [""]:
            value = cell.values.get(view)
            lines.writerow([cell.row, cell.column, cell.seed, view, value, cell.oscillating, cell.error])
    write_atomic(result.folder / "cells.csv", file.getvalue())


def write_markdown(result: MatrixResult) -> None:
    """The table as it is printed: `table.md`."""
    head, rows = table(result)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    write_atomic(result.folder / "table.md", "\n".join([caption(result), "", *lines, ""]))


def write_plot(result: MatrixResult) -> None:
    """Each seed as a dot, cells below one another: `plot.svg`."""
    rows = []
    for column in result.matrix.columns:
        for row in result.matrix.rows:
            dots = [Dot(f"seed {n}", "one", value) for n, value in enumerate(result.points(row.name, column.name))]
            if dots:
                rows.append((f"{row.name}, {column.name}", dots))
    if rows:
        svg = dot_plot(rows, title=caption(result)).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        start = svg.index(">") + 1
        write_atomic(result.folder / "plot.svg", svg[:start] + _STYLE + svg[start:])
