"""Stage `correct`: quantization correction of the trained model, folded."""

import json
import shutil

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import IntegrityError
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.qat.train import student
from qyolo_deploy.qc.correct import correct
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.training.state import load_tensors


def run(context: StageContext) -> StageOutput:
    """Writes the integers that are exported; without correction they are those of training."""
    folder, trained = context.folder / "correct", context.folder / "train"
    folder.mkdir(exist_ok=True)
    target = folder / "model.safetensors"
    if not context.recipe.correct.enabled:
        shutil.copyfile(trained / "model.safetensors", target)
        return StageOutput("quantized_model", [target], {"epochs": []})
    dataset = context.training_data()
    detector = load_detector(context.folder / "float" / "model.safetensors", None, None, 0)
    model = student(detector, context.recipe)
    state = load_tensors(trained / "ema.safetensors")
    if state is None:
        raise IntegrityError(f"{trained / 'ema.safetensors'}: not readable; build again with --force train")
    model.load_state_dict(state[0])
    with context.reporter.progress("correcting") as tick:
        history = correct(
            model,
            detector,
            dataset,
            context.recipe,
            checkpoint=folder / "checkpoint.safetensors",
            key=context.key,
            progress=tick,
        )
    freeze(model, context.lineage()).save(target)
    write_atomic(folder / "history.json", json.dumps(history, indent=1))
    # The history tells wall times, by which the artifact's digest would be another one each time.
    return StageOutput("quantized_model", [target], {"epochs": list(history)})
