"""Stage `float`: the float detector, read from a checkpoint or trained on the recipe's data."""

import json

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.errors import InputError
from qyolo_deploy.models.base import Detector
from qyolo_deploy.models.checkpoint import read_checkpoint, write_float_checkpoint
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.stages.context import StageContext, StageOutput


def run(context: StageContext) -> StageOutput:
    """Writes `float/model.safetensors`, whatever the checkpoint's format was."""
    recipe, folder = context.recipe, context.folder / "float"
    dataset = load_dataset(context.dataset, "train")
    detector = load_detector(context.weights, context.architecture, dataset.class_names, recipe.float.seed)
    history: tuple[dict[str, object], ...] = ()
    if recipe.float.epochs:
        from qyolo_deploy.qat.train_float import train_float
        from qyolo_deploy.training.device import training_device

        folder.mkdir(exist_ok=True)
        with context.reporter.progress("float training") as tick:
            history = train_float(
                detector,
                dataset,
                recipe,
                checkpoint=folder / "checkpoint.safetensors",
                key=context.key,
                device=training_device(context.device),
                progress=tick,
            )
    else:
        _check_classes(context, detector, dataset.class_names)
    model = folder / "model.safetensors"
    write_float_checkpoint(model, detector.spec, detector.core.state_dict())
    write_atomic(folder / "history.json", json.dumps(history, indent=1))
    parameters = sum(parameter.numel() for parameter in detector.core.parameters())
    info = {"spec": detector.spec.to_json(), "parameters": parameters, "epochs": list(history)}
    # The history tells wall times, by which the artifact's digest would be another one each time.
    return StageOutput("float_model", [model], info)


def _check_classes(context: StageContext, detector: Detector, names: tuple[str, ...]) -> None:
    """A checkpoint that is not trained further must already know the dataset's classes."""
    if context.weights is None:
        raise InputError(
            f"recipe '{context.recipe.name}': model.weights is missing and float.epochs is 0",
            hint="Name a checkpoint, or train with float.epochs.",
        )
    known = read_checkpoint(context.weights).spec.names
    if detector.not_taken or known != names:
        raise InputError(
            f"{context.weights}: its {len(known)} classes are not the {len(names)} of {context.dataset}",
            hint="Train on the dataset's classes with float.epochs.",
        )
