"""Float training of a detector on the recipe's data, before quantization."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qyolo_deploy.data.dataset import DetectionDataset
from qyolo_deploy.models.base import Detector
from qyolo_deploy.recipe import LossSection, Recipe
from qyolo_deploy.training.device import CPU, placed
from qyolo_deploy.training.loader import Loader
from qyolo_deploy.training.loop import ParameterGroup, Progress, Schedule, fit
from qyolo_deploy.training.losses import make_step


def train_float(
    detector: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    *,
    checkpoint: Path,
    key: str,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], ...]:
    """Trains a detector on its own detection loss and leaves the EMA state in it.

    Args:
        detector: Fresh or pretrained; changed in place.
        dataset: The training split.
        recipe: Sections model and float.
        checkpoint: Resumable state, written after each epoch.
        key: Digest of everything that decides the result.
        device: Where it trains.
        progress: Called after each batch.

    Returns:
        One record an epoch.
    """
    section = recipe.float
    core = detector.core
    with placed(device, detector):
        trained = fit(
            core,
            make_step(core, detector, LossSection(labels=1.0, logits=0.0, detections=0.0)),
            parameter_groups(core, section.lr, section.weight_decay),
            Loader.of(dataset, section, recipe.model.imgsz),
            Schedule.of(section),
            checkpoint=checkpoint,
            key=key,
            set_mode=core.train,
            progress=progress,
        )
    core.load_state_dict(trained.ema)
    core.eval()
    return trained.history


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[ParameterGroup]:
    """Weights, and vectors, which do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        ParameterGroup([parameter for parameter in parameters if parameter.ndim > 1], lr, weight_decay),
        ParameterGroup([parameter for parameter in parameters if parameter.ndim <= 1], lr),
    ]
