"""The charts of a report: lines, bars, dots and histograms, drawn by matplotlib.

All are narrow enough to be read on a phone without being scaled down much.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qyolo_deploy.release.svg import CARD, GRID, INK, OWN, SOFT, draw, mark, printable, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Chart = tuple[str, str]
"""Caption and SVG."""

WIDTH, HEIGHT = 380.0, 220.0
CHAR = 6.2
"""Mean width of a character at the font's size."""
_DOTS = 4.5  # px across the marks of lines with few points


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: a value, and the text behind its bar."""

    label: str
    style: str
    value: float
    text: str


@dataclass(frozen=True)
class Dot:
    """One mark in a row of a dot plot."""

    label: str
    style: str
    value: float


@dataclass(frozen=True)
class Trace:
    """One line of a chart.

    Args:
        style: Class that gives the colour.
        points: x and y, in the order of x; at least one.
        kind: A line; a line with marks; a dashed one for what the others are compared with.
        label: Told when the line is pointed at.
    """

    style: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "marks", "dashed"] = "line"
    label: str = ""


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, evenly spaced, the first <= `low` and the last >= `high`."""
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-300):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    locator = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2)
    return [float(tick) for tick in locator.tick_values(low, high)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Write ticks with as many decimals as tell them apart, without zeros at the end."""
    decimals = max(0, 2 - math.floor(math.log10(ticks[1] - ticks[0])))
    texts = [f"{round(tick, decimals) + 0.0:.{decimals}f}" for tick in ticks]
    return [(text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−") for text in texts]


def shorten(text: str, length: int) -> str:
    """Return at most `length` characters of a text."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def trace_chart(
    traces: Sequence[Trace],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    limits: tuple[float, float] | None = None,
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> str:
    """Draw traces over common axes, later ones on top.

    Args:
        traces: At least one.
        title: Read out in place of the picture.
        x_label: Stands below the axis.
        y_label: Stands beside the axis.
        limits: Both ends of both axes; by default those of the traces.
        size: In px.
    """
    xs, ys = ([point[axis] for trace in traces for point in trace.points] for axis in (0, 1))
    x_low, x_high = limits or (min(xs), max(xs))
    y_ticks = round_ticks(*(limits or (min(ys), max(ys))), 2 if size[0] < WIDTH else 5)

    def paint(axes: "Axes") -> None:
        few = 2 if size[0] < WIDTH else 6
        x_ticks = [tick for tick in round_ticks(x_low, x_high, few) if x_low - 1e-9 <= tick <= x_high + 1e-9]
        if all(x == round(x) for x in xs) and limits is None:  # epochs and steps have no halves
            x_ticks = [tick for tick in x_ticks if abs(tick - round(tick)) < 1e-9]
        set_frame(axes, (x_low, x_high), x_ticks if len(x_ticks) > 1 else [], y_ticks, x_label, y_label)
        for trace in traces:
            dashes: dict[str, Any] = (
                {"linestyle": (0, (5, 4)), "linewidth": 1.2} if trace.kind == "dashed" else {"linewidth": 1.7}
            )
            if trace.kind == "marks":
                dashes |= {"marker": "o", "markersize": _DOTS, "markerfacecolor": CARD, "markeredgewidth": 1.5}
            across, up = zip(*trace.points, strict=True)
            axes.plot(across, up, color=OWN, clip_on=False, gid=mark(trace.style, trace.label), **dashes)

    return draw(*size, (left_margin(y_ticks, y_label), 10, 14, 38 if x_label else 22), title, paint)


def histogram(
    counts: Sequence[float], low: float, high: float, *, title: str, x_label: str, style: str, unit: str
) -> str:
    """Draw how often values fall into bins of equal width; each bar tells its number when pointed at.

    Args:
        counts: One for each bin; at least one, none negative.
        low: Where the first bin begins.
        high: Where the last one ends.
        title: Read out in place of the picture.
        x_label: Stands below the axis.
        style: Class that gives the colour.
        unit: What is counted.
    """
    y_ticks = round_ticks(0.0, max(*counts, 5.0))  # up to 5 a step is 1: there are no halves of what is counted
    width = (high - low) / len(counts)

    def paint(axes: "Axes") -> None:
        set_frame(axes, (low, high), round_ticks(low, high, 4), y_ticks, x_label)
        for index, count in enumerate(counts):
            start = low + index * width
            about = f"{start:.2f} to {start + width:.2f}: {count:g} {unit}".replace("-", "−")
            axes.bar(start, count, width * 0.94, align="edge", color=OWN)[0].set_gid(mark(style, about))

    return draw(WIDTH, HEIGHT, (left_margin(y_ticks), 10, 14, 38), title, paint)


def bar_chart(bars: Sequence[Bar], *, title: str, pitch: float = 22.0) -> str:
    """Draw horizontal bars from zero, each with its label before it and its text behind it.

    Args:
        bars: At least one; values are not negative.
        title: Read out in place of the picture.
        pitch: From one bar to the next.
    """
    labels = [shorten(bar.label, 28) for bar in bars]
    texts = [shorten(bar.text, 20) for bar in bars]
    right = 12 + CHAR * max(map(len, texts))
    ticks = round_ticks(0.0, max(bar.value for bar in bars) or 1.0, 4)

    def paint(axes: "Axes") -> None:
        _rows(axes, labels, ticks)
        for row, (bar, text) in enumerate(zip(bars, texts, strict=True)):
            shape = axes.barh(row, bar.value, 0.62, color=OWN)[0]
            shape.set_gid(mark(bar.style, f"{bar.label} {bar.text}"))
            about: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "color": INK}
            axes.annotate(text, (bar.value, row), annotation_clip=False, **about)

    left = 14 + CHAR * max(map(len, labels))
    return draw(WIDTH, pitch * len(bars) + 26, (left, 2, right, 24), title, paint)


def dot_plot(rows: Sequence[tuple[str, Sequence[Dot]]], *, title: str) -> str:
    """Draw one row of dots a label, joined by a thin line from the least to the greatest.

    Args:
        rows: Label and dots; at least one row, each with at least one dot. The first dots of a row are drawn
            largest, so that dots of equal values show as rings.
        title: Read out in place of the picture.
    """
    labels = [shorten(label, 22) for label, _ in rows]
    values = [dot.value for _, dots in rows for dot in dots]
    ticks = round_ticks(min(values), max(values), 5)

    def paint(axes: "Axes") -> None:
        _rows(axes, labels, ticks)
        axes.axvline(0.0, color=SOFT, linewidth=0.8, visible=ticks[0] <= 0 <= ticks[-1])
        for row, (label, dots) in enumerate(rows):
            ends = [dot.value for dot in dots]
            axes.plot([min(ends), max(ends)], [row, row], color=SOFT, linewidth=0.8)
            for rank, dot in enumerate(dots):
                value = f"{dot.value:.2f}".replace("-", "−")
                name = mark(dot.style, f"{label}, {dot.label}: {value}")
                look: dict[str, Any] = {
                    "markersize": max(5.5, 11.0 - 2.4 * rank),
                    "markeredgewidth": 2.0,
                    "markerfacecolor": CARD,
                }
                axes.plot(dot.value, row, "o", color=OWN, clip_on=False, gid=name, **look)

    return draw(WIDTH, 22.0 * len(rows) + 26, (14 + CHAR * max(map(len, labels)), 2, 16, 24), title, paint)


def left_margin(y_ticks: Sequence[float], y_label: str = "") -> float:
    """Return the margin that holds the longest number and the label of the y axis."""
    return 14 + CHAR * max(map(len, tick_texts(y_ticks))) + (16 if y_label else 0)


def _bare(axes: "Axes", *spines: str) -> None:
    for spine in spines:
        axes.spines[spine].set_visible(False)
    axes.spines["bottom"].set(color=SOFT, alpha=0.55, linewidth=0.8)
    axes.tick_params(length=0, pad=6, labelcolor=SOFT)
    axes.set_axisbelow(True)


def set_frame(
    axes: "Axes",
    x_limits: tuple[float, float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str = "",
) -> None:
    """Set round numbers along both axes, with lines across."""
    _bare(axes, "left", "right", "top")
    axes.set_yticks(y_ticks, tick_texts(y_ticks))
    axes.set_xticks(x_ticks, tick_texts(x_ticks) if len(x_ticks) > 1 else [])
    axes.set_ylim(y_ticks[0], y_ticks[-1])
    low, high = x_limits
    axes.set_xlim(low, high if high > low else low + 1.0)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_xlabel(printable(x_label), color=SOFT, labelpad=4)
    axes.set_ylabel(printable(y_label), color=SOFT, labelpad=5)


def _rows(axes: "Axes", labels: Sequence[str], ticks: Sequence[float]) -> None:
    """Set one row a label, from the top, over an axis of numbers."""
    _bare(axes, "left", "right", "top", "bottom")
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xticks(ticks, tick_texts(ticks))
    axes.set_xlim(ticks[0], ticks[-1])
    axes.grid(axis="x", color=GRID, linewidth=1)
