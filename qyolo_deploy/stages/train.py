"""Stage `train`: quantization-aware training."""

import json

from qyolo_deploy.artifact import converts_bfloat16
from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.graph.freeze import freeze
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.qat.train import QatResult, train_qat
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.stages.follow import call_others
from qyolo_deploy.stages.views import TorchRunner, eval_settings
from qyolo_deploy.training.device import training_device
from qyolo_deploy.training.state import save_tensors
from qyolo_deploy.validate.evaluate import evaluate


def join(context: StageContext) -> QatResult:
    """The training itself, in which all processes of a distributed build take part."""
    detector = load_detector(context.folder / "float" / "model.safetensors", None, None, 0)
    device = training_device(context.device)
    if context.recipe.train.precision == "bfloat16" and device.type == "cpu" and converts_bfloat16():
        context.reporter.note(
            "  this processor computes bfloat16 by way of float32, which takes several times as long; "
            "--set train.precision=float32"
        )
    with context.reporter.progress("training") as tick:
        return train_qat(
            detector,
            context.training_data(),
            context.recipe,
            checkpoint=context.folder / "train" / "checkpoint.safetensors",
            key=context.key,
            calibration=context.calibration_data(),
            evaluate=lambda model, teacher: (
                evaluate(
                    TorchRunner(lambda images: teacher.decode(model(images.to(device))).cpu()),
                    load_dataset(context.dataset, "val"),
                    eval_settings(context.recipe),
                )[0].map50_95
            ),
            device=device,
            progress=tick,
        )


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
