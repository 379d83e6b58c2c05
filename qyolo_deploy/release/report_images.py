"""What the report shows of single images: the same ones with the boxes of float and of each engine."""

from collections.abc import Mapping
from typing import Any

from qyolo_deploy.release.report_text import fixed, scalar, view_style, view_title
from qyolo_deploy.release.report_views import Table

_LABEL = 0.036  # height of a label as a share of the image's width
_LETTER = 0.6  # width of a letter as a share of the label's height
_LEAST_LABELED = 0.11  # width of a box, as a share of the image's, from which its name is written


def images(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compose the examples, worst losses first, and a table of totals.

    Args:
        section: Of `report.json`, as stage `validate` writes it, with the pictures in `webp_base64`.
    """
    examples = [_example(example) for example in section.get("examples") or []]
    if not examples:
        return None
    return {
        "conf": scalar(section.get("conf")),
        "iou": scalar(section.get("iou")),
        "examples": examples,
        "totals": _totals(section.get("views") or {}),
        "styles": [view_style(view) for view in section.get("views") or {}],
    }


def _totals(views: Mapping[str, Mapping[str, Any]]) -> Table:
    keys = ("right", "missed", "wrong", "images_worse", "images_better")
    head = ["View", "Found", "Missed", "False", "Images worse than float", "Images better"]
    return head, [[view_title(view), *(scalar(found.get(key)) for key in keys)] for view, found in views.items()]


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    views = example.get("views") or {}
    reference = (views.get("float") or {}).get("score")
    return {
        "title": example.get("title"),
        "width": example["width"],
        "height": example["height"],
        "label": example["width"] * _LABEL,
        "webp_base64": example.get("webp_base64"),
        "panels": [_panel(view, found, reference, example["width"]) for view, found in views.items()],
    }


def _panel(view: str, found: Mapping[str, Any], reference: float | None, width: float) -> dict[str, Any]:
    right, wrong, missed = (int(found.get(key, 0)) for key in ("right", "wrong", "missed"))
    change = None if reference is None or view == "float" else found["score"] - reference
    return {
        "title": view_title(view),
        "style": view_style(view),
        "score": fixed(found.get("score"), 2),
        "change": None if change is None else fixed(change, 2, signed=True),
        "text": f"{right} of {right + missed} found" + (f", {wrong} false" if wrong else ""),
        "boxes": [_box(box, width) for box in found.get("boxes") or []],
    }


def _box(box: Mapping[str, Any], width: float) -> dict[str, Any]:
    x, y, across, down = box["box"]
    score = box.get("score")
    name, height = str(box.get("name")), width * _LABEL
    label = f"{name} {score:.2f}" if score is not None and across >= width * _LEAST_LABELED else ""
    fits = x + (len(label) * _LETTER + 0.3) * height <= width
    return {
        "kind": box.get("kind"),
        "place": (x, y, across, down),
        "label": label,
        "anchor": "start" if fits else "end",
        "label_x": round(x + 0.3 * height if fits else x + across - 0.3 * height, 1),
        "label_y": round(y + 1.1 * height, 1),
        "hover": f"{name}, {box.get('kind')}" + ("" if score is None else f", confidence {score:.2f}"),
    }
