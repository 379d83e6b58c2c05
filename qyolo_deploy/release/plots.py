"""Small plots as inline SVG text. Colours come from the page's style sheet, so they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_FONT = 11
_CHAR = 6.2  # mean width of a character at that font size


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: a value with its text, and a larger one that is drawn pale behind it."""

    label: str
    style: str
    value: float
    text: str
    behind: float | None = None


@dataclass(frozen=True)
class Dot:
    """One mark in a row of a dot plot."""

    label: str
    style: str
    value: float


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


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Write ticks with as many decimals as tell them apart; very small or large ones with an exponent."""
    largest = max(abs(tick) for tick in ticks)
    if largest < 1e-3 or largest >= 1e6:
        return [f"{tick:.3g}" for tick in ticks]
    step = ticks[1] - ticks[0]
    decimals = next(n for n in range(8) if n == 7 or abs(step - round(step, n)) < step * 1e-6)
    return [f"{tick:.{decimals}f}".replace("-", "−") for tick in ticks]


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'font-size="{_FONT}" class="plot">'
    )
    return "".join((head, f"<title>{escape(title)}</title>", *parts, "</svg>"))


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _whole_ticks(low: float, high: float) -> list[int]:
    """Return round whole numbers within the range of an axis that counts epochs or steps."""
    near = [round(tick) for tick in nice_ticks(low, high, 6) if abs(tick - round(tick)) < 1e-6]
    return [tick for tick in near if low <= tick <= high] or [round(low)]


def line_chart(points: Sequence[tuple[float, float]], *, title: str, x_label: str, style: str) -> str:
    """Draw one line over a numeric axis, with a mark at each point where there are few.

    Args:
        points: x and y, in the order of x; at least one.
        title: Read out in place of the picture.
        x_label: Stands below the axis.
        style: Class that gives the colour.
    """
    width, height, left, right, top, bottom = 420.0, 220.0, 50.0, 14.0, 10.0, 36.0
    ys = [y for _, y in points]
    y_ticks = nice_ticks(min(ys), max(ys))
    x_low, x_high = points[0][0], points[-1][0]
    x_span, y_span = (x_high - x_low) or 1.0, y_ticks[-1] - y_ticks[0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if x_high == x_low else (x - x_low) / x_span
        up = (y - y_ticks[0]) / y_span
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = []
    for tick, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        y = place(x_low, tick)[1]
        parts += [_line(left, y, width - right, y, "grid"), _text(left - 7, y + 4, text, "end")]
    for tick in _whole_ticks(x_low, x_high):
        x = place(tick, y_ticks[0])[0]
        parts += [_line(x, height - bottom, x, height - bottom + 4, "axis")]
        parts += [_text(x, height - bottom + 16, str(tick), "middle")]
    parts.append(_line(left, height - bottom, width - right, height - bottom, "axis"))
    parts.append(_text((left + width - right) / 2, height - 4, x_label, "middle"))
    placed = [place(x, y) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts.append(f'<g class="{style}"><polyline points="{path}" class="curve"/>')
    if len(points) <= 40:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" class="mark"/>' for x, y in placed]
    parts.append("</g>")
    return _svg(width, height, title, parts)


def bar_chart(bars: Sequence[Bar], *, title: str, width: float = 640.0, pitch: float = 32.0) -> str:
    """Draw horizontal bars from zero, each with its label before it and its text behind it.

    Args:
        bars: At least one; values are not negative.
        title: Read out in place of the picture.
        width: Of the picture; the narrower, the larger its text where the page is narrow.
        pitch: From one bar to the next.
    """
    left = 20 + _CHAR * max(len(_shorten(bar.label, 38)) for bar in bars)
    right = 16 + _CHAR * max(len(bar.text) for bar in bars)
    thick = pitch * 0.5625
    ticks = nice_ticks(0.0, max(max(bar.value, bar.behind or 0.0) for bar in bars) or 1.0)
    scale = (width - left - right) / ticks[-1]
    bottom = pitch * len(bars) + 6
    parts = []
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        x = left + tick * scale
        parts += [_line(x, 0, x, bottom, "grid"), _text(x, bottom + 15, text, "middle")]
    for row, bar in enumerate(bars):
        y = 6 + row * pitch
        end = max(bar.value, bar.behind or 0.0) * scale
        parts.append(_text(left - 9, y + thick / 2 + 4, _shorten(bar.label, 38), "end", "label"))
        parts.append(f'<g class="{bar.style}">')
        if bar.behind is not None:
            parts.append(_rectangle(left, y, bar.behind * scale, thick, "pale"))
        parts.append(_rectangle(left, y, bar.value * scale, thick, "solid") + "</g>")
        parts.append(_text(left + end + 8, y + thick / 2 + 4, bar.text, "start", "value"))
    return _svg(width, bottom + 22, title, parts)


def _rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" class="{style}"/>'


def dot_plot(rows: Sequence[tuple[str, Sequence[Dot]]], *, title: str) -> str:
    """Draw one row of dots a label, joined by a thin line from the least to the greatest.

    Args:
        rows: Label and dots; at least one row, each with at least one dot. The first dots of a row are drawn
            largest, so that dots of equal values show as rings.
        title: Read out in place of the picture.
    """
    left = 16 + _CHAR * max(len(_shorten(label, 28)) for label, _ in rows)
    width, pitch, right, top = 640.0, 22.0, 24.0, 22.0
    values = [dot.value for _, dots in rows for dot in dots]
    ticks = nice_ticks(min(values), max(values), 6)
    scale = (width - left - right) / (ticks[-1] - ticks[0])
    bottom = top + pitch * len(rows)
    parts = []
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        x = left + (tick - ticks[0]) * scale
        parts += [_line(x, top - 6, x, bottom, "grid" if tick else "axis"), _text(x, 11, text, "middle")]
    for row, (label, dots) in enumerate(rows):
        y = top + (row + 0.5) * pitch
        xs = [left + (dot.value - ticks[0]) * scale for dot in dots]
        parts.append(_text(left - 9, y + 4, _shorten(label, 28), "end", "label"))
        parts.append(_line(min(xs), y, max(xs), y, "axis"))
        for rank, (dot, x) in enumerate(zip(dots, xs, strict=True)):
            radius = max(3.0, 6.5 - 1.4 * rank)
            about = f"<title>{escape(f'{label}, {dot.label}: {dot.value:.2f}')}</title>"
            mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="dot">{about}</circle>'
            parts.append(f'<g class="{dot.style}">{mark}</g>')
    return _svg(width, bottom + 6, title, parts)
