"""The part of stage `export` for TensorRT: graph and build specification, and the engine where it can be built."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.atomic import atomic_path, write_atomic
from qyolo_deploy.console import Tick
from qyolo_deploy.engines.tensorrt_build import build_plan
from qyolo_deploy.engines.tensorrt_file import write_engine
from qyolo_deploy.engines.tensorrt_runtime import find_device, import_tensorrt
from qyolo_deploy.engines.tensorrt_spec import SPEC_NAME, TRTEXEC_NAME, BuildSpec, profile, trtexec_lines
from qyolo_deploy.errors import RuntimeMissingError
from qyolo_deploy.export.tensorrt import Dialect, tensorrt_dialect
from qyolo_deploy.export.tensorrt_weights import weight_only_dialect
from qyolo_deploy.graph.trace import INPUT
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.recipe import TENSORRT_GRAPH
from qyolo_deploy.stages.context import StageContext

BUILT, BUILT_NOT_RUN, NOT_BUILT = "built", "built, not run", "not built"


@dataclass(frozen=True)
class TensorRtExport:
    """What was written.

    Args:
        engines: View -> file: of the graph, and of the engine if it can run here.
        files: All files.
        info: Status, and what the graph does otherwise than training did.
    """

    engines: dict[str, Path]
    files: list[Path]
    info: dict[str, Any] = field(default_factory=dict)


def export_tensorrt(
    context: StageContext,
    model: ir.Model,
    quantized: QuantizedModel,
    metadata: dict[str, object],
    inner: frozenset[str],
) -> TensorRtExport:
    """Writes `engines/tensorrt/`.

    Args:
        context: Of the stage.
        model: Float graph.
        quantized: Integers, scales and zero points.
        metadata: For the reader of the engine.
        inner: Tensors inside activations.

    Raises:
        InputError: If TensorRT refuses the graph.
    """
    folder = context.folder / "engines" / "tensorrt"
    options = context.recipe.export.tensorrt
    name = f"{context.stem}_{quantized.scheme}"
    if options.activations == "float":
        dialect, name = weight_only_dialect(model, quantized, options.fp16), f"{name}_weights"
    else:
        dialect = tensorrt_dialect(model, quantized, inner, options.fp16)
    onnx = folder / f"{name}.onnx"
    with atomic_path(onnx) as temporary:
        ir.save(dialect.model, temporary)
    spec = _specification(context, name, quantized.scheme, onnx, metadata)
    files = [onnx, folder / SPEC_NAME, folder / TRTEXEC_NAME]
    write_atomic(files[1], spec.to_text())
    write_atomic(files[2], trtexec_lines(spec))
    with context.reporter.progress("building TensorRT engine") as tick:
        engine = _build(folder, spec, tick)
    engines = {TENSORRT_GRAPH: onnx}
    if engine.info["status"] == BUILT:
        engines["tensorrt"] = engine.files[0]
    return TensorRtExport(engines, files + engine.files, _facts(dialect) | engine.info)


def _specification(context: StageContext, name: str, scheme: str, onnx: Path, metadata: dict[str, object]) -> BuildSpec:
    recipe = context.recipe
    options, imgsz = recipe.export.tensorrt, recipe.model.imgsz
    return BuildSpec(
        name=name,
        scheme=scheme,
        onnx=onnx.name,
        onnx_sha256=sha256_file(onnx),
        input=INPUT,
        shapes=profile(options, imgsz) if recipe.export.dynamic else None,
        imgsz=imgsz,
        options=options,
        metadata=metadata | {"batch": options.batch.max},
        validation=recipe.validate_,
        gates=tuple(gate for gate in recipe.gates if "tensorrt" in (gate.view, gate.relative_to)),
    )


@dataclass(frozen=True)
class _Engine:
    files: list[Path]
    info: dict[str, Any]


def _build(folder: Path, spec: BuildSpec, tick: Tick) -> _Engine:
    """Builds what can be built here; an engine of an earlier build must not be taken for this one's."""
    for leftover in folder.glob(f"{spec.name}.*"):
        if leftover.suffix in (".engine", ".plan") or leftover.name.endswith(".plan.json"):
            leftover.unlink()
    try:
        runtime = import_tensorrt()
        built = build_plan(runtime, folder, spec, tick)
    except RuntimeMissingError as error:
        return _Engine([], {"status": NOT_BUILT, "reason": str(error)})
    files = write_engine(folder, spec.name, built.plan, spec.metadata, built.record)
    info = {"runtime": runtime.title, "version": runtime.version, "weights_bytes": built.record.weights_bytes}
    if find_device() is None:
        reason = f"built by {runtime.title} without a GPU; it was not run"
        return _Engine(files, {"status": BUILT_NOT_RUN, "reason": reason, **info})
    return _Engine(files, {"status": BUILT, "reason": f"built by {runtime.title}", **info})


def _facts(dialect: Dialect) -> dict[str, Any]:
    return {
        "coarser": dict(dialect.coarser),
        "float_layers": list(dialect.float_layers),
        "clips": dialect.clips,
        "tensors": dialect.tensors,
    }


def tensorrt_notes(info: dict[str, Any]) -> list[str]:
    """What a reader of the report should know about the engine and the graph that it is built from."""
    notes = [f"TensorRT engine: {info['status']} ({info['reason']})."]
    if info.get("weights_bytes"):
        notes.append(f"TensorRT engine: weights take {info['weights_bytes'] / 1e6:.2f} MB.")
    if not info["tensors"]:
        notes.append("TensorRT: weights alone are rounded, activations are float.")
    if coarser := info["coarser"]:
        worst = max(coarser.values())
        notes.append(
            f"TensorRT: {len(coarser)} of {info['tensors']} activations do not fit int8 without a zero point; their "
            f"range is kept with steps up to {worst:.2f} times the trained ones: {', '.join(coarser)}. "
            "quantization.activations.grid: symmetric trains on grids that fit."
        )
    if floats := info["float_layers"]:
        notes.append(f"TensorRT: computed in float, with the trained integers as weights: {', '.join(floats)}.")
    return notes
