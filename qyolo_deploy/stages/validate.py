"""Stage `validate`: COCO mAP and latency of every view, gates, and the report."""

import base64
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qyolo_deploy import __version__
from qyolo_deploy.artifact import environment_fingerprint, sha256_file
from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.engines.base import Runner, open_engine
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.models.registry import detector_of
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.release.report import write_report
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.stages.views import TorchRunner, sqnr_db
from qyolo_deploy.validate.bootstrap import bootstrap, with_interval
from qyolo_deploy.validate.detections import decode
from qyolo_deploy.validate.evaluate import EvalSettings
from qyolo_deploy.validate.gates import GateResult, check_gates
from qyolo_deploy.validate.last_release import read_release
from qyolo_deploy.validate.latency import measure_paired
from qyolo_deploy.validate.report import EvalReport
from qyolo_deploy.validate.run import digest_engine, evaluate_view, settings_for

PACKAGES = (
    "torch",
    "ultralytics",
    "onnx",
    "onnxruntime",
    "openvino",
    "numpy",
    "opencv-python",
    "faster-coco-eval",
)
_SAMPLES = 4
_SQNR_IMAGES = 4
_SAMPLE_CONF = 0.3


def run(context: StageContext) -> StageOutput:
    """Writes `report.json` and `report.html`; whether gates passed is in the output's info."""
    recipe = context.recipe
    dataset = load_dataset(context.dataset, "val")
    engines = {
        view: open_engine(context.folder / path, conf=recipe.validate_.conf)
        for view, path in context.artifacts["export"].info["engines"].items()
    }
    settings = settings_for(
        engines["float"],
        recipe.model.imgsz,
        conf=recipe.validate_.conf,
        iou=recipe.validate_.iou,
        max_det=recipe.validate_.max_det,
        rect=recipe.validate_.rect,
    )
    latencies = _latencies(context, engines, dataset, settings)
    data_digest = context.artifacts["data"].info["val"]["digest"]
    reports, found = {}, {}
    for view in ("float", "fake_quantized", *recipe.export.targets):
        with context.reporter.progress(f"validating {view}") as tick:
            digests = {"data": data_digest}
            if view == "fake_quantized":
                runner: Any = _fake_quantized(context)
                digests["model"] = sha256_file(context.folder / "correct" / "model.safetensors")
            else:
                path = engines[view].path
                runner = open_engine(path, conf=recipe.validate_.conf, mode="throughput")
                digests["engine"] = digest_engine(path)
            reports[view], found[view] = evaluate_view(
                view,
                runner,
                dataset,
                settings,
                digests=digests,
                latency_ms=latencies.get(view),
                progress=tick,
            )
    resampled = {view: bootstrap(dataset, results) for view, results in found.items()}
    reports = {view: with_interval(report, reports["float"], resampled) for view, report in reports.items()}
    last = None if context.previous_release is None else read_release(context.previous_release)
    results = check_gates(recipe.gates, reports, resampled, last)
    report = _compose(context, reports, results)
    report["samples"] = _samples(engines[recipe.export.targets[0]], dataset, settings)
    files = [context.folder / "report.json", context.folder / "report.html"]
    write_atomic(files[0], json.dumps({k: v for k, v in report.items() if k != "samples"}, indent=1))
    write_report(files[1], report)
    info = {"views": report["views"], "gates": report["gates"]}
    return StageOutput("report", files, info)


def _fake_quantized(context: StageContext) -> TorchRunner:
    quantized = QuantizedModel.load(context.folder / "correct" / "model.safetensors")
    return TorchRunner(simulate(detector_of(quantized.architecture), quantized))


def _latencies(
    context: StageContext, engines: dict[str, Runner], dataset: DetectionDataset, settings: EvalSettings
) -> dict[str, dict[str, float]]:
    """Interleaved, so that the machine's moods meet all engines alike; square input, as devices run it."""
    image, _ = letterbox(read_image(dataset.images[0].path), settings.imgsz, settings.stride, rect=False)
    with context.reporter.progress("measuring latency") as tick:
        tick(0, 1)
        rounds = context.recipe.validate_.latency_runs
        paired = measure_paired(engines, to_tensor(image), rounds, baseline="float")
        tick(1, 1)
    return {view: latency.to_json() for view, latency in paired.latencies.items()}


def _compose(context: StageContext, reports: dict[str, EvalReport], results: list[GateResult]) -> dict[str, Any]:
    recipe, train = context.recipe, context.artifacts["train"].info
    return {
        "name": recipe.name,
        "version": recipe.release.version,
        "created_with": __version__,
        "views": [report.to_json() for report in reports.values()],
        "gates": [gate_to_json(result) for result in results],
        "training": {"epochs": train["epochs"], "diagnostics": _diagnostics(context.folder / "train")},
        "correction": {"steps": _numbered(context.artifacts["correct"].info["epochs"])},
        "quantization": {
            "scheme": train["scheme"],
            "targets": list(recipe.export.targets),
            "layers": train["layers"],
            "notes": _notes(context),
        },
        "recipe": {"yaml": recipe.to_yaml()},
        "environment": environment_fingerprint(PACKAGES),
        "lineage": [
            {"stage": stage, "key": artifact.key, "inputs": artifact.inputs}
            for stage, artifact in context.artifacts.items()
        ],
    }


def _diagnostics(folder: Path) -> dict[str, Any]:
    """What training tells about oscillations; nothing where an older build did not record it."""
    path = folder / "diagnostics.json"
    found: dict[str, Any] = _short(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    return found


def _short(value: Any) -> Any:
    """JSON data with numbers of 6 digits: traces are thousands of them. What is no number becomes null."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _numbered(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"step": entry["epoch"], **entry} for entry in epochs]


def _notes(context: StageContext) -> list[str]:
    """What a reader of the numbers should know about the engines."""
    train, notes = context.artifacts["train"].info, []
    if train["float_layers"]:
        notes.append(f"In float: {', '.join(train['float_layers'])}.")
    if "openvino" in context.recipe.export.targets and train["inner"]:
        notes.append(_inner_note(context, frozenset(train["inner"])))
    if requantized := context.artifacts["correct"].info.get("requantized_channels"):
        notes.append(f"Correction left {requantized} channels so faint that their weights needed a coarser grid.")
    for target, ways in context.artifacts["export"].info["low_bit_activations"].items():
        if ways:
            notes.append(
                f"{target}: of the activations of fewer than 8 bits {ways.get('saturating', 0)} are clipped by the "
                f"saturation of uint8, {ways.get('clip', 0)} by a Clip."
            )
    if context.recipe.quantization.weights.bits < 8:
        bits = context.recipe.quantization.weights.bits
        notes.append(f"{bits}-bit grids run in int8 kernels: the grid decides accuracy, the container size and speed.")
    return notes


def _inner_note(context: StageContext, inner: frozenset[str]) -> str:
    """What OpenVINO does inside activations, and how much it matters."""
    quantized = QuantizedModel.load(context.folder / "correct" / "model.safetensors")
    records = load_dataset(context.dataset, "val").images[:_SQNR_IMAGES]
    images = [to_tensor(letterbox(read_image(r.path), context.recipe.model.imgsz, rect=False)[0]) for r in records]
    told = f"{sqnr_db(quantized, inner, images):.1f} dB SQNR of the head maps, {len(images)} validation images"
    if context.artifacts["export"].info["left_out"]["openvino"]:
        return (
            f"OpenVINO does not round {len(inner)} tensors inside activations that training rounds for ONNX Runtime "
            f"({told}): it fuses convolution and activation into one int8 kernel."
        )
    return (
        f"OpenVINO rounds inside activations as ONNX Runtime does, since few bits cannot do without ({told}): the "
        "activation is a kernel of its own then. Training for OpenVINO alone (export.targets) fuses it."
    )


def gate_to_json(result: GateResult) -> dict[str, Any]:
    """A gate and its outcome as one flat object."""
    outcome = {key: value for key, value in asdict(result).items() if key != "gate"}
    return {**result.gate.model_dump(), **outcome}


def _samples(runner: Runner, dataset: DetectionDataset, settings: EvalSettings) -> list[dict[str, str]]:
    """A few validation images with what the engine detects in them."""
    chosen = np.linspace(0, len(dataset) - 1, num=min(_SAMPLES, len(dataset)), dtype=int)
    return [_sample(runner, dataset, settings, dataset.images[index].path) for index in chosen]


def _sample(runner: Runner, dataset: DetectionDataset, settings: EvalSettings, path: Path) -> dict[str, str]:
    image = read_image(path)
    padded, geometry = letterbox(image, settings.imgsz, settings.stride, settings.rect)
    found = decode(runner(to_tensor(padded))[0], _SAMPLE_CONF, settings.iou, settings.max_det, multi_label=False)
    canvas = np.ascontiguousarray(image[:, :, ::-1])
    for box, score, label in zip(geometry.to_original(found.boxes), found.scores, found.classes, strict=True):
        left, top, right, bottom = (int(side) for side in box)
        cv2.rectangle(canvas, (left, top), (right, bottom), (64, 220, 64), 1)
        text = f"{dataset.class_names[label]} {score:.2f}"
        cv2.putText(canvas, text, (left + 1, max(top - 3, 8)), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (64, 220, 64), 1)
    _, encoded = cv2.imencode(".jpg", canvas, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return {"title": path.name, "jpeg_base64": base64.b64encode(encoded.tobytes()).decode()}
