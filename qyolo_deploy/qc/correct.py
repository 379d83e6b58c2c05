"""Quantization correction: learn gain and shift behind each quantized convolution, to be folded away."""

from pathlib import Path
from typing import Any

from torch import nn

from qyolo_deploy.data.dataset import DetectionDataset
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.models.base import Detector
from qyolo_deploy.recipe import Recipe
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
    progress: Progress | None = None,
) -> tuple[dict[str, Any], ...]:
    """Learns `gain * h + shift` per output channel, all else fixed (Gupta and Asthana, 2311.05109, section 3).

    The gain is the exponential of what is learned, so it stays positive and folds into a scale.

    Args:
        model: A calibrated or trained model; changed in place.
        detector: The float model.
        dataset: The training split; the subset is drawn from it by seed.
        recipe: Sections model and correct.
        checkpoint: Resumable state.
        key: Digest of everything that decides the result.
        progress: Called after each batch.

    Returns:
        One record an epoch.
    """
    section = recipe.correct
    model.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for conv in model.convs().values():
        if conv.quantizer is not None:
            parameters += [conv.log_gain, conv.shift]
    for parameter in parameters:
        parameter.requires_grad_(True)
    loader = Loader(
        dataset,
        imgsz=recipe.model.imgsz,
        batch=section.batch,
        augment=None,
        images=section.images,
        workers=0,
        seed=section.seed,
    )
    trained = fit(
        model,
        make_step(model, detector, section.loss),
        [ParameterGroup(parameters, section.lr)],
        loader,
        Schedule(epochs=section.epochs, warmup_epochs=0.0, final_lr=0.01, ema_decay=0.0),
        checkpoint=checkpoint,
        key=key,
        set_mode=model.eval,
        progress=progress,
    )
    return trained.history
