"""What the report tells of stages that learn: the course of their losses and accuracies."""

from collections.abc import Mapping, Sequence
from typing import Any

from qyolo_deploy.release.charts import Chart, Trace, trace_chart
from qyolo_deploy.release.report_text import list_facts, to_number

_FEW = 40  # points that are marked


def progress(section: Mapping[str, Any], list_key: str, x_key: str) -> dict[str, Any] | None:
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


def _curve(
    entries: Sequence[Mapping[str, Any]], x_key: str, y_key: str, title: str, style: str, factor: float = 1.0
) -> Chart | None:
    """Draw one quantity over epochs or steps, or return None where fewer than two were recorded."""
    pairs = [(to_number(entry.get(x_key)), to_number(entry.get(y_key))) for entry in entries]
    known = sorted((x, y * factor) for x, y in pairs if x is not None and y is not None)
    if len(known) < 2:
        return None
    trace = Trace(style, known, "marks" if len(known) <= _FEW else "line", title)
    return title, trace_chart([trace], title=f"{title} by {x_key}", x_label=x_key)
