"""Names and numbers of a report as a reader wants them: in points, megabytes, milliseconds."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

_VIEW_TITLES = {
    "float": "Float",
    "fake_quantized": "Fake-quantized",
    "soft_rounded": "Softly rounded weights (no engine)",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt_graph_on_onnxruntime": "TensorRT's graph, on ONNX Runtime",
}
METRIC_TITLES = {
    "map50_95": "mAP50-95",
    "map50": "mAP50",
    "map75": "mAP75",
    "map_small": "mAP small",
    "map_medium": "mAP medium",
    "map_large": "mAP large",
    "size_bytes": "size",
    "latency_ms.p50": "latency p50",
    "latency_ms.p95": "latency p95",
}
ACCURACIES = ("map50_95", "map50", "map75", "map_small", "map_medium", "map_large")
NOTHING = "–"


def view_title(view: object) -> str:
    """Return the name of a view that readers know, or the view's own."""
    return _VIEW_TITLES.get(str(view), str(view))


def view_style(view: object) -> str:
    """Return the class of the style sheet that gives a view its colour, the same in every table and plot."""
    return f"v-{view}" if view in _VIEW_TITLES else "v-other"


def to_number(value: object) -> float | None:
    """Return a finite number, or None for anything else, such as what was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def fixed(value: float | None, decimals: int, unit: str = "", signed: bool = False) -> str:
    """Write a number with fixed decimals and a true minus sign, or a dash for None."""
    if value is None:
        return NOTHING
    rounded = round(value, decimals) + 0.0  # what rounds to -0.0 becomes 0.0
    return f"{rounded:{'+' if signed else ''}.{decimals}f}".replace("-", "−") + unit


def points(value: object, signed: bool = False, decimals: int = 2) -> str:
    """Write an accuracy, a fraction in the report, in points; COCO's -1 for "no such objects" is a dash."""
    fraction = to_number(value)
    if fraction is None or (fraction < 0 and not signed):
        return NOTHING
    return fixed(fraction * 100, decimals, signed=signed)


def megabytes(value: object, unit: str = "", signed: bool = False) -> str:
    """Write a size given in bytes in units of 10^6."""
    size_bytes = to_number(value)
    return fixed(None if size_bytes is None else size_bytes / 1e6, 2, unit, signed)


def milliseconds(value: object, unit: str = "", signed: bool = False) -> str:
    """Write a time given in milliseconds."""
    return fixed(to_number(value), 2, unit, signed)


def scalar(value: object) -> str:
    """Write any JSON value in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(scalar(part) for part in value) or NOTHING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {scalar(part)}" for key, part in value.items()) or NOTHING
    return NOTHING if value is None else str(value)


def list_facts(values: Mapping[str, Any], leave_out: Iterable[str] = ()) -> list[tuple[str, str]]:
    """List the plain values of a mapping as label and text."""
    skipped = set(leave_out)
    return [
        (str(key).replace("_", " "), scalar(value))
        for key, value in values.items()
        if key not in skipped and value is not None
    ]


def gate_number(gate: Mapping[str, Any], key: str) -> str:
    """Write one number of a gate in the unit of its metric."""
    metric, value = str(gate.get("metric")), to_number(gate.get(key))
    is_relation = bool(gate.get("relative_to")) and key in ("value", "bound")
    if is_relation and gate.get("mode") == "ratio":
        return fixed(value, 3, "×")
    if value is None:
        return NOTHING
    if metric in ACCURACIES or metric.startswith("per_class."):
        return fixed(value * 100, 2, signed=is_relation)
    if metric.startswith("latency_ms"):
        return milliseconds(value, " ms", is_relation)
    if metric == "size_bytes":
        return megabytes(value, " MB", is_relation)
    return f"{value:.6g}"
