"""What the report tells first: the verdict, the gates, and what each view costs and keeps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qyolo_deploy.recipe import TORCH_VIEWS
from qyolo_deploy.release.charts import Bar, Chart, bar_chart
from qyolo_deploy.release.report_text import (
    ACCURACIES,
    METRIC_TITLES,
    NOTHING,
    fixed,
    gate_number,
    megabytes,
    milliseconds,
    points,
    scalar,
    to_number,
    view_style,
    view_title,
)
from qyolo_deploy.release.spot_chart import Spot, spot_chart

_OPERATORS = {">=": "≥", "<=": "≤"}
_QUANTILES = ("p50", "p95", "p99")

View = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def float_view(views: Sequence[View]) -> View | None:
    """Return the view that all others are compared with."""
    return next((view for view in views if view.get("name") == "float"), None)


def is_engine(view: View) -> bool:
    """Return whether a view is one of the engines that ship."""
    return view.get("name") not in ("float", *TORCH_VIEWS)


def verdict(gates: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Sum the gates up, or return None where the recipe has none."""
    if not gates:
        return None
    failed = [gate_row(gate) for gate in gates if not gate.get("passed")]
    text = "The gate passed" if len(gates) == 1 else f"All {len(gates)} gates passed"
    if failed:
        text = f"{len(failed)} of {len(gates)} gates failed"
    return {"text": text, "passed": not failed, "reasons": [_shortfall(row) for row in failed]}


def _shortfall(row: Mapping[str, Any]) -> str:
    """Say which condition did not hold, and what was measured instead."""
    value = row["numbers"][-1]
    return f"{row['condition']}: {row['reason'] if value == NOTHING else f'it is {value}'}"


def gate_row(gate: Mapping[str, Any]) -> dict[str, Any]:
    """State a gate's condition and its numbers."""
    metric = str(gate.get("metric"))
    subject = view_title(gate.get("view"))
    if gate.get("relative_to"):
        sign = "÷" if gate.get("mode") == "ratio" else "−"
        subject = f"{subject} {sign} {view_title(gate['relative_to'])}"
    name = METRIC_TITLES.get(metric, metric.replace("per_class.", "AP of "))
    operator = _OPERATORS.get(str(gate.get("op")), gate.get("op"))
    return {
        "passed": bool(gate.get("passed")),
        "condition": f"{name} of {subject} {operator} {gate_number(gate, 'bound')}",
        "numbers": [gate_number(gate, key) for key in ("observed", "reference", "value")],
        "reason": gate.get("reason") if not gate.get("passed") else None,
    }


def _latency(view: View, quantile: str) -> float | None:
    return to_number((view.get("latency_ms") or {}).get(quantile))


def _delta(view: View, base: View | None) -> float | None:
    ours, theirs = to_number(view.get("map50_95")), to_number((base or {}).get("map50_95"))
    return None if ours is None or theirs is None or view is base else ours - theirs


def _interval(view: View) -> str:
    """Write the interval of the difference to float, in points."""
    interval = view.get("interval") or {}
    ends = [to_number(interval.get(end)) for end in ("low", "high")]
    return NOTHING if None in ends else f"{points(ends[0], signed=True)} to {points(ends[1], signed=True)}"


def cards(views: Sequence[View]) -> list[dict[str, Any]]:
    """Sum each engine up: accuracy, size and speed beside the float model's."""
    base = float_view(views) or {}
    base_size, base_speed = to_number(base.get("size_bytes")), _latency(base, "p50")
    found = []
    for view in filter(is_engine, views):
        size, speed = to_number(view.get("size_bytes")), _latency(view, "p50")
        delta = _delta(view, base)
        found.append(
            {
                "title": view_title(view.get("name")),
                "style": view_style(view.get("name")),
                "state": view.get("state"),
                "map": points(view.get("map50_95")),
                "delta": None if delta is None else points(delta, signed=True),
                "interval": _interval(view) if view.get("interval") else None,
                "size": None if size is None else megabytes(size, " MB"),
                "share": f"{size / base_size:.0%}" if size and base_size else None,
                "latency": None if speed is None else milliseconds(speed, " ms"),
                "faster": f"{base_speed / speed:.2f}×" if speed and base_speed else None,
            }
        )
    return found


def views_table(views: Sequence[View]) -> Table:
    """List all accuracies, sizes and times of all views."""
    base = float_view(views)
    others = [key for key in ACCURACIES[1:] if any(to_number(view.get(key)) is not None for view in views)]
    quantiles = [key for key in _QUANTILES if any(_latency(view, key) is not None for view in views)]
    confidence = next((to_number(view["interval"].get("confidence")) for view in views if view.get("interval")), None)
    head = ["View", "mAP50-95", "Δ float", *([f"{confidence:.0%} interval of Δ"] if confidence else [])]
    head += [METRIC_TITLES[key].removeprefix("mAP ") for key in others]
    rows = []
    for view in views:
        state = f" ({view['state']})" if view.get("state") else ""
        row = [view_title(view.get("name")) + state, points(view.get("map50_95"))]
        row += [points(_delta(view, base), signed=True), *([_interval(view)] if confidence else [])]
        row += [points(view.get(key)) for key in others]
        row += [megabytes(view.get("size_bytes")), *(milliseconds(_latency(view, key)) for key in quantiles)]
        rows.append(row)
    return [*head, "Size, MB", *(f"{key}, ms" for key in quantiles)], rows


def conditions_table(views: Sequence[View]) -> Table:
    """List how each view was measured."""
    keys = ["images", "imgsz", "letterbox", "precision_hint", "thresholds"]
    head = ["View", "Images", "Input size", "Letterbox", "Precision hint", "Thresholds"]
    return head, [[view_title(view.get("name")), *(scalar(view.get(key)) for key in keys)] for view in views]


def trade_charts(views: Sequence[View]) -> list[Chart]:
    """Draw accuracy against latency and against size; of the views themselves where they have neither."""
    axes: list[tuple[str, str, Callable[[View], float | None], float]] = [
        ("mAP50-95 against latency", "latency p50, ms", lambda view: _latency(view, "p50"), 1.0),
        ("mAP50-95 against size", "size, MB", lambda view: to_number(view.get("size_bytes")), 1e-6),
    ]
    charts = []
    for caption, x_label, read, factor in axes:
        spots = [
            Spot(view_title(view.get("name")), view_style(view.get("name")), x * factor, accuracy * 100)
            for view in views
            if (x := read(view)) is not None and (accuracy := to_number(view.get("map50_95"))) is not None
        ]
        if len(spots) > 1:
            charts.append((caption, spot_chart(spots, title=caption, x_label=x_label, y_label="mAP50-95")))
    return charts or _accuracy_chart(views)


def _accuracy_chart(views: Sequence[View]) -> list[Chart]:
    known = [(view, value * 100) for view in views if (value := to_number(view.get("map50_95"))) is not None]
    if not known:
        return []
    bars = [Bar(view_title(v.get("name")), view_style(v.get("name")), value, fixed(value, 2)) for v, value in known]
    caption = "mAP50-95, points"
    return [(caption, bar_chart(bars, title=caption, pitch=30.0))]
