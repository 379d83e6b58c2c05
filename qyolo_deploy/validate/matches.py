"""Which detection finds which object, image by image, by COCO's rules: what resampling images starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qyolo_deploy.validate.results import ResultTable

Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

IOU_THRESHOLDS: Float64 = np.linspace(0.5, 0.95, 10)
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
_MAX_DETECTIONS = 100
_LIMITS = np.array(list(AREAS.values()))


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class, highest score first, and its objects.

    Attributes:
        images: int64 `[n]`, the image of each detection, as an index into the evaluated images.
        matched: bool `[areas, thresholds, n]`: it finds an object.
        ignored: bool, likewise: it counts neither as right nor as wrong.
        objects: int64 `[areas, images]`, objects that count.
    """

    images: Int64
    matched: Bool
    ignored: Bool
    objects: Int64


def match_classes(
    ground_truth: Mapping[str, Any], category_ids: Sequence[int], results: ResultTable, image_ids: Sequence[int]
) -> list[ClassMatches]:
    """Match detections to objects, as COCOeval does.

    Args:
        ground_truth: In COCO format.
        category_ids: The classes.
        results: Detections.
        image_ids: The images that count.

    Returns:
        The matches of each class, in the order of the categories.
    """
    place = {image: index for index, image in enumerate(sorted(image_ids))}
    results = results.take(np.isin(results.image_ids, list(place)))
    results = results.take(np.lexsort((-results.scores, results.image_ids)))
    objects: dict[int, dict[int, list[Mapping[str, Any]]]] = {category: {} for category in category_ids}
    for entry in ground_truth["annotations"]:
        if entry["category_id"] in objects and entry["image_id"] in place:
            objects[entry["category_id"]].setdefault(entry["image_id"], []).append(entry)
    return [
        _match_class(results.take(results.category_ids == category), objects[category], place)
        for category in category_ids
    ]


def _match_class(
    rows: ResultTable, objects: Mapping[int, list[Mapping[str, Any]]], place: Mapping[int, int]
) -> ClassMatches:
    """Match the detections of a class, sorted by image and then by score."""
    rank = np.arange(len(rows))
    for span in _spans(rows).values():
        rank[span] -= span.start
    rows = rows.take(rank < _MAX_DETECTIONS)
    spans = _spans(rows)
    matched = np.zeros((len(AREAS), len(IOU_THRESHOLDS), len(rows)), bool)
    ignored = matched.copy()
    counts = np.zeros((len(AREAS), len(place)), np.int64)
    for image, truth in objects.items():
        ignore = _ignored_objects(truth)
        counts[:, place[image]] = (~ignore).sum(axis=1)
        if image in spans:
            span = spans[image]
            _match_boxes(rows.boxes[span], truth, ignore, matched[..., span], ignored[..., span])
    areas = rows.boxes[:, 2] * rows.boxes[:, 3]
    outside = (areas < _LIMITS[:, :1]) | (areas > _LIMITS[:, 1:])
    ignored |= ~matched & outside[:, None]
    order = np.argsort(-rows.scores, kind="stable")
    indices = np.array([place[image] for image in rows.image_ids.tolist()], np.int64)
    return ClassMatches(indices[order], matched[..., order], ignored[..., order], counts)


def _spans(rows: ResultTable) -> dict[int, slice]:
    """Where the rows of each image are."""
    images, starts, sizes = np.unique(rows.image_ids, return_index=True, return_counts=True)
    return {
        image: slice(start, start + size)
        for image, start, size in zip(images.tolist(), starts.tolist(), sizes.tolist(), strict=True)
    }


def _ignored_objects(truth: Sequence[Mapping[str, Any]]) -> Bool:
    """Return bool `[areas, objects]`: crowds, and objects of another size."""
    areas = np.array([entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in truth], np.float64)
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in truth], bool)
    ignored: Bool = (areas < _LIMITS[:, :1]) | (areas > _LIMITS[:, 1:]) | crowd
    return ignored


def _match_boxes(
    boxes: Float64, truth: Sequence[Mapping[str, Any]], ignore: Bool, matched: Bool, ignored: Bool
) -> None:
    """Give each detection in turn the best object that is left; one that is ignored only if no other overlaps."""
    from pycocotools import mask

    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in truth])
    ious = np.asarray(mask.iou(boxes, np.array([e["bbox"] for e in truth], np.float64), crowd.astype(np.uint8)))
    # Of equal overlaps the last one wins, so the order is turned round for argmax, which takes the first.
    ious, crowd, ignore = ious[:, ::-1], crowd[::-1], ignore[:, None, ::-1]
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    taken = np.zeros((*matched.shape[:2], len(truth)), bool)
    indices: Int64 = np.indices(matched.shape[:2])
    a, t = indices
    for index in np.flatnonzero(ious.max(axis=1) >= thresholds[0, 0]):
        near = (ious[index] >= thresholds) & (~taken | crowd)
        proper = near & ~ignore
        choice = np.where(proper.any(axis=2, keepdims=True), proper, near)
        best = np.where(choice, ious[index], -1.0).argmax(axis=2)
        hit = choice.any(axis=2)
        taken[a[hit], t[hit], best[hit]] = True
        matched[..., index] = hit
        ignored[..., index] = hit & np.broadcast_to(ignore, taken.shape)[a, t, best]
