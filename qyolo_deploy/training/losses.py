"""Losses against the float model, which need images but no labels, and the detection loss on labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qyolo_deploy.graph.features import Teacher
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.models.base import Detector
from qyolo_deploy.recipe import LossSection
from qyolo_deploy.training import distributed
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
        parts.append((error / _variance(target, (0, 2, 3)).clamp_min(_EPS)).mean())
    return torch.stack(parts).mean()


def features_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of the blocks' outputs over the teacher's variance of each tensor.

    Args:
        student: Block outputs, float32 `[N, C, H, W]` each.
        teacher: The float model's of the same images.
    """
    pairs = zip(student, teacher, strict=True)
    errors = [F.mse_loss(own, target) / _variance(target, (0, 1, 2, 3)).clamp_min(_EPS) for own, target in pairs]
    return torch.stack(errors).mean()


def _variance(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Variance over the whole batch, also where other processes have parts of it."""
    moments = torch.stack([values.mean(dims), values.square().mean(dims)])
    moments = distributed.total(moments) / distributed.shard()[1]
    return moments[1] - moments[0].square()


def detections_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Soft-label detection loss: boxes by IoU where the teacher sees something, scores by cross-entropy.

    Args:
        student: `output0`, float32 `[N, 4 + nc, A]`.
        teacher: The float model's `output0` of the same images.
    """
    targets = teacher[:, 4:].clamp(_EPS, 1 - _EPS)
    confidence = targets.amax(1)
    weight = (distributed.total(confidence.sum()) / distributed.shard()[1]).clamp_min(1.0)
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
        model: Images to raw head maps; what learns. For the features part a `PreparedModel`.
        detector: The float detector: teacher, and owner of the detection loss.
        loss: Weights of the parts; a part of weight 0 is not computed.

    Returns:
        A function from a batch to the loss and its parts.
    """
    teacher = Teacher(detector) if loss.logits or loss.detections or loss.features else None

    def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        images = batch["img"]
        outputs = model.features(images) if isinstance(model, PreparedModel) else (model(images), ())
        maps, features = ([output.float() for output in group] for group in outputs)
        parts: dict[str, Tensor] = {}
        if teacher is not None:
            target, wanted = ([output.float() for output in outputs] for outputs in teacher(images))
        if loss.logits:
            parts["logits"] = loss.logits * logits_loss(maps, target)
        if loss.detections:
            parts["detections"] = loss.detections * detections_loss(detector.decode(maps), detector.decode(target))
        if loss.features:
            parts["features"] = loss.features * features_loss(features, wanted)
        if loss.labels and (labeled := _labeled(maps, batch)) is not None:
            total, _ = detector.loss(*labeled)
            parts["labels"] = loss.labels * total / len(images)
        if not parts:  # only unlabelled images in a batch that trains on labels alone
            parts["labels"] = torch.stack([level.sum() for level in maps]).sum() * 0
        return torch.stack(list(parts.values())).sum(), {name: value.item() for name, value in parts.items()}

    return step


def _labeled(maps: Sequence[Tensor], batch: Batch) -> tuple[Sequence[Tensor], Batch] | None:
    """Maps and labels of the images that have annotations; None where none has."""
    known = torch.as_tensor(batch["labeled"])
    if known.all():
        return maps, batch
    if not known.any():
        return None
    kept = torch.nonzero(known).flatten()
    index = torch.cumsum(known.long(), 0) - 1
    own = dict(batch) | {"img": batch["img"][kept], "batch_idx": index[batch["batch_idx"].long()].float()}
    return [level[kept] for level in maps], own
