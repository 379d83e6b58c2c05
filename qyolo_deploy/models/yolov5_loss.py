"""The label loss of the anchor-based YOLOv5, written after its published description.

The description is "Ultralytics YOLOv5 Architecture", sections 4.1 (losses), 4.2 (balance of the levels),
4.3 (what the decode can reach) and 4.4 (targets); the gains are those of its training from scratch.
Two things that it leaves open are settled here: an anchor of a cell that several labels claim has the
greatest of their CIoUs as its objectness target, and no cell is counted twice for one label.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BOX_GAIN, _OBJECTNESS_GAIN, _CLASS_GAIN = 0.05, 1.0, 0.5
_GAIN_LEVELS, _GAIN_SIDE, _GAIN_CLASSES = 3, 640, 80  # of the model that the gains were found for
_BALANCE_OF_THREE = (4.0, 1.0, 0.4)
_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
_MAX_RATIO = 4.0  # where the decode's (2 s)^2 ends
_STEPS = ((0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # columns and rows to a candidate cell
_EPS = 1e-7


@dataclass(frozen=True)
class CellTargets:
    """The predictions of one level that answer for a label, and what they should say.

    Attributes:
        image: Index in the batch, int64 `[K]` as are the next three.
        anchor: Index among the level's anchors.
        row: Of the cell.
        column: Of the cell.
        boxes: float32 `[K, 4]`: xywh in cells, the centre as seen from the cell's upper left corner.
        classes: int64 `[K]`.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    boxes: Tensor
    classes: Tensor


def anchor_loss(
    raw_maps: Sequence[Tensor], batch: Mapping[str, Tensor], anchors: Tensor, strides: Sequence[int]
) -> tuple[Tensor, dict[str, float]]:
    """Box, objectness and class loss of all levels (YOLOv5 Architecture, 4.1 and 4.2).

    Args:
        raw_maps: `[N, A * (5 + nc), h, w]` each, finest level first; half precision becomes float32.
        batch: What `Detector.loss` takes. The gain of objectness goes by the longer side of `img`.
        anchors: float32 `[levels, A, 2]`: widths and heights in pixels.
        strides: Pixels per cell of each level.

    Returns:
        The sum of the parts times N, float32, and the parts `box`, `obj` and `cls` without that factor.
    """
    count, side = len(raw_maps), max(batch["img"].shape[-2:])
    classes = raw_maps[0].shape[1] // anchors.shape[1] - 5
    levels = []
    for raw, sizes, stride in zip(raw_maps, anchors.to(raw_maps[0].device).float(), strides, strict=True):
        # Autocast may go on: it lowers the precision of matrix products alone, and there are none in here.
        levels.append(_level_parts(raw.float(), batch, sizes / stride))
    box, objectness, labels = torch.stack(levels).unbind(1)
    objectness = objectness * objectness.new_tensor(_balance(count))
    share = _GAIN_LEVELS / count
    parts = {
        "box": box.sum() * (_BOX_GAIN * share),
        "obj": objectness.sum() * (_OBJECTNESS_GAIN * share * (side / _GAIN_SIDE) ** 2),
        "cls": labels.sum() * (_CLASS_GAIN * share * classes / _GAIN_CLASSES),
    }
    total = torch.stack(list(parts.values())).sum() * len(raw_maps[0])
    return total, {name: part.item() for name, part in parts.items()}


def _balance(levels: int) -> tuple[float, ...]:
    """Return the weights of the levels' objectness, finest level first (YOLOv5 Architecture, 4.2)."""
    if levels == len(_BALANCE_OF_THREE):
        return _BALANCE_OF_THREE
    return tuple(_BALANCE[min(level, len(_BALANCE) - 1)] for level in range(levels))


def _level_parts(raw: Tensor, batch: Mapping[str, Tensor], anchors: Tensor) -> Tensor:
    """Return one level's mean box, objectness and class loss, float32 `[3]`, without gains.

    Args:
        raw: float32 `[N, A * (5 + nc), h, w]`.
        batch: What `Detector.loss` takes.
        anchors: float32 `[A, 2]` in cells.
    """
    images, channels, height, width = raw.shape
    maps = raw.reshape(images, len(anchors), channels // len(anchors), height, width)
    targets = assign_labels(batch, anchors, height, width)
    where = (targets.image, targets.anchor, targets.row, targets.column)
    chosen = maps.permute(0, 1, 3, 4, 2)[where]
    s = chosen[:, :4].sigmoid()
    boxes = torch.cat((2 * s[:, :2] - 0.5, torch.square(2 * s[:, 2:]) * anchors[targets.anchor]), 1)
    overlap = complete_iou(boxes, targets.boxes)
    objectness = F.binary_cross_entropy_with_logits(maps[:, :, 4], _objectness_targets(maps[:, :, 4], where, overlap))
    # Means over no boxes are 0 and still part of the graph, so that a batch without labels can be learned from.
    box = (1 - overlap).sum() / max(len(chosen), 1)
    return torch.stack((box, objectness, _class_loss(chosen[:, 5:], targets.classes)))


def _objectness_targets(logits: Tensor, where: tuple[Tensor, ...], overlap: Tensor) -> Tensor:
    """Return what objectness `[N, A, h, w]` should be: a predicted box's CIoU with its label, and at least 0."""
    _, anchors, height, width = logits.shape
    image, anchor, row, column = where
    index = ((image * anchors + anchor) * height + row) * width + column
    flat = torch.zeros(logits.numel(), device=logits.device)
    return flat.scatter_reduce(0, index, overlap.detach(), "amax").reshape(logits.shape)


def _class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross-entropy of `[K, nc]` logits; nothing is to be learned where there is one class."""
    if logits.shape[1] < 2:
        return logits.new_zeros(())
    wanted = F.one_hot(classes, logits.shape[1]).to(logits)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / max(logits.numel(), 1)


def assign_labels(batch: Mapping[str, Tensor], anchors: Tensor, height: int, width: int) -> CellTargets:
    """Find the anchors and cells of one level that answer for each label (YOLOv5 Architecture, 4.4).

    An anchor answers where the label is less than 4 times as wide and high and more than a quarter; a cell
    does where it holds the label's centre or is next to it on the side that the centre is nearer to.

    Args:
        batch: What `Detector.loss` takes.
        anchors: float32 `[A, 2]` in cells.
        height: Of the level in cells.
        width: Of the level in cells.
    """
    size = anchors.new_tensor((width, height))
    labels = batch["bboxes"].to(anchors) * size.repeat(2)
    ratio = labels[:, None, 2:] / anchors
    label, anchor = (torch.maximum(ratio, 1 / ratio).amax(2) < _MAX_RATIO).nonzero(as_tuple=True)
    centre = labels[label, :2]
    home = torch.minimum(centre.floor(), size - 1)  # a centre on the image's far edge has no cell
    cells = home + anchors.new_tensor(_STEPS)[:, None]
    # Less than a cell between the middle of the cell and the centre: what the decode's 2 s - 0.5 can reach.
    reached = ((cells + 0.5 - centre).abs() < 1).all(2)
    step, match = (reached & (cells >= 0).all(2) & (cells < size).all(2)).nonzero(as_tuple=True)
    label, cells = label[match], cells[step, match]
    image, classes = (batch[key].to(anchors.device).reshape(-1).long()[label] for key in ("batch_idx", "cls"))
    boxes = torch.cat((labels[label, :2] - cells, labels[label, 2:]), 1)
    return CellTargets(image, anchor[match], cells[:, 1].long(), cells[:, 0].long(), boxes, classes)


def complete_iou(left: Tensor, right: Tensor) -> Tensor:
    """Complete IoU of boxes xywh, `[K, 4]` each, to `[K]` (Distance-IoU Loss, Zheng et al. 2020, eq. 8 to 11).

    The weight of the shapes' difference is a constant to the gradient.
    """
    half_left, half_right = left[:, 2:] / 2, right[:, 2:] / 2
    low, high = left[:, :2] - half_left, left[:, :2] + half_left
    other_low, other_high = right[:, :2] - half_right, right[:, :2] + half_right
    common = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp_min(0).prod(1)
    iou = common / (left[:, 2:].prod(1) + right[:, 2:].prod(1) - common + _EPS)
    hull = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    distance = torch.square(left[:, :2] - right[:, :2]).sum(1) / (torch.square(hull).sum(1) + _EPS)
    angles = torch.atan(left[:, 2] / left[:, 3].clamp_min(_EPS)) - torch.atan(right[:, 2] / right[:, 3])
    shape = torch.square(angles) * (4 / math.pi**2)
    with torch.no_grad():
        weight = shape / (shape - iou + (1 + _EPS))
    return iou - distance - weight * shape
