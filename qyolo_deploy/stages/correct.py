"""Stage `correct`: quantization correction of the trained model, folded."""

import json
from pathlib import Path

import numpy as np

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import IntegrityError
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.graph.prepare import PreparedModel
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.qat.train import student
from qyolo_deploy.qc.correct import correct
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.training.device import training_device
from qyolo_deploy.training.state import load_tensors


def run(context: StageContext) -> StageOutput:
    """Writes the integers that are exported; without correction they are those of training."""
    folder = context.folder / "correct"
    folder.mkdir(exist_ok=True)
    target = folder / "model.safetensors"
    detector = load_detector(context.folder / "float" / "model.safetensors", None, None, 0)
    model = trained(context, detector)
    before = freeze(model, context.lineage())
    if not context.recipe.correct.enabled:
        before.save(target)
        return StageOutput("quantized_model", [target], {"epochs": []})
    with context.reporter.progress("correcting") as tick:
        history = correct(
            model,
            detector,
            context.calibration_data(),
            context.recipe,
            checkpoint=folder / "checkpoint.safetensors",
            key=context.key,
            device=training_device(context.device),
            progress=tick,
        )
    after = freeze(model, context.lineage())
    after.save(target)
    write_atomic(folder / "history.json", json.dumps(history, indent=1))
    # The history tells wall times, by which the artifact's digest would be another one each time.
    info = {"epochs": list(history), "requantized_channels": _requantized_channels(before, after)}
    return StageOutput("quantized_model", [target], info)


def _requantized_channels(before: QuantizedModel, after: QuantizedModel) -> int:
    """Channels whose integers are not those of training: none but dead ones, whose bias needs a coarser grid."""
    return sum(
        int(np.any(layer.weight != after.layers[name].weight, axis=(1, 2, 3)).sum())
        for name, layer in before.layers.items()
    )


def state_file(context: StageContext) -> Path:
    """The state of training that the recipe corrects or takes over as it is."""
    return context.folder / "train" / f"{context.recipe.correct.state}.safetensors"


def trained(context: StageContext, detector: Detector) -> PreparedModel:
    """The model in that state."""
    file = state_file(context)
    model = student(detector, context.recipe)
    state = load_tensors(file)
    if state is None:
        raise IntegrityError(f"{file}: not readable; build again with --force train")
    model.load_state_dict(state[0])
    return model
