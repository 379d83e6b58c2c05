"""What `qyolo sensitivity` leaves: the ranking as JSON, CSV and bars."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.release.report_sensitivity import bars
from qyolo_deploy.stages.sensitivity import Cost, Sensitivity

# What the page gives its charts.
_STYLE = (
    "<style>svg{--ink:#17202b;--soft:#566372;--grid:#e8ecf0;--card:#fff}text{font-family:sans-serif}"
    ".c-weights{--c:#2563eb}.c-activations{--c:#b8690a}</style>"
)
_BARS = 40


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
    _, chart = bars(found.to_json(), _BARS)
    svg = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = svg.index(">") + 1
    return svg[:start] + _STYLE + svg[start:]
