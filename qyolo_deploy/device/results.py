"""One run of an engine on one image, and how far two runs are apart."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.data.letterbox import to_tensor
from qyolo_deploy.engines.base import Runner
from qyolo_deploy.release.golden import DETECTION_FIELDS, Golden, GoldenOutput, Tolerance
from qyolo_deploy.release.manifest import Postprocessing
from qyolo_deploy.validate.detections import decode

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """What an engine made of an image.

    Attributes:
        outputs: The engine's own outputs by name, float32, batch of one.
        detections: float32 `[n, 6]`: x1 y1 x2 y2 score class.
    """

    outputs: dict[str, Float32]
    detections: Float32


@dataclass(frozen=True)
class Difference:
    """How far a result is from the golden one.

    Attributes:
        relative_error: The largest of any output.
        score: The largest difference of the scores of paired detections; 1 where a detection has no partner.
        iou: The smallest IoU of paired detections; 0 where a detection has no partner.
    """

    relative_error: float = 0.0
    score: float = 0.0
    iou: float = 1.0

    def within(self, tolerance: Tolerance) -> bool:
        """Whether nothing is further off than allowed."""
        return (
            self.relative_error <= tolerance.relative_error
            and self.score <= tolerance.score
            and self.iou >= tolerance.iou
        )

    def worse(self, other: "Difference") -> "Difference":
        """The worse of both in each respect."""
        return Difference(
            max(self.relative_error, other.relative_error), max(self.score, other.score), min(self.iou, other.iou)
        )


def run_engine(runner: Runner, image: NDArray[np.uint8], thresholds: Postprocessing) -> Result:
    """Runs an engine on a letterboxed image, uint8 `[H, W, 3]`."""
    tensor = to_tensor(image)
    found = decode(
        runner(tensor)[0], thresholds.conf, thresholds.iou, thresholds.max_det, multi_label=thresholds.multi_label
    )
    columns = (found.boxes, found.scores[:, None], found.classes[:, None].astype(np.float32))
    rows = np.concatenate(columns, axis=1) if len(found) else np.zeros((0, DETECTION_FIELDS), np.float32)
    return Result(runner.outputs(tensor), rows)


def relative_error(found: Float32, expected: Float32) -> float:
    """`||found - expected|| / ||expected||`; infinite where `found` is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance = float(np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64)))
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    if not np.isfinite(distance):
        return float("inf")
    return distance / scale if scale else float(distance > 0)


def compare_output(output: GoldenOutput, found: Float32, indices: NDArray[np.int64], values: Float32) -> Difference:
    """How far an output of an engine is from golden values at some places; boxes and the rest each by themselves."""
    channels = indices // int(np.prod(output.shape[2:], dtype=np.int64))
    is_box = channels < output.box_channels
    taken = found.reshape(-1)[indices]
    return Difference(max(relative_error(taken[part], values[part]) for part in (is_box, ~is_box)))


def best_detections(detections: Float32, golden: Golden) -> Float32:
    """Those of one image that are compared, of all that there are."""
    first = detections[: golden.compared]
    return first[first[:, 4] >= golden.min_score]


def compare_detections(found: Float32, expected: Float32, golden: Golden) -> Difference:
    """Looks for a partner of each of the best detections, in both directions.

    Among rivals near the threshold of the suppression, or near the last place, another one may win; that is why
    partners are looked for among all detections.
    """
    ahead = _partners(found, best_detections(expected, golden))
    return ahead.worse(_partners(expected, best_detections(found, golden)))


def _partners(candidates: Float32, wanted: Float32) -> Difference:
    worst = Difference()
    for row in wanted:
        same = candidates[candidates[:, 5] == row[5]]
        overlaps = _iou(same[:, :4].astype(np.float64), row[:4].astype(np.float64))
        if not overlaps.any():
            return Difference(score=1.0, iou=0.0)
        best = int(overlaps.argmax())
        score = abs(float(same[best, 4]) - float(row[4]))
        worst = worst.worse(Difference(score=score, iou=float(overlaps[best])))
    return worst


def _iou(boxes: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of boxes `[n, 4]` with one box; equal boxes have 1 even without an area."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    intersection = (high - low).clip(0).prod(axis=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - intersection
    overlap = np.divide(intersection, union, out=np.zeros(len(boxes)), where=union > 0)
    return np.where((boxes == box).all(axis=1), 1.0, overlap)
