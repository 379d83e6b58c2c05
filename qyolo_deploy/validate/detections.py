"""From an engine's `output0` to detections: candidates, class-wise non-maximum suppression, the best few."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

MAX_CANDIDATES = 30_000
"""Candidates that reach suppression, highest scores first (the limit that YOLOv5's validation uses)."""

_BLOCK = 128
"""Candidates that are compared with each other at a time; 128 measured faster than 256 and 512."""


@dataclass(frozen=True)
class Detections:
    """Detections of one image, highest score first.

    Attributes:
        boxes: float32 `[n, 4]`, x1 y1 x2 y2 in pixels.
        scores: float32 `[n]`.
        classes: int64 `[n]`, indices into the class names.
    """

    boxes: Float32
    scores: Float32
    classes: Int64

    def __post_init__(self) -> None:
        n = len(self.scores)
        shapes = (self.boxes.shape, self.scores.shape, self.classes.shape)
        if shapes != ((n, 4), (n,), (n,)):
            raise ValueError(f"boxes, scores and classes have the shapes {shapes}, expected [n, 4], [n], [n]")

    def __len__(self) -> int:
        return len(self.scores)


def is_end_to_end(shape: Sequence[int]) -> bool:
    """Return whether an output of this shape holds final detections rather than candidates.

    Args:
        shape: Of `output0`, with or without the batch axis. `[..., n, 6]` is end-to-end; a candidate output
            has one column an anchor, and no network has as few as six anchors.
    """
    return shape[-1] == 6


def decode(output: Float32, conf: float, iou: float, max_det: int, *, multi_label: bool = True) -> Detections:
    """Turn one image's output into detections.

    Args:
        output: float32 `[4 + nc, A]` with xywh (centre, pixels) and class scores, or `[n, 6]` of an
            end-to-end head with x1 y1 x2 y2 score class, to which no suppression is applied.
        conf: Only scores above it count.
        iou: A box that overlaps a better one of its class by more than this IoU is suppressed.
        max_det: At most this many detections, highest scores first.
        multi_label: Every (anchor, class) pair is a candidate; otherwise each anchor's best class alone.

    Returns:
        Detections by descending score; equal scores keep their order in `output`: by class, then by
        anchor, and by anchor alone without `multi_label`.
    """
    if is_end_to_end(output.shape):
        kept = output[output[:, 4] > conf]
        kept = kept[np.argsort(-kept[:, 4], kind="stable")[:max_det]]
        return Detections(kept[:, :4].copy(), kept[:, 4].copy(), kept[:, 5].astype(np.int64))
    classes, anchors, scores = _candidates(output[4:], conf, multi_label)
    order = _best_first(scores, MAX_CANDIDATES)
    classes, anchors, scores = classes[order], anchors[order], scores[order]
    boxes = xywh_to_xyxy(output[:4, anchors].T)
    keep = nms(boxes, classes, iou, max_det)
    return Detections(boxes[keep], scores[keep], classes[keep])


def xywh_to_xyxy(boxes: Float32) -> Float32:
    """Convert boxes float32 `[n, 4]` from centre, width and height to x1 y1 x2 y2."""
    half = boxes[:, 2:] / 2
    return np.concatenate((boxes[:, :2] - half, boxes[:, :2] + half), axis=1)


def nms(boxes: Float32, classes: Int64, iou: float, max_det: int) -> Int64:
    """Suppress, class by class, each box that overlaps a better one by more than `iou`.

    Greedy: the best box stays and removes those of its class that overlap it, then the next one, until
    `max_det` are found. Blocks of candidates are compared with what was kept so far, so that the work ends
    with the last detection needed and not with the last candidate. IoU is computed in float64.

    Args:
        boxes: float32 `[n, 4]`, x1 y1 x2 y2, best first. A box without area overlaps nothing.
        classes: int64 `[n]`.
        iou: In 0..1; a box at exactly this IoU stays.
        max_det: At most this many are kept.

    Returns:
        int64 `[k]`, ascending indices of the boxes that stay.
    """
    pairs = _Pairs(boxes, classes, iou)
    kept = np.empty(0, np.int64)
    for start in range(0, len(boxes), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(boxes)))
        free = block[~pairs.overlaps(kept, block).any(axis=0)]
        kept = np.concatenate((kept, _greedy(free, pairs.overlaps(free, free))))
        if len(kept) >= max_det:
            break
    return kept[:max_det]


def _candidates(scores: Float32, conf: float, multi_label: bool) -> tuple[Int64, Int64, Float32]:
    """Return classes, anchors and scores of the entries of `[nc, A]` above the threshold, in memory order."""
    # Few anchors have any such entry, and finding each one's best is the fastest way through all of them.
    likely = np.flatnonzero(scores.max(axis=0) > conf)
    scores = scores[:, likely]
    if multi_label:
        classes, columns = np.nonzero(scores > conf)
    else:
        classes, columns = scores.argmax(axis=0), np.arange(len(likely))
    return classes, likely[columns], scores[classes, columns]


def _best_first(scores: Float32, limit: int) -> Int64:
    """Return the indices of the `limit` highest scores, descending; the earlier index wins a tie."""
    among = np.arange(len(scores))
    if len(scores) > limit:
        lowest = np.partition(scores, len(scores) - limit)[len(scores) - limit]
        among = np.flatnonzero(scores >= lowest)
    return among[np.argsort(-scores[among], kind="stable")[:limit]]


class _Pairs:
    """Boxes of which pairs are compared; see `nms`."""

    def __init__(self, boxes: Float32, classes: Int64, iou: float) -> None:
        self._corners = np.ascontiguousarray(boxes.T, np.float64)
        x1, y1, x2, y2 = self._corners
        # Boxes of infinite size give NaN, which is above no threshold.
        with np.errstate(invalid="ignore"):
            self._areas = (x2 - x1) * (y2 - y1)
        self._classes, self._iou = classes.astype(np.int32), iou

    def overlaps(self, rows: Int64, columns: Int64) -> npt.NDArray[np.bool_]:
        """Return bool `[rows, columns]`: the same class and an IoU above the threshold."""
        result: npt.NDArray[np.bool_] = self._classes[rows][:, None] == self._classes[columns]
        # Most pairs differ in class, so IoU is worth computing for the others only.
        flat = np.flatnonzero(result)
        i, j = np.divmod(flat.astype(np.int32), np.int32(max(len(columns), 1)))
        a, b = rows.take(i), columns.take(j)
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 for boxes without area
            ratio = self._shared(0, a, b)
            ratio *= self._shared(1, a, b)
            union = self._areas.take(a) + self._areas.take(b)
            union -= ratio
            ratio /= union
        result.ravel()[flat] = ratio > self._iou
        return result

    def _shared(self, axis: int, a: Int64, b: Int64) -> Float64:
        """Length float64 `[n]` that pairs of boxes have in common along x (0) or y (1)."""
        low, high = self._corners[axis], self._corners[axis + 2]
        length = np.minimum(high.take(a), high.take(b))
        length -= np.maximum(low.take(a), low.take(b))
        return np.asarray(np.maximum(length, 0, out=length), np.float64)


def _greedy(block: Int64, overlaps: npt.NDArray[np.bool_]) -> Int64:
    """Return those of a block's boxes (indices, best first) that no better one of the block suppresses."""
    alive = np.ones(len(block), bool)
    for i in np.flatnonzero(overlaps.sum(axis=1) > 1):
        if alive[i]:
            alive[i + 1 :] &= ~overlaps[i, i + 1 :]
    return block[alive]
