"""What the report tells of the cost of quantizing each tensor alone: bars of the greatest, and a table of all."""

from collections.abc import Mapping, Sequence
from typing import Any

from qyolo_deploy.release.charts import Bar, Chart, bar_chart
from qyolo_deploy.release.report_text import NOTHING, fixed, scalar, to_number
from qyolo_deploy.release.report_views import Table

_MOST_BARS = 20
_LOSSES = {"map": "mAP50-95 lost, points", "loss": "detection loss gained"}
_NOISE = "noise in the head maps, ‰ of their power"
_KINDS = ("weights", "activations")

Part = Mapping[str, Any]


def sensitivity(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compose bars and table, or return None where nothing was measured.

    Args:
        section: Of `report.json`, as `Sensitivity.to_json` gives it.
    """
    parts = section.get("parts") or []
    if not parts:
        return None
    metric, images = str(section.get("metric")), scalar(section.get("images"))
    told = f"All else in float, on the grids that training starts from; {images} validation images"
    if (baseline := to_number(section.get("baseline"))) is not None:
        is_map = metric == "map"
        what = f"mAP50-95 {fixed(baseline * 100, 2)}" if is_map else f"a detection loss of {baseline:.4g}"
        told += f", on which the float model has {what}"
    return {
        "sentence": f"{told}.",
        "chart": bars(section, _MOST_BARS),
        "legend": [(kind, f"c-{kind}") for kind in _KINDS if any(part.get("kind") == kind for part in parts)],
        "table": _table(parts, metric),
    }


def bars(section: Mapping[str, Any], most: int) -> Chart:
    """Draw the greatest costs: of mAP, of the loss, or of noise power as a share of the signal's.

    Args:
        section: See `sensitivity`; it has parts, the most costly first.
        most: How many are drawn.
    """
    parts, metric = section["parts"], str(section.get("metric"))
    shown = [
        Bar(str(part["name"]), f"c-{part['kind']}", max(_height(part, metric), 0.0), _text(part, metric))
        for part in parts[:most]
    ]
    which = f" (the {most} greatest of {len(parts)})" if len(parts) > most else ""
    caption = f"Cost of quantizing one tensor alone{which}: {_LOSSES.get(metric, _NOISE)}"
    return caption, bar_chart(shown, title=caption)


def layer_columns(section: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Columns for the table of layers: title, and by layer what quantizing its weights or its input alone costs."""
    parts, metric = section.get("parts") or [], str(section.get("metric"))
    unit = _LOSSES.get(metric, "SQNR, dB")
    columns = []
    for kind, title in zip(_KINDS, ("Weights", "Input"), strict=True):
        told = {layer: _cost(part, metric) for part in parts if part["kind"] == kind for layer in part["layers"]}
        if told:
            columns.append((f"{title} alone: {unit}", told))
    return columns


def _table(parts: Sequence[Part], metric: str) -> Table:
    scored = metric in _LOSSES
    head = ["Tensor", "Kind", "Bits", "SQNR, dB", *([_LOSSES[metric]] if scored else [])]
    rows = [
        [
            str(part["name"]),
            str(part["kind"]),
            scalar(part["bits"]),
            fixed(to_number(part.get("sqnr_db")), 1),
            *([_cost(part, metric)] if scored else []),
        ]
        for part in parts
    ]
    return head, rows


def _height(part: Part, metric: str) -> float:
    lost = to_number(part.get("lost"))
    if lost is None:
        return float(1000 * 10 ** (-(to_number(part.get("sqnr_db")) or 0.0) / 10))
    return lost * 100 if metric == "map" else lost


def _text(part: Part, metric: str) -> str:
    unit = "" if metric in _LOSSES else " dB"
    return f"{'W' if part['kind'] == 'weights' else 'A'}{part['bits']}, {_cost(part, metric)}{unit}"


def _cost(part: Part, metric: str) -> str:
    if metric not in _LOSSES:
        return fixed(to_number(part.get("sqnr_db")), 1)
    return NOTHING if to_number(part.get("lost")) is None else f"{_height(part, metric):.3g}".replace("-", "−")
