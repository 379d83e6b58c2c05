"""What the report tells of the classes: average precisions, and precision over recall."""

from collections.abc import Mapping, Sequence
from typing import Any

from qyolo_deploy.recipe import TORCH_VIEWS
from qyolo_deploy.release.charts import Dot, Trace, dot_plot, trace_chart
from qyolo_deploy.release.report_text import fixed, to_number, view_style, view_title
from qyolo_deploy.release.report_views import View, float_view

_MOST_CLASSES = 24
_MOST_CURVES = 12
_SMALL = (190.0, 150.0)


def _class_precision(view: View, name: str) -> float | None:
    """Return a class's average precision in points, or None where the images show none of it."""
    value = to_number((view.get("per_class") or {}).get(name))
    return None if value is None or value < 0 else value * 100


def per_class(views: Sequence[View]) -> dict[str, Any] | None:
    """Compare average precisions by class: a table of all, and a plot of those that changed most.

    The plot shows differences to the float model where there is one: classes lie tens of points apart, the
    views of one class rarely more than one or two.
    """
    shown, base = [view for view in views if view.get("per_class")], float_view(views)
    names = list(dict.fromkeys(name for view in shown for name in view["per_class"]))
    rows = [(name, [_class_precision(view, name) for view in shown]) for name in names]
    rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
    if not rows:
        return None
    is_change = base is not None and base in shown and len(shown) > 1
    compared = [view for view in shown if not (is_change and view is base)]
    title = "Change of AP50-95 from float (its own in brackets), points" if is_change else "AP50-95, points"
    plotted = _dots(rows, shown, base if is_change else None)
    return {
        "title": title,
        "plot": dot_plot(plotted, title=title) if plotted else "",
        "plotted": len(plotted),
        "total": len(rows),
        "legend": [(view_title(view.get("name")), view_style(view.get("name"))) for view in compared],
        "table": (
            ["Class", *(view_title(view.get("name")) for view in shown)],
            [[name, *(fixed(value, 1) for value in values)] for name, values in rows],
        ),
    }


def _dots(
    rows: Sequence[tuple[str, Sequence[float | None]]], views: Sequence[View], base: View | None
) -> list[tuple[str, list[Dot]]]:
    """Place the classes that differ most, as differences to `base` where there is one."""
    plotted = []
    for name, values in rows:
        origin = _class_precision(base, name) if base else 0.0
        dots = [
            Dot(view_title(view.get("name")), view_style(view.get("name")), value - origin)
            for view, value in zip(views, values, strict=True)
            if value is not None and origin is not None and view is not base
        ]
        if dots:
            plotted.append((f"{name} ({origin:.1f})" if base else name, dots))
    plotted.sort(key=lambda row: max(abs(dot.value) for dot in row[1]), reverse=True)
    del plotted[_MOST_CLASSES:]
    return sorted(plotted, key=lambda row: sum(dot.value for dot in row[1]) / len(row[1]), reverse=base is None)


def precision_recall(curves: Mapping[str, Any], views: Sequence[View]) -> dict[str, Any] | None:
    """Draw precision over recall, of all classes and of those whose average precision fell most.

    Args:
        curves: The section of `report.json`: `iou`, `recall`, and `views` with `mean` and `per_class`.
        views: The measured views, by which classes are ranked.
    """
    shown = {name: found for name, found in (curves.get("views") or {}).items() if name not in TORCH_VIEWS}
    if not shown or not curves.get("recall"):
        return None
    classes = [name for name in _by_loss(views) if all(name in found["per_class"] for found in shown.values())]
    small = [
        (name, _chart(curves, {view: f["per_class"][name] for view, f in shown.items()}, name)) for name in classes
    ]
    caption = f"All classes, IoU {curves.get('iou', 0.5):g}"
    return {
        "overall": (caption, _chart(curves, {view: found["mean"] for view, found in shown.items()}, caption, False)),
        "classes": small[:_MOST_CURVES],
        "total": len(next(iter(shown.values()))["per_class"]),
        "legend": [(view_title(view), view_style(view)) for view in shown],
    }


def _by_loss(views: Sequence[View]) -> list[str]:
    """Rank the classes by what the worst view loses of their average precision."""
    base = float_view(views)
    losses = {}
    for name in (base or {}).get("per_class") or {}:
        values = [_class_precision(view, name) for view in views]
        known = [value for value in values if value is not None]
        losses[name] = (_class_precision(base or {}, name) or 0.0) - min(known, default=0.0)
    return sorted(losses, key=lambda name: -losses[name])[:_MOST_CURVES]


def _chart(curves: Mapping[str, Any], precision: Mapping[str, Sequence[float]], title: str, small: bool = True) -> str:
    traces = [
        Trace(view_style(view), list(zip(curves["recall"], values, strict=True)), label=view_title(view))
        for view, values in precision.items()
    ]
    labels = {"x_label": "" if small else "recall", "y_label": "" if small else "precision"}
    size = _SMALL if small else (380.0, 280.0)
    return trace_chart(traces, title=f"Precision over recall: {title}", limits=(0.0, 1.0), size=size, **labels)
