"""The report of a build as one HTML file that needs nothing else: no scripts, no requests, no fonts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import RuntimeMissingError
from qyolo_deploy.release.report_classes import per_class, precision_recall
from qyolo_deploy.release.report_images import images
from qyolo_deploy.release.report_layers import quantization
from qyolo_deploy.release.report_oscillation import oscillations
from qyolo_deploy.release.report_text import list_facts, view_style, view_title
from qyolo_deploy.release.report_training import progress
from qyolo_deploy.release.report_views import (
    cards,
    conditions_table,
    gate_row,
    trade_charts,
    verdict,
    views_table,
)


def _recipe(recipe: object) -> dict[str, Any] | None:
    values = recipe if isinstance(recipe, Mapping) else {"yaml": recipe}
    texts = {key: value for key, value in values.items() if isinstance(value, str) and "\n" in value}
    facts = list_facts(values, leave_out=texts)
    return {"texts": list(texts.values()), "facts": facts} if texts or facts else None


def _calibration(section: Mapping[str, Any]) -> dict[str, Any] | None:
    if not section:
        return None
    facts = list_facts(section, leave_out=["files", "webp_base64"])
    return {"facts": facts, "files": section.get("files") or [], "webp_base64": section.get("webp_base64")}


def _content(report: Mapping[str, Any]) -> dict[str, Any]:
    not_run = [{"name": view["name"], "state": view["status"]} for view in report.get("not_run") or []]
    views, gates = [*(report.get("views") or []), *not_run], report.get("gates") or []
    making = report.get("reproduce") or {}
    return {
        "name": report.get("name", "report"),
        "version": report.get("version"),
        "created_with": report.get("created_with"),
        "scheme": (report.get("quantization") or {}).get("scheme"),
        "verdict": verdict(gates),
        "gates": [gate_row(gate) for gate in gates],
        "cards": cards(views),
        "views": views_table(views) if views else None,
        "styles": [view_style(view.get("name")) for view in views],
        "trades": trade_charts(views),
        "conditions": conditions_table(views) if views else None,
        "curves": precision_recall(report.get("precision_recall") or {}, views),
        "per_class": per_class(views),
        "images": images(report.get("images") or {}),
        "quantization": quantization(report),
        "training": progress(report.get("training") or {}, "epochs", "epoch"),
        "oscillations": oscillations(report.get("training") or {}),
        "correction": progress(report.get("correction") or {}, "steps", "step"),
        "calibration": _calibration(report.get("calibration") or {}),
        "environment": list_facts(report.get("environment") or {}),
        "commands": making.get("commands") or [],
        "inputs": making.get("digests") or {},
        "recipe": _recipe(report.get("recipe") or {}),
        "lineage": report.get("lineage") or [],
        "digests": {view_title(view.get("name")): view["digests"] for view in views if view.get("digests")},
    }


def write_report(path_html: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write the report as one self-contained HTML file. Sections without data are left out.

    Args:
        path_html: The file to write.
        report: The content of `report.json`, and the pictures of its images and of its calibration subset in
            `webp_base64`. Accuracies are fractions here and points in the page. Each part may be missing: `name`,
            `version`, `views` (as `EvalReport.to_json` gives them, an `interval` of the difference to float among
            them, or a `state` instead of numbers), `gates` (each with the keys of its `Gate` and of its `GateResult`),
            `precision_recall`, `images`, `quantization`, `not_run` (engines without numbers: `name`, `status`),
            `parity` (by view), `sensitivity`, `training` (`epochs`, `diagnostics`), `correction` (`steps`),
            `calibration`, `environment`, `reproduce` (`commands`, `digests`), `recipe` (facts and the YAML text),
            `lineage`.

    Raises:
        RuntimeMissingError: jinja2 or matplotlib is not installed.
        InputError: The file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        hint = 'pip install "qyolo_deploy[build]"'
        raise RuntimeMissingError("An HTML report needs jinja2, which is not installed.", hint) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates" / "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(_content(report))
    write_atomic(path_html, page)
