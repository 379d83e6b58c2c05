"""Lines in one chart as inline SVG text, for pages that are written without packages.

Colours come from the page's style sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_WIDTH, _HEIGHT = 420.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 14.0, 10.0, 36.0
_MARGIN = 6.0  # keeps a trace along the lowest number apart from the axis
_CHAR = 6.2  # mean width of a character at font size 11


@dataclass(frozen=True)
class Trace:
    """One line of a chart.

    Args:
        style: Class that gives the colour.
        points: x and y, in the order of x; at least one.
        kind: A line; steps, for what jumps; a dashed line for what the others are compared with; separate
            dots, and rings, which leave dots of the same place visible.
    """

    style: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "steps", "dashed", "dots", "rings"] = "line"


@dataclass(frozen=True)
class _Frame:
    """Round numbers along both axes, and where a point lies between them."""

    x_low: float
    x_high: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    margin: float = _MARGIN

    @property
    def left(self) -> float:
        """Where the x axis begins: behind the longest number."""
        return max(_LEFT, 12 + _CHAR * max(map(len, _numbers(self.y_ticks))))

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.left + across * (_WIDTH - self.left - _RIGHT), _HEIGHT - _BOTTOM - self.margin - up * (
            _HEIGHT - _TOP - _BOTTOM - self.margin
        )

    def draw(self, x_label: str) -> list[str]:
        """Return grid lines, axis and numbers."""
        left, right, floor = self.left, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        parts = []
        for tick, number in zip(self.y_ticks, _numbers(self.y_ticks), strict=True):
            y = self.place(self.x_low, tick)[1]
            parts.append(f'<line x1="{left:g}" y1="{y:.1f}" x2="{right:g}" y2="{y:.1f}" class="grid"/>')
            parts.append(_text(left - 7, y + 4, number, "end"))
        for tick, number in zip(self.x_ticks, _numbers(self.x_ticks), strict=True):
            if self.x_low <= tick <= self.x_high:
                x = self.place(tick, self.y_ticks[0])[0]
                parts.append(f'<line x1="{x:.1f}" y1="{floor:g}" x2="{x:.1f}" y2="{floor + 4:g}" class="axis"/>')
                parts.append(_text(x, floor + 16, number, "middle"))
        parts.append(f'<line x1="{left:g}" y1="{floor:g}" x2="{right:g}" y2="{floor:g}" class="axis"/>')
        return [*parts, _text((left + right) / 2, _HEIGHT - 4, x_label, "middle")]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, evenly spaced, the first <= `low` and the last >= `high`.

    Steps are 1, 2, 2.5 or 5 times a power of ten.
    """
    if high < low or math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-300):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _numbers(ticks: Sequence[float]) -> list[str]:
    """Write ticks with as many decimals as tell them apart, without zeros at the end."""
    decimals = max(0, 2 - math.floor(math.log10(ticks[1] - ticks[0])))
    texts = [f"{round(tick, decimals) + 0.0:.{decimals}f}" for tick in ticks]
    return [(text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−") for text in texts]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="tick">{escape(text)}</text>'


def _corners(placed: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Hold each height until the next point."""
    corners = [placed[0]]
    for x, y in placed[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


def _draw(trace: Trace, frame: _Frame) -> str:
    placed = [frame.place(x, y) for x, y in trace.points]
    if trace.kind in ("dots", "rings"):
        look = 'r="3" class="dot"' if trace.kind == "dots" else 'r="6.5" class="ring"'
        shapes = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/>' for x, y in placed)
    else:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_corners(placed) if trace.kind == "steps" else placed))
        shapes = f'<polyline points="{path}" class="{"curve dashed" if trace.kind == "dashed" else "curve"}"/>'
    return f'<g class="{trace.style}">{shapes}</g>'


def trace_chart(traces: Sequence[Trace], *, title: str, x_label: str) -> str:
    """Draw traces over common axes, later ones on top.

    Args:
        traces: At least one.
        title: Read out in place of the picture.
        x_label: Stands below the axis.
    """
    xs = [x for trace in traces for x, _ in trace.points]
    ys = [y for trace in traces for _, y in trace.points]
    frame = _Frame(min(xs), max(xs), nice_ticks(min(xs), max(xs), 6), nice_ticks(min(ys), max(ys)))
    return _svg(title, [*frame.draw(x_label), *(_draw(trace, frame) for trace in traces)])


def _svg(title: str, parts: Sequence[str]) -> str:
    about = escape(title)
    head = f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{about}" font-size="11" class="plot">'
    return "".join((head, f"<title>{about}</title>", *parts, "</svg>"))
