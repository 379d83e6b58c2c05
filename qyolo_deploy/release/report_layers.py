"""What the report tells of the layers: bits, scales, how far engines depart from the model, what each layer costs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qyolo_deploy.release.charts import Chart, Trace, trace_chart
from qyolo_deploy.release.report_sensitivity import layer_columns, sensitivity
from qyolo_deploy.release.report_text import NOTHING, fixed, list_facts, scalar, to_number, view_style, view_title
from qyolo_deploy.release.report_views import Table

_EQUAL_DB = 200.0  # stands for two tensors that do not differ at all

Layer = Mapping[str, Any]


def quantization(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Describe the quantized layers, with parity and sensitivity where the report has them."""
    section = report.get("quantization") or {}
    parity, costs = report.get("parity") or {}, report.get("sensitivity") or {}
    if not (section or parity or costs):
        return None
    layers = section.get("layers") or []
    facts = list_facts(section, leave_out=["layers", "notes"])
    return {
        "facts": facts + ([("bits of weights / inputs", _bits(layers))] if layers else []),
        "notes": section.get("notes") or [],
        "table": _layers_table(layers, parity, costs),
        "parity": [_parity(view, found) for view, found in parity.items()],
        "parity_charts": _parity_charts(parity),
        "sensitivity": sensitivity(costs),
    }


def _bits(layers: Sequence[Layer]) -> str:
    counts = Counter((layer.get("weight_bits"), layer.get("activation_bits")) for layer in layers)
    return ", ".join(f"{scalar(w)} / {scalar(a)} in {count} layers" for (w, a), count in counts.most_common())


def _significant(value: object) -> str:
    number = to_number(value)
    return NOTHING if number is None else f"{number:.4g}".replace("-", "−")


def _scale(value: object) -> str:
    """Write one scale, or the least, median and greatest of the channels'."""
    if not isinstance(value, Mapping):
        return _significant(value)
    ends = [_significant(value.get(key)) for key in ("min", "max")]
    median = _significant(value.get("median"))
    return median if ends[0] == ends[1] else f"{median} ({ends[0]} to {ends[1]})"


def _by_name(section: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {str(layer.get("name")): layer.get(key) for layer in section.get("layers") or []}


def _layers_table(layers: Sequence[Layer], parity: Mapping[str, Any], costs: Mapping[str, Any]) -> Table | None:
    if not layers:
        return None
    columns: list[tuple[str, Any]] = [
        ("Weight bits", lambda layer: scalar(layer.get("weight_bits"))),
        ("Input bits", lambda layer: scalar(layer.get("activation_bits"))),
    ]
    if any("weight_scale" in layer for layer in layers):
        columns += [
            ("Weights", lambda layer: scalar(layer.get("weights"))),
            ("Weight scale, of the channels", lambda layer: _scale(layer.get("weight_scale"))),
            ("Input scale", lambda layer: _significant(layer.get("input_scale"))),
            ("Zero point", lambda layer: scalar(layer.get("input_zero_point")).replace("-", "−")),
        ]
    for view, found in parity.items():
        noise = _by_name(found, "sqnr_db")
        columns.append((f"SQNR {view_title(view)}, dB", lambda layer, noise=noise: _db(noise.get(layer.get("name")))))
    for title, told in layer_columns(costs):
        columns.append((title, lambda layer, told=told: told.get(str(layer.get("name")), NOTHING)))
    rows = [[str(layer.get("name")), *(write(layer) for _, write in columns)] for layer in layers]
    return ["Layer", *(title for title, _ in columns)], rows


def _db(value: object) -> str:
    decibels = to_number(value)
    return "equal" if decibels is not None and decibels >= _EQUAL_DB else fixed(decibels, 1)


def _parity(view: str, found: Mapping[str, Any]) -> dict[str, Any]:
    first, images = found.get("first_departure"), scalar(found.get("images"))
    against = f" against {view_title(found['reference'])}" if found.get("reference") else ""
    told = f"{view_title(view)}{against}, {images} images: "
    told += f"the first layer that departs is {first}." if first else "no layer departs."
    head = ["Layer", "SQNR, dB", "Cosine", "Largest error", "Share that differs"]
    rows = [
        [
            str(layer.get("name")),
            _db(layer.get("sqnr_db")),
            fixed(to_number(layer.get("cosine")), 6),
            *(_significant(layer.get(key)) for key in ("max_error", "differing")),
        ]
        for layer in found.get("layers") or []
    ]
    return {"title": view_title(view), "sentence": told, "table": (head, rows)}


def _parity_charts(parity: Mapping[str, Any]) -> list[Chart]:
    """Draw the SQNR of each layer, those of the same name of several views above one another."""
    noise = {view: _by_name(found, "sqnr_db") for view, found in parity.items()}
    longest: list[str] = max((list(layers) for layers in noise.values()), key=len, default=[])
    order = {name: place for place, name in enumerate(longest, 1)}
    traces = []
    for view, layers in noise.items():
        known = [(order[name], to_number(value)) for name, value in layers.items() if name in order]
        points = [(float(place), db) for place, db in known if db is not None]
        if points:
            traces.append(Trace(view_style(view), sorted(points), label=view_title(view)))
    if not traces:
        return []
    is_equal = any(db >= _EQUAL_DB for trace in traces for _, db in trace.points)
    caption = f"SQNR of each layer, dB{f' ({_EQUAL_DB:.0f}: equal)' if is_equal else ''}, from the first to the last"
    return [(caption, trace_chart(traces, title=caption, x_label="layer"))]
