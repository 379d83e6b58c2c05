"""COCO's average precision of boxes, by the reference implementation or by the fast one."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.results import ResultTable

Evaluator = Literal["faster", "pycocotools"]
_AREAS = ("all", "small", "medium", "large")
_GROUP = 200_000
"""Detections that evaluators, which want a dict of each, are given at a time."""

_IOU_50, _IOU_75 = 0, 5
"""Places of IoU 0.5 and 0.75 among COCO's thresholds 0.50, 0.55 ... 0.95."""


@dataclass(frozen=True)
class CocoMetrics:
    """Average precisions as fractions in 0..1, at most 100 detections an image and class, as COCO counts.

    Attributes:
        map50_95: Mean over IoU 0.50, 0.55 ... 0.95 and over the classes.
        map50: At IoU 0.5.
        map75: At IoU 0.75.
        map_small: Of objects below 32 x 32 pixels; None where no such object is annotated.
        map_medium: Of objects from 32 x 32 to 96 x 96 pixels, likewise.
        map_large: Of larger objects, likewise.
        per_class: Mean over the IoU thresholds by class name, for the classes that have annotated objects.
    """

    map50_95: float
    map50: float
    map75: float
    map_small: float | None
    map_medium: float | None
    map_large: float | None
    per_class: dict[str, float]

    def __post_init__(self) -> None:
        named = {k: v for k, v in vars(self).items() if k != "per_class"} | self.per_class
        for name, value in named.items():
            # A comparison with NaN is false, so this refuses it too.
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected a fraction in 0..1")


def coco_map(
    dataset_ground_truth: Mapping[str, Any],
    category_ids: Sequence[int],
    results: ResultTable,
    image_ids: Sequence[int],
    evaluator: Evaluator = "faster",
) -> CocoMetrics:
    """Compute COCO's average precisions of boxes.

    Neither the ground truth nor the results are changed, and nothing is printed.

    Args:
        dataset_ground_truth: In COCO format: `images`, `annotations`, `categories`. Crowd regions neither
            count as objects nor make false positives.
        category_ids: The categories that count.
        results: Detections; those of other images or categories do not count.
        image_ids: The images that count, with and without annotated objects.
        evaluator: `pycocotools` is the reference, `faster` (faster-coco-eval) gives the same figures sooner.

    Raises:
        InputError: The images hold no annotated object of these categories, so that mAP is undefined.
    """
    truth = _ground_truth(dataset_ground_truth)
    images, categories = set(image_ids), set(category_ids)
    if not any(
        a["image_id"] in images and a["category_id"] in categories and not a["iscrowd"] for a in truth["annotations"]
    ):
        raise InputError(
            f"The ground truth has no object of the {len(categories)} categories on the {len(images)} images,"
            " so mAP is not defined."
        )
    run = _pycocotools if evaluator == "pycocotools" else _faster_coco_eval
    parts = []
    for group in _groups(results, sorted(categories)):
        own = {**truth, "annotations": [a for a in truth["annotations"] if a["category_id"] in group]}
        found = {**truth, "annotations": _detections(results.take(np.isin(results.category_ids, group)))}
        parts.append(run(own, found, group, sorted(images)))
    names = {c["id"]: c["name"] for c in truth["categories"]}
    return _metrics(np.concatenate(parts, axis=2), [names[c] for c in sorted(categories)])


def _groups(results: ResultTable, category_ids: list[int]) -> list[list[int]]:
    """Split the categories, which are evaluated apart, into groups with not too many detections each."""
    groups: list[list[int]] = [[]]
    count = 0
    for category in category_ids:
        own = int((results.category_ids == category).sum())
        if groups[-1] and count + own > _GROUP:
            groups.append([])
            count = 0
        groups[-1].append(category)
        count += own
    return groups


def _ground_truth(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the ground truth, as evaluators write into it, with ids from 1: they take 0 for "not matched"."""
    annotations = [
        {
            "id": i,
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "area": a.get("area", a["bbox"][2] * a["bbox"][3]),
            "iscrowd": a.get("iscrowd", 0),
        }
        for i, a in enumerate(ground_truth["annotations"], start=1)
    ]
    images = [dict(i) for i in ground_truth["images"]]
    return {"images": images, "annotations": annotations, "categories": list(ground_truth["categories"])}


def _detections(results: ResultTable) -> list[dict[str, Any]]:
    """Complete results to annotations, as the evaluators' `loadRes` does, which fails on an empty list."""
    found = results.to_coco()
    for i, result in enumerate(found, start=1):
        result |= {"id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _pycocotools(
    truth: dict[str, Any], found: dict[str, Any], category_ids: list[int], image_ids: list[int]
) -> npt.NDArray[np.float64]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(content: dict[str, Any]) -> COCO:
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        return coco

    with _silent():
        run = COCOeval(index(truth), index(found), "bbox")
        run.params.catIds, run.params.imgIds = category_ids, image_ids
        run.evaluate()
        run.accumulate()
    return np.asarray(run.eval["precision"], np.float64)


def _faster_coco_eval(
    truth: dict[str, Any], found: dict[str, Any], category_ids: list[int], image_ids: list[int]
) -> npt.NDArray[np.float64]:
    from faster_coco_eval import COCO, COCOeval_faster

    run = COCOeval_faster(COCO(truth), COCO(found), "bbox")
    run.params.catIds, run.params.imgIds = category_ids, image_ids
    run.evaluate()
    run.accumulate()
    return np.asarray(run.eval["precision"], np.float64)


def _metrics(precision: npt.NDArray[np.float64], class_names: list[str]) -> CocoMetrics:
    """Average precision float64 `[IoU, recall, class, area, max_det]`, in which -1 means no ground truth."""
    by_area = precision[..., -1]
    sizes = {area: _mean(by_area[..., i]) for i, area in enumerate(_AREAS)}
    overall = by_area[..., 0]
    per_class = {name: _mean(overall[:, :, k]) for k, name in enumerate(class_names)}
    total, half, strict = sizes["all"], _mean(overall[_IOU_50]), _mean(overall[_IOU_75])
    assert total is not None and half is not None and strict is not None
    return CocoMetrics(
        map50_95=total,
        map50=half,
        map75=strict,
        map_small=sizes["small"],
        map_medium=sizes["medium"],
        map_large=sizes["large"],
        per_class={name: value for name, value in per_class.items() if value is not None},
    )


def _mean(precision: npt.NDArray[np.float64]) -> float | None:
    present = precision[precision > -1]
    return float(present.mean()) if len(present) else None
