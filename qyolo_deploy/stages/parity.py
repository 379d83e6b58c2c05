"""Parity of a build's engines with the fake-quantized model, by layer: what `report.json` tells of it."""

from pathlib import Path

from qyolo_deploy.data.dataset import take_images
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.stages.compare import compare_sources, prepared, spread
from qyolo_deploy.stages.compare_views import FAKE_QUANTIZED, open_engine_view
from qyolo_deploy.stages.context import StageContext
from qyolo_deploy.stages.tensors_torch import quantized_tensors
from qyolo_deploy.validate.parity import Parity


def engines_parity(context: StageContext, dataset: DetectionDataset) -> dict[str, Parity]:
    """View -> its tensors against those of the fake-quantized model, on a few images; empty where none are wanted.

    Engines that cannot be looked into are left out.
    """
    recipe = context.recipe
    found: dict[str, Parity] = {}
    if not recipe.validate_.parity_images:
        return {}
    chosen = take_images(dataset, spread(dataset, recipe.validate_.parity_images))
    quantized = QuantizedModel.load(context.folder / "correct" / "model.safetensors")
    engines: dict[str, str] = context.artifacts["export"].info["engines"]
    with context.reporter.progress("comparing layers") as tick:
        for view in (target for target in recipe.export.targets if target in engines):
            source = open_engine_view(view, context.folder / Path(engines[view]))
            if source is None:
                continue
            reference = quantized_tensors(FAKE_QUANTIZED, quantized)
            images = prepared(chosen, recipe.model.imgsz, recipe.validate_.rect)
            found[view] = compare_sources(reference, source, images, len(chosen), progress=tick)
    return found
