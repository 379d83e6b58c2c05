"""Stage `train`: quantization-aware training."""

import json
import math

import numpy as np
import torch
from numpy.typing import NDArray

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import detector_of, load_detector
from qyolo_deploy.qat.train import QatResult, train_qat
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.stages.follow import call_others
from qyolo_deploy.training.loader import calibration_batches
from qyolo_deploy.training.state import save_tensors
from qyolo_deploy.validate.evaluate import EvalSettings, evaluate

_SQNR_IMAGES = 4


def join(context: StageContext) -> QatResult:
    """The training itself, in which all processes of a distributed build take part."""
    detector = load_detector(context.folder / "float" / "model.safetensors", None, None, 0)
    with context.reporter.progress("training") as tick:
        return train_qat(
            detector,
            context.training_data(),
            context.recipe,
            checkpoint=context.folder / "train" / "checkpoint.safetensors",
            key=context.key,
            evaluate=lambda model, teacher: _map(context, model, teacher),
            progress=tick,
        )


def _map(context: StageContext, model: PreparedModel, detector: Detector) -> float:
    """mAP50-95 of the model as it is on the validation split."""
    recipe = context.recipe

    def runner(images: NDArray[np.float32], /) -> NDArray[np.float32]:
        with torch.no_grad():
            output: NDArray[np.float32] = detector.decode(model(torch.from_numpy(images))).numpy()
        return output

    settings = EvalSettings(
        imgsz=recipe.model.imgsz,
        conf=recipe.validate_.conf,
        iou=recipe.validate_.iou,
        max_det=recipe.validate_.max_det,
        rect=recipe.validate_.rect,
    )
    return evaluate(runner, load_dataset(context.dataset, "val"), settings)[0].map50_95


def _sqnr_without_inner(context: StageContext, quantized: QuantizedModel, inner: frozenset[str]) -> float:
    """How near the head maps of a runtime that does not round inside activations come to the trained ones, in dB."""
    detector = detector_of(quantized.architecture)
    full, fused = (simulate(detector, quantized, left_out).core for left_out in (frozenset[str](), inner))
    section = context.recipe
    images = next(
        iter(calibration_batches(context.training_data(), _SQNR_IMAGES, section.model.imgsz, _SQNR_IMAGES, 0))
    )
    with torch.no_grad():
        pairs = list(zip(full(images), fused(images), strict=True))
    signal = sum(float(one.square().sum()) for one, _ in pairs)
    noise = sum(float((one - two).square().sum()) for one, two in pairs)
    return round(10 * math.log10(signal / max(noise, 1e-12)), 2)


def run(context: StageContext) -> StageOutput:
    """Writes the integers of the EMA model, and both the raw and the EMA state that they may be made from again."""
    folder = context.folder / "train"
    folder.mkdir(exist_ok=True)
    call_others("train", context)
    result = join(context)
    quantized = freeze(result.model, context.lineage())
    quantized.save(folder / "model.safetensors")
    save_tensors(folder / "raw.safetensors", result.raw, {"state": "raw"})
    save_tensors(folder / "ema.safetensors", result.model.state_dict(), {"state": "ema"})
    write_atomic(folder / "history.json", json.dumps(result.history, indent=1))
    write_atomic(folder / "diagnostics.json", json.dumps(result.diagnostics.to_json()))
    # The history tells wall times, by which the artifact's digest would be another one each time.
    names = ("model.safetensors", "raw.safetensors", "ema.safetensors", "diagnostics.json")
    placement = result.model.placement
    info = {
        "epochs": list(result.history),
        "scheme": quantized.scheme,
        "oscillating": result.diagnostics.oscillating,
        "inner": sorted(placement.inner),
        "inner_sqnr_db": _sqnr_without_inner(context, quantized, placement.inner) if placement.inner else None,
        "layers": [
            {
                "name": name,
                "weight_bits": layer.weight_bits,
                "activation_bits": placement.specs[placement.groups[placement.inputs[name]]].bits,
            }
            for name, layer in placement.layers.items()
        ],
        "float_layers": sorted(set(result.model.convs()) - set(placement.layers)),
    }
    return StageOutput("quantized_model", [folder / name for name in names], info)
