"""Quantization-aware training: from a float detector to a trained, EMA-smoothed quantized one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qyolo_deploy.data.dataset import DetectionDataset
from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.graph.observers import calibrate, refine_outputs
from qyolo_deploy.graph.prepare import PreparedModel, prepare
from qyolo_deploy.models.base import Detector
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.training.loader import Loader, calibration_batches
from qyolo_deploy.training.loop import ParameterGroup, Progress, Schedule, fit
from qyolo_deploy.training.losses import detections_loss, make_step

_CALIBRATION_BATCH = 8
_REFINING_IMAGES = 2


@dataclass(frozen=True)
class QatResult:
    """A trained model: it holds the EMA state; the raw state lies beside it."""

    model: PreparedModel
    raw: Mapping[str, Tensor]
    history: tuple[dict[str, Any], ...]


def train_qat(
    detector: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    *,
    checkpoint: Path,
    key: str,
    progress: Progress | None = None,
) -> QatResult:
    """Calibrates and trains a fake-quantized copy of a detector.

    Batch normalisation keeps the float model's statistics: on little data, re-estimating them while training costs
    more accuracy than quantization does.

    Args:
        detector: The float model; it is also the teacher.
        dataset: The training split.
        recipe: Sections model, data, quantization and train.
        checkpoint: Resumable state, written after each epoch.
        key: Digest of everything that decides the result.
        progress: Called after each batch.

    Raises:
        InputError: If the scheme does not fit the architecture.
    """
    model = calibrated(detector, dataset, recipe, progress)
    section = recipe.train
    trained = fit(
        model,
        make_step(model, detector, section.loss),
        _groups(model, recipe),
        Loader.of(dataset, section, recipe.model.imgsz),
        Schedule.of(section),
        checkpoint=checkpoint,
        key=key,
        set_mode=model.eval,
        after_step=model.clamp_,
        progress=progress,
    )
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(trained.ema)
    return QatResult(model, raw, trained.history)


def calibrated(
    detector: Detector, dataset: DetectionDataset, recipe: Recipe, progress: Progress | None = None
) -> PreparedModel:
    """A prepared model whose scales were searched on the training split."""
    model = prepare(detector, recipe.quantization.scheme())
    images = min(recipe.data.calibration_images, len(dataset))
    done = 0

    def tick() -> None:
        nonlocal done
        done = min(done + _CALIBRATION_BATCH, images)
        if progress is not None:
            progress(done, images, "calibrating")

    batches = calibration_batches(dataset, images, recipe.model.imgsz, _CALIBRATION_BATCH, recipe.train.seed)
    calibrate(model, batches, tick)
    few = torch.cat(list(calibration_batches(dataset, _REFINING_IMAGES, recipe.model.imgsz, 1, recipe.train.seed)))
    refine_outputs(model, few, detector.decode, detections_loss)
    return model


def _groups(model: PreparedModel, recipe: Recipe) -> list[ParameterGroup]:
    """Weights, vectors, and one group for each quantizer.

    Adam moves every parameter by about its learning rate, whatever the gradient's size; scales differ by a factor of
    a hundred among themselves, so each gets a rate in proportion to where it starts.
    """
    section = recipe.train
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    known = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        ParameterGroup([p for p in rest if p.ndim > 1], section.lr, section.weight_decay),
        ParameterGroup([p for p in rest if p.ndim <= 1], section.lr),
    ]
    for quantizer in quantizers:
        learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
        groups.append(ParameterGroup(learned, section.scale_lr * quantizer.scale.mean().item()))
    return groups
