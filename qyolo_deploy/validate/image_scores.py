"""What a detector gets right on each image, at the confidence from which its detections are shown."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.validate.results import CocoResult, ResultTable

CONF = 0.25
"""The confidence from which YOLO shows a detection by default."""
IOU = 0.5
"""Overlap from which a detection is right."""

_Boxes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImageMatch:
    """The detections of one image against its annotated objects.

    Attributes:
        right: Detections that hit an object of their class.
        wrong: Those that hit none, or one that a surer detection hits.
        missed: Annotations that no detection hits.
    """

    right: tuple[CocoResult, ...]
    wrong: tuple[CocoResult, ...]
    missed: tuple[Mapping[str, Any], ...]

    @property
    def score(self) -> float:
        """F1 in 0..1; 1 where there is nothing to find and nothing was found."""
        errors = len(self.wrong) + len(self.missed)
        return 2 * len(self.right) / (2 * len(self.right) + errors) if self.right or errors else 1.0


def match_images(
    dataset: DetectionDataset, results: ResultTable, conf: float = CONF, iou: float = IOU
) -> list[ImageMatch]:
    """Match detections with objects of their class, surest first, each object once.

    Args:
        dataset: Images and ground truth. Detections in a crowd region of their class count neither way.
        results: Detections.
        conf: Only detections of at least this score count.
        iou: The least overlap of a match.

    Returns:
        One match for each image, in the order of the dataset's.
    """
    found, objects = defaultdict[int, list[CocoResult]](list), defaultdict[int, list[Any]](list)
    for result in results.take(results.scores >= conf).to_coco():
        found[result["image_id"]].append(result)
    for annotation in dataset.ground_truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    return [_match(found[image.image_id], objects[image.image_id], iou) for image in dataset.images]


def _match(found: list[CocoResult], annotations: list[Mapping[str, Any]], iou: float) -> ImageMatch:
    found = sorted(found, key=lambda result: -result["score"])
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
    overlaps = _overlaps(found, objects, of_detection=False)
    in_crowd = _overlaps(found, crowds, of_detection=True).max(axis=1, initial=0.0) >= iou
    right, wrong = [], []
    for row, result in enumerate(found):
        best = int(overlaps[row].argmax()) if objects else -1
        if objects and overlaps[row, best] >= iou:
            overlaps[:, best] = -1  # each object is found once
            right.append(result)
        elif not in_crowd[row]:
            wrong.append(result)
    missed = [annotation for annotation, column in zip(objects, overlaps.T, strict=True) if not (column < 0).any()]
    return ImageMatch(tuple(right), tuple(wrong), tuple(missed))


def _overlaps(found: Sequence[CocoResult], others: Sequence[Mapping[str, Any]], *, of_detection: bool) -> _Boxes:
    """Return IoU, or the share of the detection, float64 `[found, others]`; 0 for different classes."""
    first, second = (np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4) for items in (found, others))
    (start, size), (other_start, other_size) = ((boxes[..., :2], boxes[..., 2:]) for boxes in (first[:, None], second))
    ends = np.minimum(start + size, other_start + other_size)
    shared = (ends - np.maximum(start, other_start)).clip(0).prod(axis=2)
    own, other = size.prod(axis=2), other_size.prod(axis=1)
    whole = np.broadcast_to(own, shared.shape) if of_detection else own + other - shared
    same = np.array([[item["category_id"] == result["category_id"] for item in others] for result in found])
    ratio: _Boxes = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return np.where(same.reshape(shared.shape), ratio, 0.0)


def worst_losses(reference: Sequence[ImageMatch], others: Sequence[Sequence[ImageMatch]], count: int) -> list[int]:
    """Return the places of the images whose score drops most from the reference to any other view, worst first.

    Of equal drops the one with more objects lost comes first.
    """

    def drop(place: int) -> tuple[float, int]:
        then, now = reference[place], [matches[place] for matches in others]
        return then.score - min(match.score for match in now), len(then.right) - min(len(m.right) for m in now)

    ranked = sorted(range(len(reference)), key=lambda place: (*(-part for part in drop(place)), place))
    return ranked[:count]
