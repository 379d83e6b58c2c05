"""Stage `validate`: COCO mAP and latency of every view, gates, and the report."""

from dataclasses import replace
from typing import Any

from qyolo_deploy import __version__
from qyolo_deploy.artifact import environment_fingerprint, sha256_file
from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.engines.base import Runner, open_engine
from qyolo_deploy.graph.simulate import simulate
from qyolo_deploy.models.registry import detector_of, load_detector
from qyolo_deploy.qat.soft_rounding import round_softly
from qyolo_deploy.quant.model import QuantizedModel
from qyolo_deploy.recipe import SOFT_ROUNDED, TENSORRT_GRAPH, TORCH_VIEWS, SensitivitySection
from qyolo_deploy.release.report import write_report
from qyolo_deploy.stages.context import StageContext, StageOutput
from qyolo_deploy.stages.correct import state_file, trained
from qyolo_deploy.stages.examples import describe_images
from qyolo_deploy.stages.parity import engines_parity
from qyolo_deploy.stages.report_parts import (
    describe_calibration,
    describe_layers,
    describe_making,
    read_diagnostics,
    shorten_numbers,
    to_text,
)
from qyolo_deploy.stages.sensitivity import FOLDER
from qyolo_deploy.stages.sensitivity_kept import MEASURED
from qyolo_deploy.stages.sensitivity_measure import measure_float
from qyolo_deploy.stages.tensorrt import BUILT, tensorrt_notes
from qyolo_deploy.stages.views import TorchRunner, sqnr_db
from qyolo_deploy.validate.bootstrap import bootstrap, with_interval
from qyolo_deploy.validate.curves import precision_recall
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
_SQNR_IMAGES = 4


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
    for view in (view for view in recipe.views if view in ("float", *TORCH_VIEWS) or view in engines):
        with context.reporter.progress(f"validating {view}") as tick:
            digests = {"data": data_digest}
            if view == "fake_quantized":
                runner: Any = _fake_quantized(context)
                digests["model"] = sha256_file(context.folder / "correct" / "model.safetensors")
            elif view == SOFT_ROUNDED:
                runner = _softly_rounded(context)
                digests["model"] = sha256_file(state_file(context))
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
    parity = engines_parity(context, dataset)
    for view, told in parity.items():
        reports[view] = replace(reports[view], parity=told.summary())
    resampled = {view: bootstrap(dataset, results) for view, results in found.items()}
    reports = {view: with_interval(report, reports["float"], resampled) for view, report in reports.items()}
    last = None if context.previous_release is None else read_release(context.previous_release)
    here = [gate for gate in recipe.gates if gate.at == "build"]
    results = check_gates(here, reports, resampled, last)
    report = _compose(context, reports, results)
    report["parity"] = shorten_numbers({view: told.to_json() for view, told in parity.items()})
    report["precision_recall"] = precision_recall({view: sample.classes for view, sample in resampled.items()})
    report["images"] = describe_images(dataset, found)
    if recipe.validate_.sensitivity is not None:
        report["sensitivity"] = _sensitivity(context, recipe.validate_.sensitivity)
    files = [context.folder / "report.json", context.folder / "report.html"]
    write_atomic(files[0], to_text(report))
    write_report(files[1], report)
    info = {"views": report["views"], "gates": report["gates"], "not_run": report["not_run"]}
    return StageOutput("report", files, info)


def _fake_quantized(context: StageContext) -> TorchRunner:
    quantized = QuantizedModel.load(context.folder / "correct" / "model.safetensors")
    return TorchRunner(simulate(detector_of(quantized.architecture), quantized))


def _softly_rounded(context: StageContext) -> TorchRunner:
    """What training left, with the weights unrounded whose level is undecided."""
    detector = load_detector(context.folder / "float" / "model.safetensors", None, None, 0)
    model = trained(context, detector)
    round_softly(model)
    return TorchRunner(lambda images: detector.decode(model(images)))


def _latencies(
    context: StageContext, engines: dict[str, Runner], dataset: DetectionDataset, settings: EvalSettings
) -> dict[str, dict[str, float]]:
    """Interleaved, so that the machine's moods meet all engines alike; square input, as devices run it.

    That of TensorRT's graph on another runtime would tell nothing.
    """
    image, _ = letterbox(read_image(dataset.images[0].path), settings.imgsz, settings.stride, rect=False)
    with context.reporter.progress("measuring latency") as tick:
        tick(0, 1)
        rounds = context.recipe.validate_.latency_runs
        timed = {view: engine for view, engine in engines.items() if view != TENSORRT_GRAPH}
        paired = measure_paired(timed, to_tensor(image), rounds, baseline="float")
        tick(1, 1)
    return {view: latency.to_json() for view, latency in paired.latencies.items()}


def _sensitivity(context: StageContext, section: SensitivitySection) -> dict[str, Any]:
    kept = context.folder / FOLDER / MEASURED
    calibration, data = context.calibration_data(), context.dataset
    with context.reporter.progress("sensitivity") as tick:
        found = measure_float(context.folder, context.recipe, calibration, data, section, tick, kept)
    told: dict[str, Any] = shorten_numbers(found.to_json())
    return told


def _compose(context: StageContext, reports: dict[str, EvalReport], results: list[GateResult]) -> dict[str, Any]:
    recipe, train = context.recipe, context.artifacts["train"].info
    return {
        "name": recipe.name,
        "version": recipe.release.version,
        "created_with": __version__,
        "views": [report.to_json() for report in reports.values()],
        "gates": [result.to_json() for result in results],
        "not_run": _not_run(context),
        "training": {"epochs": train["epochs"], "diagnostics": read_diagnostics(context.folder / "train")},
        "correction": {"steps": _numbered(context.artifacts["correct"].info["epochs"])},
        "quantization": {
            "scheme": train["scheme"],
            "targets": list(recipe.export.targets),
            "layers": describe_layers(context, QuantizedModel.load(context.folder / "correct" / "model.safetensors")),
            "notes": _notes(context),
        },
        "calibration": describe_calibration(context),
        "reproduce": describe_making(context),
        "recipe": {"yaml": recipe.to_yaml()},
        "environment": environment_fingerprint(PACKAGES),
        "lineage": [
            {"stage": stage, "key": artifact.key, "inputs": artifact.inputs}
            for stage, artifact in context.artifacts.items()
        ],
    }


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
    if tensorrt := context.artifacts["export"].info.get("tensorrt"):
        notes += tensorrt_notes(tensorrt)
    if left := sum(gate.at == "device" for gate in context.recipe.gates):
        notes.append(f"Gates left to the device: {left}; `qyolo engine build` checks them before it releases.")
    for target, ways in context.artifacts["export"].info["low_bit_activations"].items():
        if ways:
            notes.append(
                f"{target}: of the activations of fewer than 8 bits {ways.get('saturating', 0)} are clipped by the "
                f"saturation of uint8, {ways.get('clip', 0)} by a Clip."
            )
    if wide := context.artifacts["export"].info["wide_layers"]:
        notes.append(
            f"{wide} layers have weights beyond 64: on x86 processors without VNNI they saturate in OpenVINO, and in "
            "ONNX Runtime unless session.x64quantprecision is 1, as our runner sets it."
        )
    if context.recipe.quantization.weights.bits < 8:
        bits = context.recipe.quantization.weights.bits
        notes.append(f"{bits}-bit grids run in int8 kernels: the grid decides accuracy, the container size and speed.")
    return notes


def _not_run(context: StageContext) -> list[dict[str, str]]:
    """Engines without numbers, and why."""
    tensorrt = context.artifacts["export"].info.get("tensorrt")
    if tensorrt is None or tensorrt["status"] == BUILT:
        return []
    return [{"name": "tensorrt", "status": tensorrt["status"], "reason": tensorrt["reason"]}]


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
