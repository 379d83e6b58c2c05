"""How `qyolo sensitivity` measures: the quantizers of a calibrated model, switched on one at a time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qyolo_deploy.artifact import sha256_file, sha256_json
from qyolo_deploy.console import Tick
from qyolo_deploy.data.dataset import digest_dataset, load_dataset, take_images
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.qat.train import calibrated
from qyolo_deploy.recipe import LossSection, Recipe, SensitivityMetric, SensitivitySection
from qyolo_deploy.stages.compare import prepared, spread
from qyolo_deploy.stages.compare_views import build_recipe
from qyolo_deploy.stages.sensitivity import Cost, Part, Sensitivity
from qyolo_deploy.stages.sensitivity_kept import Kept
from qyolo_deploy.stages.views import TorchRunner, eval_settings
from qyolo_deploy.training.loader import Loader
from qyolo_deploy.training.losses import make_step
from qyolo_deploy.validate.evaluate import evaluate
from qyolo_deploy.validate.parity import sqnr_db

_VERSION = 1
"""Raised when the same model, grids and images would give other numbers."""


def measure_build(
    build: Path, data: Path, images: int, metric: SensitivityMetric, progress: Tick | None, kept: Path | None
) -> Sensitivity:
    """See `sensitivity`."""
    section = SensitivitySection(metric=metric, images=images)
    return measure_float(build, build_recipe(build), load_dataset(data, "train"), data, section, progress, kept)


def measure_float(
    build: Path,
    recipe: Recipe,
    calibration: DetectionDataset,
    data: Path,
    section: SensitivitySection,
    progress: Tick | None,
    kept: Path | None,
) -> Sensitivity:
    """Measures the float model of a build.

    Args:
        build: Its folder.
        recipe: Its recipe.
        calibration: The images that set the scales.
        data: Dataset whose validation split is measured on.
        section: The metric, and how many images.
        progress: Called with steps done and in total.
        kept: File of what is measured already.

    Raises:
        InputError: The build has no float model yet, or `kept` cannot be written.
    """
    checkpoint = build / "float" / "model.safetensors"
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: is missing", hint="qyolo build --until float")
    dataset = load_dataset(data, "val")
    chosen = take_images(dataset, spread(dataset, section.images))
    detector = load_detector(checkpoint, None, None, 0)
    model = calibrated(detector, calibration, _as_searched(recipe), progress)
    known = Kept(kept, sha256_json([_VERSION, sha256_file(checkpoint), recipe.section("model")]))
    return measure(model, detector, chosen, recipe, section.metric, progress, known)


def _as_searched(recipe: Recipe) -> Recipe:
    """Without what makes up for quantization afterwards: it would be made up for where nothing is quantized."""
    return recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"start": "ranges"})})


def measure(
    model: PreparedModel,
    detector: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    metric: SensitivityMetric = "sqnr",
    progress: Tick | None = None,
    kept: Kept | None = None,
) -> Sensitivity:
    """The same for a calibrated model.

    Args:
        model: Its quantizers are switched off and on; they are left on.
        detector: The float model, whose decode and loss are used.
        dataset: The images to measure on, with their annotations.
        recipe: Sections model, validate and train.
        metric: See `sensitivity`.
        progress: Called with steps done and in total.
        kept: What is known already.
    """
    parts, known = parts_of(model), kept or Kept(None, "")
    scored = metric != "sqnr"
    total = len(dataset) + (len(parts) + 1 if scored else 0)
    tick = progress or (lambda *_: None)
    try:
        noise = _head_noise(model, parts, dataset, recipe, known, lambda done: tick(done, total, "head maps"))
        scores, baseline = dict.fromkeys(parts), None
        if scored:
            score = _scorer(model, detector, dataset, recipe, metric)
            decides = [metric, digest_dataset(dataset), asdict(eval_settings(recipe)) if metric == "map" else None]
            baseline = known.number([*decides, None], lambda: score(None))
            for done, (part, quantizer) in enumerate(parts.items(), start=len(dataset) + 1):
                tick(done, total, part.name)
                measured = known.number([*decides, grid_of(part, quantizer)], partial(score, quantizer))
                scores[part] = baseline - measured
            tick(total, total)
    finally:
        model.set_activations(True)
        model.set_weights(True)
    costs = [Cost(part, noise[part], scores[part]) for part in parts]
    costs.sort(key=lambda cost: cost.sqnr_db if cost.lost is None else -cost.lost)
    bits = {name: (layer.weight_bits or 0, _input_bits(model, name)) for name, layer in model.placement.layers.items()}
    return Sensitivity(metric, len(dataset), None if baseline is None else abs(baseline), tuple(costs), bits)


def parts_of(model: PreparedModel) -> dict[Part, Quantizer]:
    """All quantizers of a model: those of weights in order of execution, then those of activations."""
    found = {}
    for name, conv in model.convs().items():
        if conv.quantizer is not None:
            found[Part(name, "weights", conv.quantizer.spec.bits, (name,))] = conv.quantizer
    groups, inputs = model.placement.groups, model.placement.inputs
    for group, quantizer in model.quantizers().items():
        readers = tuple(layer for layer, source in inputs.items() if groups[source] == group)
        found[Part(group, "activations", quantizer.spec.bits, readers)] = quantizer
    return found


def grid_of(part: Part, quantizer: Quantizer) -> list[Any]:
    """Plain data that tell what a quantizer rounds, and to what."""
    ends = [tensor.detach().cpu().tolist() for tensor in (quantizer.scale, quantizer.offset)]
    return [part.kind, part.name, asdict(quantizer.spec), *ends]


def _input_bits(model: PreparedModel, layer: str) -> int:
    placement = model.placement
    return placement.specs[placement.groups[placement.inputs[layer]]].bits


@contextlib.contextmanager
def _only(model: PreparedModel, quantizer: Quantizer | None) -> Iterator[None]:
    """Everything in float but what one quantizer rounds."""
    model.set_activations(False)
    model.set_weights(False)
    if quantizer is not None:
        quantizer.enabled = True
    with torch.no_grad():
        yield


def _head_noise(
    model: PreparedModel,
    parts: Mapping[Part, Quantizer],
    dataset: DetectionDataset,
    recipe: Recipe,
    kept: Kept,
    tick: Callable[[int], None],
) -> dict[Part, float]:
    """SQNR of the raw head maps for each part; the images go by one after the other, so that they need no memory."""
    signal, noise = 0.0, dict.fromkeys(parts, 0.0)
    rect = recipe.validate_.rect
    tensors = prepared(dataset, recipe.model.imgsz, rect)
    for done, (record, image) in enumerate(zip(dataset.images, tensors, strict=True), start=1):
        maps = _HeadMaps(model, torch.from_numpy(image))
        decides = ["head maps", sha256_file(record.path), rect]
        signal += kept.number([*decides, None], maps.power)
        for part, quantizer in parts.items():
            noise[part] += kept.number([*decides, grid_of(part, quantizer)], partial(maps.noise, quantizer))
        tick(done)
    return {part: sqnr_db(signal, value) for part, value in noise.items()}


class _HeadMaps:
    """The raw head maps of one image, which are computed in float when they are first asked for."""

    def __init__(self, model: PreparedModel, image: Tensor) -> None:
        self._model, self._image = model, image

    @cached_property
    def _in_float(self) -> Sequence[Tensor]:
        return self._with(None)

    def _with(self, quantizer: Quantizer | None) -> Sequence[Tensor]:
        with _only(self._model, quantizer):
            maps: Sequence[Tensor] = self._model(self._image)
            return maps

    def power(self) -> float:
        """Sum of their squares."""
        return sum(_power(level) for level in self._in_float)

    def noise(self, quantizer: Quantizer) -> float:
        """Sum of the squares of what a quantizer changes."""
        return sum(_power(one - two) for one, two in zip(self._with(quantizer), self._in_float, strict=True))


def _power(values: Tensor) -> float:
    return float(values.double().square().sum())


def _scorer(
    model: PreparedModel, detector: Detector, dataset: DetectionDataset, recipe: Recipe, metric: SensitivityMetric
) -> Callable[[Quantizer | None], float]:
    """A function that tells how good the model is with one quantizer, or with none; more is better."""
    if metric == "map":
        runner, settings = TorchRunner(lambda images: detector.decode(model(images))), eval_settings(recipe)

        def score() -> float:
            return evaluate(runner, dataset, settings)[0].map50_95
    else:
        loader = Loader(dataset, imgsz=recipe.model.imgsz, batch=1, augment=None, images=None, workers=0, seed=0)
        step = make_step(model, detector, LossSection(labels=1.0, logits=0.0, detections=0.0))

        def score() -> float:
            return -sum(float(step(batch)[0]) for batch in loader.epoch(0)) / len(loader)

    def score_with(quantizer: Quantizer | None) -> float:
        with _only(model, quantizer):
            return score()

    return score_with
