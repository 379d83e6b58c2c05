"""Named marks in a plane, as accuracy against latency, with names that cover neither marks nor one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qyolo_deploy.release.charts import CHAR, WIDTH, left_margin, round_ticks, set_frame, shorten
from qyolo_deploy.release.svg import INK, OWN, draw, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT, _TOP, _RIGHT, _BOTTOM = 240.0, 10.0, 20.0, 38.0
_AWAY = 10.0  # px from a mark to its name
_LINE = 13.0  # px that a name needs


@dataclass(frozen=True)
class Spot:
    """One mark, with its name beside it."""

    label: str
    style: str
    x: float
    y: float


def spot_chart(spots: Sequence[Spot], *, title: str, x_label: str, y_label: str) -> str:
    """Draw named marks; the x axis begins at zero.

    Args:
        spots: At least one.
        title: Read out in place of the picture.
        x_label: Stands below the axis.
        y_label: Stands beside the axis.
    """
    x_ticks = round_ticks(0.0, max(spot.x for spot in spots) or 1.0)
    low, high = (end(spot.y for spot in spots) for end in (min, max))
    margin = (high - low) * 0.12 or 1.0
    y_ticks = round_ticks(max(0.0, low - margin), high + margin)
    left = left_margin(y_ticks, y_label)
    width, height = WIDTH - left - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    names = [shorten(spot.label, 20) for spot in spots]
    across = [spot.x / x_ticks[-1] * width for spot in spots]
    up = [(spot.y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * height for spot in spots]

    def paint(axes: "Axes") -> None:
        set_frame(axes, (0.0, x_ticks[-1]), x_ticks, y_ticks, x_label, y_label)
        for spot in spots:
            about = f"{spot.label}: {spot.y:.2f} at {spot.x:.2f}"
            axes.plot(spot.x, spot.y, "o", color=OWN, markersize=10, clip_on=False, gid=mark(spot.style, about))
        for spot, name, (dx, dy) in zip(spots, names, _places(names, across, up, width), strict=True):
            side = "right" if dx < 0 else "left"
            look: dict[str, Any] = {
                "textcoords": "offset points",
                "va": "center",
                "color": INK,
                "annotation_clip": False,
            }
            axes.annotate(name, (spot.x, spot.y), xytext=(dx, dy), ha=side, **look)

    return draw(WIDTH, _HEIGHT, (left, _TOP, _RIGHT, _BOTTOM), title, paint)


def _places(
    names: Sequence[str], across: Sequence[float], up: Sequence[float], width: float
) -> list[tuple[float, float]]:
    """Return for each name how far it lies from its mark: to the side, and as little above or below as is free."""
    taken = [(x - 6, x + 6, y) for x, y in zip(across, up, strict=True)]
    places = []
    for name, x, y in zip(names, across, up, strict=True):
        length = CHAR * len(name) + 8
        options = []
        for steps in range(-8, 9):
            for side in (1, -1):
                start = x + _AWAY if side > 0 else x - _AWAY - length
                span = (start, start + length, y + steps * _LINE / 2)
                outside = max(0.0, -span[0], span[1] - width - _RIGHT) + (1000 if span[2] < 0 else 0)
                covered = sum(
                    start < span[1] and span[0] < end and abs(height - span[2]) < _LINE for start, end, height in taken
                )
                options.append((covered, outside, abs(steps), side < 0, steps, span))
        *_, is_left, steps, span = min(options)
        taken.append(span)
        places.append((-_AWAY if is_left else _AWAY, steps * _LINE / 2))
    return places
