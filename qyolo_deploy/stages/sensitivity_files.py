"""What `qyolo sensitivity` leaves: the ranking as JSON, CSV and bars."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.release.charts import Bar, bar_chart
from qyolo_deploy.stages.sensitivity import Cost, Sensitivity

_STYLE = (
    "<style>text{font-family:sans-serif;fill:#222}.grid{stroke:#ddd}.axis{stroke:#888}"
    ".weights{fill:#2563eb}.activations{fill:#d97706}</style>"
)
_BARS = 40
_UNITS = {
    "map": "points of mAP50-95 lost",
    "loss": "detection loss gained",
    "sqnr": "noise in the head maps, per mille",
}


def write_sensitivity(found: Sensitivity, folder: Path) -> list[Path]:
    """Writes `sensitivity.json`, `.csv` and `.svg`; returns their paths.

    Raises:
        InputError: If the folder cannot be written.
    """
    files = [folder / f"sensitivity.{suffix}" for suffix in ("json", "csv", "svg")]
    write_atomic(files[0], json.dumps(found.to_json(), indent=1))
    write_atomic(files[1], _csv(found.costs))
    write_atomic(files[2], _svg(found))
    return files


def _csv(costs: Sequence[Cost]) -> str:
    text = io.StringIO()
    rows = [{**cost.to_json(), "layers": " ".join(cost.part.layers)} for cost in costs]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _svg(found: Sensitivity) -> str:
    """Bars of the most costly parts: of mAP, of the loss, or of noise power as a share of the signal's."""
    shown = found.costs[:_BARS]
    bars = [
        Bar(f"{cost.part.name} {cost.part.kind}", cost.part.kind, max(_height(cost, found), 0.0), _text(cost, found))
        for cost in shown
    ]
    title = f"What quantizing each tensor alone costs: {_UNITS[found.metric]}, {found.images} images"
    svg = bar_chart(bars, title=title, pitch=22.0).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = svg.index(">") + 1
    return svg[:start] + _STYLE + svg[start:]


def _height(cost: Cost, found: Sensitivity) -> float:
    if cost.lost is None:
        return float(1000 * 10 ** (-cost.sqnr_db / 10))
    return cost.lost * 100 if found.metric == "map" else cost.lost


def _text(cost: Cost, found: Sensitivity) -> str:
    value = f"{_height(cost, found):.3g}" if cost.lost is not None else f"{cost.sqnr_db:.1f} dB"
    return f"{cost.part.bits} bits, {value}"
