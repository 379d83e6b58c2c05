"""The report of a build as one HTML file that needs nothing else: no scripts, no requests, no fonts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import RuntimeMissingError
from qyolo_deploy.release.plots import Bar, Dot, bar_chart, dot_plot, line_chart
from qyolo_deploy.release.report_oscillation import oscillations
from qyolo_deploy.release.report_text import (
    ACCURACIES,
    METRIC_TITLES,
    NOTHING,
    fixed,
    gate_number,
    list_facts,
    megabytes,
    milliseconds,
    points,
    scalar,
    to_number,
    view_style,
    view_title,
)

_OPERATORS = {">=": "≥", "<=": "≤"}
_MOST_CLASSES = 24

Table = tuple[list[str], list[list[str]]]


def _latency(view: Mapping[str, Any], quantile: str) -> float | None:
    return to_number((view.get("latency_ms") or {}).get(quantile))


def _delta(view: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    ours, theirs = to_number(view.get("map50_95")), to_number((base or {}).get("map50_95"))
    return None if ours is None or theirs is None or view is base else ours - theirs


def _cards(views: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Sum each engine up: accuracy, size and speed beside the float model's."""
    cards = []
    for view in views:
        if view.get("name") in ("float", "fake_quantized"):
            continue
        size, speed = to_number(view.get("size_bytes")), _latency(view, "p50")
        base_size, base_speed = to_number((base or {}).get("size_bytes")), _latency(base or {}, "p50")
        delta = _delta(view, base)
        cards.append(
            {
                "title": view_title(view.get("name")),
                "style": view_style(view.get("name")),
                "map": points(view.get("map50_95")),
                "delta": None if delta is None else points(delta, signed=True),
                "size": None if size is None else megabytes(size, " MB"),
                "share": f"{size / base_size:.0%}" if size and base_size else None,
                "latency": None if speed is None else milliseconds(speed, " ms"),
                "faster": f"{base_speed / speed:.2f}×" if speed and base_speed else None,
            }
        )
    return cards


def _views_table(
    views: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None, not_run: Sequence[Mapping[str, Any]] = ()
) -> Table:
    others = [key for key in ACCURACIES[1:] if any(to_number(view.get(key)) is not None for view in views)]
    head = ["View", "mAP50-95", "Δ float", *(METRIC_TITLES[key].removeprefix("mAP ") for key in others)]
    rows = [
        [
            view_title(view.get("name")),
            points(view.get("map50_95")),
            points(_delta(view, base), signed=True),
            *(points(view.get(key)) for key in others),
            megabytes(view.get("size_bytes")),
            milliseconds(_latency(view, "p50")),
            milliseconds(_latency(view, "p95")),
        ]
        for view in views
    ]
    head += ["Size, MB", "p50, ms", "p95, ms"]
    for view in not_run:
        rows.append([f"{view_title(view['name'])}: {view['status']}", *[NOTHING] * (len(head) - 1)])
    return head, rows


def _conditions_table(views: Sequence[Mapping[str, Any]]) -> Table:
    keys = ["images", "imgsz", "letterbox", "precision_hint"]
    head = ["View", "Images", "Input size", "Letterbox", "Precision hint", "Thresholds"]
    rows = [
        [
            view_title(view.get("name")),
            *(scalar(view.get(key)) for key in keys),
            scalar(view.get("thresholds")),
        ]
        for view in views
    ]
    return head, rows


def _map_chart(views: Sequence[Mapping[str, Any]]) -> str | None:
    bars = []
    for view in views:
        value, behind = (to_number(view.get(key)) for key in ("map50_95", "map50"))
        if value is None or value < 0:
            continue
        name = view.get("name")
        text = " / ".join(points(part) for part in (value, behind) if part is not None)
        pale = None if behind is None else behind * 100
        bars.append(Bar(view_title(name), view_style(name), value * 100, text, pale))
    return bar_chart(bars, title="mAP50-95 and mAP50 of each view, in points") if bars else None


def _gate_row(gate: Mapping[str, Any]) -> dict[str, Any]:
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


def _class_precision(view: Mapping[str, Any], name: str) -> float | None:
    """Return a class's average precision in points, or None where the images show none of it."""
    value = to_number((view.get("per_class") or {}).get(name))
    return None if value is None or value < 0 else value * 100


def _per_class(views: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Compare average precisions by class: a table of all, and a plot of those that changed most.

    The plot shows differences to the float model where there is one: classes lie tens of points apart, the
    views of one class rarely more than one or two.
    """
    shown = [view for view in views if view.get("per_class")]
    names = list(dict.fromkeys(name for view in shown for name in view["per_class"]))
    rows = [(name, [_class_precision(view, name) for view in shown]) for name in names]
    rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
    if not rows:
        return None
    is_change = base is not None and base in shown and len(shown) > 1
    origins = [_class_precision(base, name) if base and is_change else 0.0 for name, _ in rows]
    plotted = []
    for (name, values), origin in zip(rows, origins, strict=True):
        dots = [
            Dot(view_title(view.get("name")), view_style(view.get("name")), value - origin)
            for view, value in zip(shown, values, strict=True)
            if value is not None and origin is not None and not (is_change and view is base)
        ]
        if dots:
            plotted.append((f"{name} ({origin:.1f})" if is_change else name, dots))
    plotted.sort(key=lambda row: max(abs(dot.value) for dot in row[1]), reverse=True)
    del plotted[_MOST_CLASSES:]
    plotted.sort(key=lambda row: sum(dot.value for dot in row[1]) / len(row[1]), reverse=not is_change)
    title = "Change of AP50-95 from float (its own in brackets), points" if is_change else "AP50-95, points"
    table = [[name, *(fixed(value, 1) for value in values)] for name, values in rows]
    return {
        "title": title,
        "plot": dot_plot(plotted, title=title) if plotted else "",
        "plotted": len(plotted),
        "total": len(rows),
        "legend": [
            (view_title(view.get("name")), view_style(view.get("name")))
            for view in shown
            if not (is_change and view is base)
        ],
        "table": (["Class", *(view_title(view.get("name")) for view in shown)], table),
    }


def _curve(
    entries: Sequence[Mapping[str, Any]], x_key: str, y_key: str, title: str, style: str, factor: float = 1.0
) -> tuple[str, str] | None:
    """Draw one quantity over epochs or steps, or return None where none was recorded."""
    pairs = [(to_number(entry.get(x_key)), to_number(entry.get(y_key))) for entry in entries]
    known = sorted((x, y * factor) for x, y in pairs if x is not None and y is not None)
    if not known:
        return None
    return title, line_chart(known, title=f"{title} by {x_key}", x_label=x_key, style=style)


def _progress(section: Mapping[str, Any], list_key: str, x_key: str) -> dict[str, Any] | None:
    """Show the course of a stage that learns: its curves and whatever else it reports."""
    entries = section.get(list_key) or []
    curves = [
        _curve(entries, x_key, "loss", "Loss", "c-loss"),
        _curve(entries, x_key, "map50_95", "mAP50-95, points", "c-map", 100.0),
        _curve(entries, x_key, "lr", "Learning rate", "c-rate"),
    ]
    facts = list_facts(section, leave_out=[list_key, "diagnostics"])
    if seconds := [s for entry in entries if (s := to_number(entry.get("seconds"))) is not None]:
        facts.append((f"seconds in {len(seconds)} {list_key}", f"{sum(seconds):.0f}"))
    drawn = [curve for curve in curves if curve]
    return {"curves": drawn, "facts": facts} if drawn or facts else None


def _quantization(section: Mapping[str, Any]) -> dict[str, Any] | None:
    if not section:
        return None
    layers = section.get("layers") or []
    columns = list(dict.fromkeys(key for layer in layers for key in layer))
    return {
        "facts": list_facts(section, leave_out=["layers", "notes"]),
        "notes": section.get("notes") or [],
        "table": (
            [str(column).replace("_", " ").capitalize() for column in columns],
            [[scalar(layer.get(column)) for column in columns] for layer in layers],
        ),
    }


def _recipe(recipe: object) -> dict[str, Any] | None:
    values = recipe if isinstance(recipe, Mapping) else {"yaml": recipe}
    texts = {key: value for key, value in values.items() if isinstance(value, str) and "\n" in value}
    facts = list_facts(values, leave_out=texts)
    return {"texts": list(texts.values()), "facts": facts} if texts or facts else None


def _verdict(gates: Sequence[Mapping[str, Any]]) -> tuple[str, bool] | None:
    if not gates:
        return None
    failed = sum(not gate.get("passed") for gate in gates)
    if failed:
        return f"{failed} of {len(gates)} gates failed", False
    return ("The gate passed" if len(gates) == 1 else f"All {len(gates)} gates passed"), True


def _content(report: Mapping[str, Any]) -> dict[str, Any]:
    views, not_run = report.get("views") or [], report.get("not_run") or []
    base = next((view for view in views if view.get("name") == "float"), None)
    gates = report.get("gates") or []
    digests = {view_title(view.get("name")): view["digests"] for view in views if view.get("digests")}
    return {
        "name": report.get("name", "report"),
        "version": report.get("version"),
        "scheme": (report.get("quantization") or {}).get("scheme"),
        "verdict": _verdict(gates),
        "cards": _cards(views, base),
        "views": _views_table(views, base, not_run) if views else None,
        "styles": [view_style(view.get("name")) for view in (*views, *not_run)],
        "map_chart": _map_chart(views),
        "conditions": _conditions_table(views) if views else None,
        "gates": [_gate_row(gate) for gate in gates],
        "per_class": _per_class(views, base),
        "training": _progress(report.get("training") or {}, "epochs", "epoch"),
        "oscillations": oscillations(report.get("training") or {}),
        "correction": _progress(report.get("correction") or {}, "steps", "step"),
        "quantization": _quantization(report.get("quantization") or {}),
        "samples": report.get("samples") or [],
        "recipe": _recipe(report.get("recipe") or {}),
        "environment": list_facts(report.get("environment") or {}),
        "lineage": report.get("lineage") or [],
        "digests": digests,
    }


def write_report(path_html: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write the report as one self-contained HTML file. Sections without data are left out.

    Args:
        path_html: The file to write.
        report: The content of `report.json`: `name`, `version`, `recipe` (facts and the YAML text), `views`
            (as `EvalReport.to_json` gives them), `not_run` (engines without numbers: `name`, `status`, `reason`),
            `gates` (each with the keys of its `Gate` and of its `GateResult`), `training` (`epochs`, `diagnostics`
            as stage `train` writes them), `correction` (`steps`), `quantization` (`scheme`, `targets`, `layers`,
            `notes`), `environment`, `lineage`, `samples` (`title`, `jpeg_base64`). Accuracies are fractions here
            and points in the page.

    Raises:
        RuntimeMissingError: jinja2 is not installed.
        InputError: The file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        hint = 'pip install "qyolo_deploy[build]"'
        raise RuntimeMissingError("An HTML report needs jinja2, which is not installed.", hint) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(_content(report))
    write_atomic(path_html, page)
