"""Quantization correction: learn gain and shift behind each quantized convolution, to be folded away."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qyolo_deploy.data.dataset import DetectionDataset
from qyolo_deploy.graph.layers import QuantConv
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.models.base import Detector
from qyolo_deploy.recipe import CorrectSection, Recipe
from qyolo_deploy.training.device import CPU, placed
from qyolo_deploy.training.loader import Loader
from qyolo_deploy.training.loop import ParameterGroup, Progress, Schedule, fit
from qyolo_deploy.training.losses import make_step


def correct(
    model: PreparedModel,
    detector: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    *,
    checkpoint: Path,
    key: str,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], ...]:
    """Learns `gain * h + shift` behind every quantized convolution, all else fixed.

    Gupta and Asthana, 2311.05109, section 3: Adam, from gain 1 and shift 0, on a subset of the training split. The
    gain is the exponential of what is learned, so it stays positive and folds into a scale. The first layer is
    corrected too, so nothing that does not change is computed twice.

    Args:
        model: A calibrated or trained model; changed in place.
        detector: The float model.
        dataset: The training split; the subset is drawn from it by seed.
        recipe: Sections model and correct.
        checkpoint: Resumable state.
        key: Digest of everything that decides the result.
        device: Where it learns.
        progress: Called after each batch.

    Returns:
        One record an epoch, with images per second.
    """
    section = recipe.correct
    loader = Loader(
        dataset,
        imgsz=recipe.model.imgsz,
        batch=section.batch,
        augment=None,
        images=section.images,
        workers=0,
        seed=section.seed,
    )
    schedule = Schedule(epochs=section.epochs, warmup_epochs=0.0, final_lr=0.01, ema_decay=0.0, optimizer="adam")
    with placed(device, model, detector):
        trained = fit(
            model,
            make_step(model, detector, section.loss),
            [ParameterGroup(corrections(model, section), section.lr)],
            loader,
            schedule,
            checkpoint=checkpoint,
            key=key,
            set_mode=model.eval,
            progress=progress,
        )
    return trained.history


def corrections(model: PreparedModel, section: CorrectSection) -> list[nn.Parameter]:
    """The gains and shifts that learn; every other parameter of the model stops learning.

    Args:
        model: Changed in place: requires_grad of all parameters.
        section: Whether gain, shift or both learn, and whether each channel has its own.
    """
    model.requires_grad_(False)
    learned = [
        parameter
        for conv in model.convs().values()
        if conv.quantizer is not None
        for parameter in _of_layer(conv, section)
    ]
    for parameter in learned:
        parameter.requires_grad_(True)
        if section.granularity == "per_tensor":
            parameter.register_hook(_share)  # type: ignore[no-untyped-call]
    return learned


def _of_layer(conv: QuantConv, section: CorrectSection) -> list[nn.Parameter]:
    chosen = {"gain": [conv.log_gain], "shift": [conv.shift], "both": [conv.log_gain, conv.shift]}
    return chosen[section.learn]


def _share(gradient: Tensor) -> Tensor:
    """The gradient of one number that all channels share; equal steps keep it shared."""
    return torch.full_like(gradient, gradient.sum().item())
