"""Losses against the float model; they need images but no labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qyolo_deploy.models.base import Detector
from qyolo_deploy.recipe import LossSection
from qyolo_deploy.training.loader import Batch

Step = Callable[[Batch], tuple[Tensor, dict[str, float]]]


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of the raw head maps over the teacher's variance, averaged over the maps.

    Args:
        student: Raw head maps, float32 `[N, C, H, W]` each.
        teacher: The float model's maps of the same images.
    """
    parts = [F.mse_loss(a, b) / b.var().clamp_min(1e-6) for a, b in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()


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
        if loss.logits:
            with torch.no_grad():
                target = teacher(batch["img"])
            parts["logits"] = loss.logits * distillation_loss(maps, target)
        if loss.detection:
            total, _ = detector.loss(maps, batch)
            parts["detection"] = loss.detection * total / len(batch["img"])
        return torch.stack(list(parts.values())).sum(), {name: value.item() for name, value in parts.items()}

    return step
