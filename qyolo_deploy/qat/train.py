"""Quantization-aware training: from a float detector to a trained, EMA-smoothed quantized one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qyolo_deploy.data.dataset import DetectionDataset
from qyolo_deploy.graph.fake_quantize import GradientRules, Quantizer
from qyolo_deploy.graph.moments import match_moments
from qyolo_deploy.graph.observers import calibrate, refine_outputs
from qyolo_deploy.graph.prepare import PreparedModel, prepare
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import with_activation
from qyolo_deploy.qat.diagnostics import Diagnostics
from qyolo_deploy.qat.hooks import QatHooks
from qyolo_deploy.qat.norms import reestimate, use_batch_statistics
from qyolo_deploy.qat.rounding import LearnedRounding
from qyolo_deploy.recipe import Recipe
from qyolo_deploy.training import distributed
from qyolo_deploy.training.device import CPU, placed
from qyolo_deploy.training.loader import Loader, calibration_batches
from qyolo_deploy.training.loop import ParameterGroup, Progress, Schedule, fit
from qyolo_deploy.training.losses import detections_loss, make_step

_CALIBRATION_BATCH = 8
_REFINING_IMAGES = 2
_MATCHING_PIXELS = 16 * 640**2  # as many as fit the memory of a small machine with all activations
_NORM_MOMENTUM = 0.03  # ultralytics' for batch normalisation


@dataclass(frozen=True)
class QatResult:
    """A trained model: it holds the EMA state; the raw state lies beside it."""

    model: PreparedModel
    raw: Mapping[str, Tensor]
    history: tuple[dict[str, Any], ...]
    diagnostics: Diagnostics


def train_qat(
    detector: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    *,
    checkpoint: Path,
    key: str,
    calibration: DetectionDataset | None = None,
    evaluate: Callable[[PreparedModel, Detector], float] | None = None,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> QatResult:
    """Calibrates and trains a fake-quantized copy of a detector.

    Batch normalisation by default keeps the float model's statistics: on little data, following the batches' costs
    more accuracy than quantization does.

    Args:
        detector: The float model; it is also the teacher.
        dataset: The training split, with unlabelled images behind it if there are any.
        recipe: Sections model, data, quantization, train and export (whose targets decide the placement).
        checkpoint: Resumable state, written after each epoch.
        key: Digest of everything that decides the result.
        calibration: Images that set the first scales; by default those of `dataset`.
        evaluate: mAP of a model; needed for early stopping.
        device: Where it trains; everything before and after happens on the processor.
        progress: Called after each batch.

    Raises:
        InputError: If the scheme does not fit the architecture.
    """
    model = calibrated(detector, calibration or dataset, recipe, progress)
    section = recipe.train
    loader = Loader.of(dataset, section, recipe.model.imgsz, distributed.shard())
    hooks = QatHooks(model, section, section.epochs * len(loader))

    def set_mode() -> None:
        model.eval()
        use_batch_statistics(model, _NORM_MOMENTUM if section.norm == "batch" else None)

    def measure() -> float:
        use_batch_statistics(model, None)
        model.set_activations(True)  # also in the stage that trains with the backbone's alone
        model.set_weights(True)
        assert evaluate is not None
        return evaluate(model, detector)

    _set_rules(model, recipe)
    with placed(device, model, detector):
        trained = fit(
            model,
            make_step(model, detector, section.loss),
            parameter_groups(model, recipe),
            loader,
            Schedule.of(section),
            checkpoint=checkpoint,
            key=key,
            set_mode=set_mode,
            hooks=hooks,
            evaluate=measure,
            progress=progress,
        )
    use_batch_statistics(model, None)
    averaged = {name: value.clone() for name, value in trained.ema.items()}
    diagnostics = Diagnostics.of(model, hooks)
    raw, _ = _settle(model, hooks, dict(model.state_dict()), dataset, recipe)
    model.tracker = hooks.tracker
    _, divergences = _settle(model, hooks, averaged, dataset, recipe)
    return QatResult(model, raw, trained.history, diagnostics.with_norms(divergences))


def _settle(
    model: PreparedModel, hooks: QatHooks, state: Mapping[str, Tensor], dataset: DetectionDataset, recipe: Recipe
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Loads a state, ends its freezing and re-estimates its statistics; returns it and the divergences of these."""
    model.load_state_dict(state)
    hooks.finish()
    divergences: dict[str, float] = {}
    if recipe.train.reestimate_norm:
        divergences = reestimate(model, _norm_batches(dataset, recipe))
    return {name: value.clone() for name, value in model.state_dict().items()}, divergences


def _norm_batches(dataset: DetectionDataset, recipe: Recipe) -> list[Tensor]:
    section = recipe.train
    count = section.reestimate_norm * section.batch
    batches = calibration_batches(dataset, count, recipe.model.imgsz, section.batch, section.seed)
    return [batch for batch in batches if len(batch) == section.batch][: section.reestimate_norm]


def student(detector: Detector, recipe: Recipe) -> PreparedModel:
    """The fake-quantized copy as the recipe wants it: its activations, and quantizers where its targets need them."""
    copy = detector if recipe.model.activation is None else with_activation(detector, recipe.model.activation)
    return prepare(copy, recipe.quantization.scheme(), inside_activations="onnxruntime" in recipe.export.targets)


def calibrated(
    detector: Detector, dataset: DetectionDataset, recipe: Recipe, progress: Progress | None = None
) -> PreparedModel:
    """A prepared model whose scales were searched on the training split."""
    model = student(detector, recipe)
    images = min(recipe.data.calibration_images, len(dataset))
    done = 0

    def tick() -> None:
        nonlocal done
        done = min(done + _CALIBRATION_BATCH, images)
        if progress is not None:
            progress(done, images, "calibrating")

    batches = calibration_batches(dataset, images, recipe.model.imgsz, _CALIBRATION_BATCH, recipe.train.seed)
    calibrate(model, batches, tick, recipe.quantization.observer)
    few = torch.cat(list(calibration_batches(dataset, _REFINING_IMAGES, recipe.model.imgsz, 1, recipe.train.seed)))
    refine_outputs(model, few, detector.decode, detections_loss)
    if recipe.quantization.start != "ranges":
        shown = min(max(1, _MATCHING_PIXELS // recipe.model.imgsz**2), images)
        batch = calibration_batches(dataset, shown, recipe.model.imgsz, shown, recipe.train.seed)
        match_moments(model, detector, next(iter(batch)), recipe.quantization.start == "compensated")
    return model


def _set_rules(model: PreparedModel, recipe: Recipe) -> None:
    """Latent damping is for weights alone."""
    section = recipe.train.gradient
    rules = GradientRules(section.lsq_scale, section.margin)
    for quantizer in model.quantizers().values():
        quantizer.rules = rules
    for conv in model.convs().values():
        if conv.quantizer is not None:
            conv.quantizer.rules = GradientRules(section.lsq_scale, section.margin, section.latent_damping)


def parameter_groups(model: PreparedModel, recipe: Recipe) -> list[ParameterGroup]:
    """Weights, vectors, one group for each quantizer, and the logits of learned roundings if the tracker has any.

    Adam moves every parameter by about its learning rate, whatever the gradient's size; scales differ by a factor of
    a hundred among themselves, so each gets a rate in proportion to where it starts.
    """
    section = recipe.train
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    logits = [*model.tracker.logits] if isinstance(model.tracker, LearnedRounding) else []
    known = {id(parameter) for module in quantizers for parameter in module.parameters()} | {id(p) for p in logits}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        ParameterGroup([p for p in rest if p.ndim > 1], section.lr, section.weight_decay),
        ParameterGroup([p for p in rest if p.ndim <= 1], section.lr),
    ]
    for quantizer in quantizers:
        learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
        if learned:
            groups.append(ParameterGroup(learned, section.scale_lr * quantizer.scale.mean().item()))
    if section.rounding is not None and logits:
        # All rates follow one cosine; this one is told for the point where the logits begin to learn.
        share = Schedule.of(section).cosine(section.rounding.start, 1)
        groups.append(ParameterGroup(logits, section.rounding.lr / share))
    return groups
