"""What the report tells of the classes: average precisions, and precision over recall."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from qyolo_deploy.recipe import TORCH_VIEWS
from qyolo_deploy.release.charts import Dot, Trace, dot_plot, trace_chart
from qyolo_deploy.release.report_text import fixed, points, to_number, view_style, view_title
from qyolo_deploy.release.report_views import View, float_view

_MOST_CLASSES = 24
_MOST_CURVES = 12
_SMALL = (190.0, 150.0)
_ALL = "All classes"


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
    """Draw precision over recall: of all classes and of each in one chart to choose from, and side by side.

    Args:
        curves: The section of `report.json`: `iou`, `recall`, and `views` with `mean` and `per_class`.
        views: The measured views, by which classes are ranked.
    """
    shown = {name: found for name, found in (curves.get("views") or {}).items() if name not in TORCH_VIEWS}
    if not shown or not curves.get("recall"):
        return None
    losses = {name: lost for name, lost in _losses(views) if all(name in f["per_class"] for f in shown.values())}
    drawn = {name: {view: found["per_class"][name] for view, found in shown.items()} for name in losses}
    every = {_ALL: {view: found["mean"] for view, found in shown.items()}, **drawn}
    return {
        "chart": _chart_of_all(curves, every),
        "choices": [_choice(name, losses.get(name), shown, views) for name in every],
        "iou": f"{curves.get('iou', 0.5):g}",
        "side_by_side": [(name, _small_chart(curves, drawn[name], name)) for name in [*drawn][:_MOST_CURVES]],
        "total": len(drawn),
        "legend": [(view_title(view), view_style(view)) for view in shown],
    }


def _losses(views: Sequence[View]) -> list[tuple[str, float]]:
    """Classes and what the worst view loses of their average precision, in points; the greatest loss first."""
    base = float_view(views)
    losses = []
    for name in (base or {}).get("per_class") or {}:
        values = [_class_precision(view, name) for view in views]
        known = [value for value in values if value is not None]
        losses.append((name, (_class_precision(base or {}, name) or 0.0) - min(known, default=0.0)))
    return sorted(losses, key=lambda entry: -entry[1])


def _choice(name: str, lost: float | None, shown: Container[object], views: Sequence[View]) -> dict[str, Any]:
    """Tell of one choice its name, its loss and the average precision of each view."""
    told = []
    for view in filter(lambda view: view.get("name") in shown, views):
        value = points(view.get("map50_95"), decimals=1) if name == _ALL else fixed(_class_precision(view, name), 1)
        told.append(f"{view_title(view.get('name'))} {value}")
    return {
        "name": name,
        "change": None if lost is None else fixed(-lost, 1, signed=True),
        "told": f"{'mAP' if name == _ALL else 'AP'}50-95: {', '.join(told)}",
    }


def _chart_of_all(curves: Mapping[str, Any], every: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Draw the curves of all choices over each other; the style sheet shows those of the chosen one."""
    traces = [
        _trace(curves, view, values, f" pr pr{index}", f"{name}, {view_title(view)}")
        for index, (name, precision) in enumerate(every.items())
        for view, values in precision.items()
    ]
    labels = {"x_label": "recall", "y_label": "precision"}
    return trace_chart(traces, title="Precision over recall", limits=(0.0, 1.0), size=(380.0, 280.0), **labels)


def _small_chart(curves: Mapping[str, Any], precision: Mapping[str, Sequence[float]], name: str) -> str:
    traces = [_trace(curves, view, values, "", view_title(view)) for view, values in precision.items()]
    return trace_chart(traces, title=f"Precision over recall: {name}", limits=(0.0, 1.0), size=_SMALL, x_label="")


def _trace(curves: Mapping[str, Any], view: str, values: Sequence[float], choice: str, label: str) -> Trace:
    return Trace(view_style(view) + choice, list(zip(curves["recall"], values, strict=True)), label=label)
