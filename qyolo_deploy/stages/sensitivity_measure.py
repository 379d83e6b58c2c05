"""How `qyolo sensitivity` measures: the quantizers of a calibrated model, switched on one at a time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qyolo_deploy.console import Tick
from qyolo_deploy.data.dataset import load_dataset, take_images
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.errors import InputError
from qyolo_deploy.graph.fake_quantize import Quantizer
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.qat.train import calibrated
from qyolo_deploy.recipe import LossSection, Recipe
from qyolo_deploy.stages.compare import prepared, spread
from qyolo_deploy.stages.compare_views import build_recipe
from qyolo_deploy.stages.sensitivity import Cost, Metric, Part, Sensitivity
from qyolo_deploy.stages.views import TorchRunner, eval_settings
from qyolo_deploy.training.loader import Loader
from qyolo_deploy.training.losses import make_step
from qyolo_deploy.validate.evaluate import evaluate
from qyolo_deploy.validate.parity import sqnr_db


def measure_build(build: Path, data: Path, images: int, metric: Metric, progress: Tick | None) -> Sensitivity:
    """See `sensitivity`."""
    recipe = build_recipe(build)
    checkpoint = build / "float" / "model.safetensors"
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: is missing", hint="qyolo build --until float")
    dataset = load_dataset(data, "val")
    chosen = take_images(dataset, spread(dataset, images))
    detector = load_detector(checkpoint, None, None, 0)
    model = calibrated(detector, load_dataset(data, "train"), _as_searched(recipe), progress)
    return measure(model, detector, chosen, recipe, metric, progress)


def _as_searched(recipe: Recipe) -> Recipe:
    """Without what makes up for quantization afterwards: it would be made up for where nothing is quantized."""
    return recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"start": "ranges"})})


def measure(
    model: PreparedModel,
    detector: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    metric: Metric = "sqnr",
    progress: Tick | None = None,
) -> Sensitivity:
    """The same for a calibrated model.

    Args:
        model: Its quantizers are switched off and on; they are left on.
        detector: The float model, whose decode and loss are used.
        dataset: The images to measure on, with their annotations.
        recipe: Sections model, validate and train.
        metric: See `sensitivity`.
        progress: Called with steps done and in total.
    """
    parts = parts_of(model)
    scored = metric != "sqnr"
    total = len(dataset) + (len(parts) + 1 if scored else 0)
    tick = progress or (lambda *_: None)
    try:
        noise = _head_noise(model, parts, dataset, recipe, lambda done: tick(done, total, "head maps"))
        scores, baseline = dict.fromkeys(parts), None
        if scored:
            score = _scorer(model, detector, dataset, recipe, metric)
            with _only(model, None):
                baseline = score()
            for done, (part, quantizer) in enumerate(parts.items(), start=len(dataset) + 1):
                tick(done, total, part.name)
                with _only(model, quantizer):
                    scores[part] = baseline - score()
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
    tick: Callable[[int], None],
) -> dict[Part, float]:
    """SQNR of the raw head maps for each part; the images go by one after the other, so that they need no memory."""
    signal, noise = 0.0, dict.fromkeys(parts, 0.0)
    for done, image in enumerate(prepared(dataset, recipe.model.imgsz, recipe.validate_.rect), start=1):
        tensor = torch.from_numpy(image)
        with _only(model, None):
            wanted = model(tensor)
        signal += sum(_power(level) for level in wanted)
        for part, quantizer in parts.items():
            with _only(model, quantizer):
                maps = model(tensor)
            noise[part] += sum(_power(one - two) for one, two in zip(maps, wanted, strict=True))
        tick(done)
    return {part: sqnr_db(signal, value) for part, value in noise.items()}


def _power(values: Tensor) -> float:
    return float(values.double().square().sum())


def _scorer(
    model: PreparedModel, detector: Detector, dataset: DetectionDataset, recipe: Recipe, metric: Metric
) -> Callable[[], float]:
    """A function that tells how good the model is in its present state; more is better."""
    if metric == "map":
        runner, settings = TorchRunner(lambda images: detector.decode(model(images))), eval_settings(recipe)
        return lambda: evaluate(runner, dataset, settings)[0].map50_95
    loader = Loader(dataset, imgsz=recipe.model.imgsz, batch=1, augment=None, images=None, workers=0, seed=0)
    step = make_step(model, detector, LossSection(labels=1.0, logits=0.0, detections=0.0))
    return lambda: -sum(float(step(batch)[0]) for batch in loader.epoch(0)) / len(loader)
