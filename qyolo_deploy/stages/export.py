"""Stage `export`: the float baseline and an engine for each target."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qyolo_deploy import __version__
from qyolo_deploy.artifact import saturates_products
from qyolo_deploy.atomic import atomic_dir, atomic_path
from qyolo_deploy.engines.base import OPENVINO_SUFFIX, engine_files
from qyolo_deploy.engines.heads import METADATA_KEY
from qyolo_deploy.engines.openvino import build_openvino
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.export.heads import expose_heads
from qyolo_deploy.export.metadata import engine_metadata, set_metadata, tell_nms
from qyolo_deploy.export.nms import suppress
from qyolo_deploy.export.openvino_passes import ir_passes
from qyolo_deploy.export.qdq import insert_qdq
from qyolo_deploy.export.saturation import low_bit_activations
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.models.registry import detector_of, load_detector
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.stages.tensorrt import TensorRtExport, export_tensorrt

_FINE_BITS = 8


def run(context: StageContext) -> StageOutput:
    """Writes `engines/onnxruntime/*.onnx`, `engines/openvino/*_openvino_model/` and `engines/tensorrt/`."""
    recipe = context.recipe
    detector = load_detector(context.folder / "float" / "model.safetensors", None, None, 0)
    quantized = QuantizedModel.load(context.folder / "correct" / "model.safetensors")
    metadata = engine_metadata(detector.spec, recipe, __version__)
    _warn_of_saturation(context, quantized)
    with context.reporter.progress("exporting") as tick:
        steps = 2 + len(recipe.export.targets)
        tick(0, steps, "float graph")
        model = export_float(fold_float(detector), recipe.model.imgsz, recipe.export.dynamic)
        set_metadata(model, metadata)
        engines = {"float": _save(model, _onnx_path(context, "fp32"))}
        if recipe.model.activation is not None:  # another graph, which is what was trained and what is quantized
            swapped = fold_float(detector_of(quantized.architecture))
            model = export_float(swapped, recipe.model.imgsz, recipe.export.dynamic)
            set_metadata(model, metadata)
        if recipe.export.head == "raw":
            model = expose_heads(model, fold_float(detector_of(quantized.architecture)))
            metadata[METADATA_KEY] = model.metadata_props[METADATA_KEY]
        if (nms := recipe.export.nms) is not None:  # the baseline stays what other engines are compared with
            model, metadata = suppress(model, nms.conf, nms.iou, nms.max_det), tell_nms(metadata, nms)
            set_metadata(model, metadata)
        for done, target in enumerate((target for target in recipe.export.targets if target in _EXPORTERS), start=1):
            tick(done, steps, target)
            engines[target] = _EXPORTERS[target](context, model, quantized, metadata)
        tick(steps, steps)
    tensorrt = None
    if "tensorrt" in recipe.export.targets:
        inner = _left_out(context, quantized, "tensorrt")
        tensorrt = export_tensorrt(context, model, quantized, metadata, inner)
    files = [file for path in engines.values() for file in engine_files(path)]
    files += [] if tensorrt is None else tensorrt.files
    engines |= {} if tensorrt is None else tensorrt.engines
    relative = {view: path.relative_to(context.folder).as_posix() for view, path in engines.items()}
    return StageOutput(
        "engines",
        files,
        {
            "engines": relative,
            "low_bit_activations": _low_bit(context, model, quantized),
            "wide_layers": len(quantized.wide_layers),
            "left_out": {target: len(_left_out(context, quantized, target)) for target in recipe.export.targets},
            **({} if tensorrt is None else {"tensorrt": _tensorrt_info(context, tensorrt)}),
        },
    )


def _warn_of_saturation(context: StageContext, quantized: QuantizedModel) -> None:
    """ONNX Runtime can be told to take other kernels, which our runner does; OpenVINO cannot."""
    if "openvino" in context.recipe.export.targets and quantized.wide_layers and saturates_products():
        context.reporter.note(
            f"  {len(quantized.wide_layers)} layers have weights beyond 64, whose products OpenVINO adds in 16 bits on "
            "this processor, which saturate; set quantization.weights.reduce_range to true"
        )


def _tensorrt_info(context: StageContext, tensorrt: TensorRtExport) -> dict[str, Any]:
    return tensorrt.info | {"files": [file.relative_to(context.folder).as_posix() for file in tensorrt.files]}


def _low_bit(context: StageContext, model: ir.Model, quantized: QuantizedModel) -> dict[str, dict[str, int]]:
    """For each target, how many activations of fewer than 8 bits saturate by themselves and how many need a Clip."""
    counts: dict[str, dict[str, int]] = {}
    for target in (target for target in context.recipe.export.targets if target in _EXPORTERS):
        ways = low_bit_activations(model, quantized, _left_out(context, quantized, target))
        counts[target] = dict(Counter[str](ways.values()))
    return counts


def _left_out(context: StageContext, quantized: QuantizedModel, target: str) -> frozenset[str]:
    """OpenVINO and TensorRT fuse convolution, SiLU and the rounding behind it, but only if nothing inside is rounded.

    On a grid of few bits that flips too many codes; whoever wants the fused kernel there trains for them alone.
    """
    is_fine = all(qparams.spec.bits == _FINE_BITS for qparams in quantized.activations.values())
    leaves_out = target in ("openvino", "tensorrt") and is_fine
    return frozenset(context.artifacts["train"].info["inner"]) if leaves_out else frozenset()


def _onnx_path(context: StageContext, label: str) -> Path:
    return context.folder / "engines" / "onnxruntime" / f"{context.stem}_{label}.onnx"


def _save(model: ir.Model, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        ir.save(model, temporary)
    return path


def _onnxruntime(
    context: StageContext, model: ir.Model, quantized: QuantizedModel, metadata: dict[str, object]
) -> Path:
    qdq = insert_qdq(model, quantized, storage=context.recipe.export.storage_of("onnxruntime"))
    return _save(qdq, _onnx_path(context, quantized.scheme))


def _openvino(context: StageContext, model: ir.Model, quantized: QuantizedModel, metadata: dict[str, object]) -> Path:
    inner = _left_out(context, quantized, "openvino")
    # In 8 bits here: the importer would unpack narrower weights, which are packed in the IR.
    qdq = insert_qdq(model, quantized, leave_out=inner, clip="values")
    stem = f"{context.stem}_{quantized.scheme}"
    folder = context.folder / "engines" / "openvino" / f"{stem}{OPENVINO_SUFFIX}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(folder) as temporary:
        source = temporary / "source.onnx"
        ir.save(qdq, source)
        storage = context.recipe.export.storage_of("openvino")
        build_openvino(source, temporary, stem, metadata, ir_passes(quantized, storage))
        source.unlink()
    return folder


_EXPORTERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
