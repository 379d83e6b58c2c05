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
    objects: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for entry in ground_truth["annotations"]:
        objects.setdefault((entry["category_id"], entry["image_id"]), []).append(entry)
    order = np.lexsort((-results.scores, results.image_ids, results.category_ids))
    results = results.take(order)
    keys = np.stack((results.category_ids, results.image_ids))
    starts = (
        np.flatnonzero(np.r_[True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)]) if len(results) else np.empty(0, int)
    )
    ends = np.r_[starts[1:], len(results)]
    found = {
        (int(keys[0, start]), int(keys[1, start])): results.take(np.arange(start, min(end, start + _MAX_DETECTIONS)))
        for start, end in zip(starts, ends, strict=True)
    }
    return [_match_class(category, place, objects, found) for category in category_ids]


def _match_class(
    category: int,
    place: Mapping[int, int],
    objects: Mapping[tuple[int, int], list[Mapping[str, Any]]],
    found: Mapping[tuple[int, int], ResultTable],
) -> ClassMatches:
    shape = (len(AREAS), len(IOU_THRESHOLDS))
    images, scores = [np.empty(0, np.int64)], [np.empty(0)]
    matched, ignored = [np.empty((*shape, 0), bool)], [np.empty((*shape, 0), bool)]
    counts = np.zeros((len(AREAS), len(place)), np.int64)
    for image, index in place.items():
        truth, rows = objects.get((category, image), []), found.get((category, image))
        ignore = _ignored_objects(truth)
        counts[:, index] = (~ignore).sum(axis=1)
        if rows is not None:
            hit, skip = _match_image(rows, truth, ignore)
            images.append(np.full(len(rows), index))
            scores.append(rows.scores)
            matched.append(hit)
            ignored.append(skip)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return ClassMatches(
        np.concatenate(images)[order],
        np.concatenate(matched, axis=2)[..., order],
        np.concatenate(ignored, axis=2)[..., order],
        counts,
    )


def _ignored_objects(truth: Sequence[Mapping[str, Any]]) -> Bool:
    """Return bool `[areas, objects]`: crowds, and objects of another size."""
    areas = np.array([entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in truth], np.float64)
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in truth], bool)
    outside: Bool = (areas < _LIMITS[:, :1]) | (areas > _LIMITS[:, 1:])
    return outside | crowd


def _match_image(rows: ResultTable, truth: Sequence[Mapping[str, Any]], ignore: Bool) -> tuple[Bool, Bool]:
    """Return which detections of an image, best first, are matched, and which are ignored: `[areas, thresholds, n]`."""
    matched = np.zeros((len(AREAS), len(IOU_THRESHOLDS), len(rows)), bool)
    ignored = matched.copy()
    if truth:
        _match_boxes(rows.boxes, truth, ignore, matched, ignored)
    areas = rows.boxes[:, 2] * rows.boxes[:, 3]
    outside = (areas < _LIMITS[:, :1]) | (areas > _LIMITS[:, 1:])
    return matched, ignored | (~matched & outside[:, None])


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
    a, t = np.indices(matched.shape[:2])
    for index in np.flatnonzero(ious.max(axis=1) >= thresholds[0, 0]):
        near = (ious[index] >= thresholds) & (~taken | crowd)
        proper = near & ~ignore
        choice = np.where(proper.any(axis=2, keepdims=True), proper, near)
        best = np.where(choice, ious[index], -1.0).argmax(axis=2)
        hit = choice.any(axis=2)
        taken[a[hit], t[hit], best[hit]] = True
        matched[..., index] = hit
        ignored[..., index] = hit & np.broadcast_to(ignore, taken.shape)[a, t, best]
