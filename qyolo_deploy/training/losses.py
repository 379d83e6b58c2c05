"""Losses against the float model; they need images but no labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qyolo_deploy.models.base import Detector
from qyolo_deploy.recipe import LossSection
from qyolo_deploy.training.loader import Batch

Step = Callable[[Batch], tuple[Tensor, dict[str, float]]]

# Weights of box and score terms: those of ultralytics' detection loss, of which this is the soft-label form.
_BOX_GAIN, _SCORE_GAIN = 7.5, 0.5
_EPS = 1e-6


def logits_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of the raw head maps over the teacher's variance of each channel.

    Per channel, because the channels that place boxes vary far less than those that score classes.

    Args:
        student: Raw head maps, float32 `[N, C, H, W]` each.
        teacher: The float model's maps of the same images.
    """
    parts = []
    for own, target in zip(student, teacher, strict=True):
        error = torch.square(own - target).mean((0, 2, 3))
        parts.append((error / target.var((0, 2, 3)).clamp_min(_EPS)).mean())
    return torch.stack(parts).mean()


def detections_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Soft-label detection loss: boxes by IoU where the teacher sees something, scores by cross-entropy.

    Args:
        student: `output0`, float32 `[N, 4 + nc, A]`.
        teacher: The float model's `output0` of the same images.
    """
    targets = teacher[:, 4:].clamp(_EPS, 1 - _EPS)
    confidence = targets.amax(1)
    weight = confidence.sum().clamp_min(1.0)
    box = ((1 - _iou(student[:, :4], teacher[:, :4])) * confidence).sum() / weight
    scores = student[:, 4:].clamp(_EPS, 1 - _EPS)
    # The targets' own entropy is what cross-entropy cannot go below: without it, a perfect student has loss 0.
    entropy = F.binary_cross_entropy(targets, targets, reduction="sum")
    score = (F.binary_cross_entropy(scores, targets, reduction="sum") - entropy) / weight
    return _BOX_GAIN * box + _SCORE_GAIN * score


def _iou(left: Tensor, right: Tensor) -> Tensor:
    """Intersection over union of boxes xywh, `[N, 4, A]` each, to `[N, A]`."""
    low = torch.maximum(left[:, :2] - left[:, 2:] / 2, right[:, :2] - right[:, 2:] / 2)
    high = torch.minimum(left[:, :2] + left[:, 2:] / 2, right[:, :2] + right[:, 2:] / 2)
    common = (high - low).clamp_min(0).prod(1)
    return common / (left[:, 2:].prod(1) + right[:, 2:].prod(1) - common).clamp_min(_EPS)


def make_step(model: nn.Module, detector: Detector, loss: LossSection) -> Step:
    """The loss of one batch, as the recipe's weights compose it.

    Args:
        model: Images to raw head maps; what learns.
        detector: The float detector: teacher, and owner of the detection loss.
        loss: Weights of the parts; a part of weight 0 is not computed.

    Returns:
        A function from a batch to the loss and its parts.
    """
    teacher = detector.core.eval()

    def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        maps = model(batch["img"])
        parts: dict[str, Tensor] = {}
        if loss.logits or loss.detections:
            with torch.no_grad():
                target = teacher(batch["img"])
                found = detector.decode(target)
        if loss.logits:
            parts["logits"] = loss.logits * logits_loss(maps, target)
        if loss.detections:
            parts["detections"] = loss.detections * detections_loss(detector.decode(maps), found)
        if loss.labels:
            total, _ = detector.loss(maps, batch)
            parts["labels"] = loss.labels * total / len(batch["img"])
        return torch.stack(list(parts.values())).sum(), {name: value.item() for name, value in parts.items()}

    return step
