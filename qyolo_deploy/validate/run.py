"""Validation of one engine file on a dataset, as `qyolo validate` does it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from qyolo_deploy.artifact import sha256_file, sha256_json
from qyolo_deploy.data.dataset import digest_dataset, find_input, load_dataset
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.engines.base import Runner, engine_files, open_engine
from qyolo_deploy.errors import InputError
from qyolo_deploy.validate.coco_map import Evaluator
from qyolo_deploy.validate.evaluate import DetectorRunner, EvalSettings, evaluate
from qyolo_deploy.validate.latency import measure_latency
from qyolo_deploy.validate.report import EvalReport
from qyolo_deploy.validate.results import ResultTable

DEFAULT_IMGSZ = 640
LATENCY_RUNS = 10
LATENCY_WARMUP = 2


def validate(
    engine: str | Path,
    data: str | Path,
    imgsz: int | None = None,
    conf: float = 0.001,
    iou: float = 0.6,
    max_det: int = 300,
    split: str = "val",
    precision_hint: str = "f32",
    evaluator: Evaluator = "faster",
    latency_runs: int = LATENCY_RUNS,
    progress: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """Measures COCO mAP and latency of an engine file.

    Args:
        engine: Our ONNX, an ultralytics ONNX, a TensorRT engine, an OpenVINO folder or .xml.
        data: Dataset YAML, its folder or a COCO JSON.
        imgsz: Longer side in pixels; by default what the engine's metadata or fixed input says, else 640.
        conf: Scores above it count.
        iou: Threshold of the non-maximum suppression.
        max_det: Detections kept of an image.
        split: Split of the dataset.
        precision_hint: OpenVINO's inference precision.
        evaluator: Implementation of COCO's metrics.
        latency_runs: Inferences of one image whose times count.
        progress: Called with images done and in total.

    Raises:
        InputError: If engine or data are not usable or do not fit each other.
        RuntimeMissingError: If the engine's runtime is not installed.
    """
    runner = open_engine(Path(engine), precision_hint, conf)
    dataset = load_dataset(find_input(data), split)
    settings = settings_for(runner, imgsz, conf=conf, iou=iou, max_det=max_det)
    return validate_runner(runner, dataset, settings, latency_runs=latency_runs, evaluator=evaluator, progress=progress)


def validate_runner(
    runner: Runner,
    dataset: DetectionDataset,
    settings: EvalSettings,
    *,
    name: str | None = None,
    latency_runs: int = LATENCY_RUNS,
    evaluator: Evaluator = "faster",
    progress: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """Measures accuracy and latency of a loaded engine.

    Args:
        runner: The engine.
        dataset: Images and ground truth.
        settings: Size, thresholds, padding.
        name: Of the view; by default the runtime's.
        latency_runs: Runs whose times count.
        evaluator: Implementation of COCO's metrics.
        progress: Called with images done and in total.
    """
    name = name or runner.runtime
    example = np.full((1, 3, settings.imgsz, settings.imgsz), 114 / 255, np.float32)
    latency = measure_latency(runner, example, LATENCY_WARMUP, latency_runs).to_json()
    # Reading the images once for their digests and loading the engine again leave each other time.
    with ThreadPoolExecutor(1) as pool:
        data = pool.submit(digest_dataset, dataset)
        if runner.runtime != "tensorrt":  # calls do not share a GPU, and engines fill its memory
            runner = open_engine(runner.path, runner.precision_hint or "f32", settings.conf, mode="throughput")
    return evaluate_view(
        name,
        runner,
        dataset,
        settings,
        latency_ms=latency,
        digests={"engine": digest_engine(runner.path), "data": data.result()},
        progress=progress,
        evaluator=evaluator,
    )[0]


def settings_for(
    runner: Runner, imgsz: int | None, *, conf: float, iou: float, max_det: int, rect: bool = True
) -> EvalSettings:
    """Image size and padding that an engine can take.

    Raises:
        InputError: If the engine's input is fixed to another size, or a value is out of its range.
    """
    for name, value in (("conf", conf), ("iou", iou)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}, expected 0 to 1")
    if imgsz is not None and (imgsz < 1 or imgsz % EvalSettings.stride):
        raise InputError(f"imgsz is {imgsz}, expected a positive multiple of {EvalSettings.stride}")
    if runner.imgsz is None:
        return EvalSettings(imgsz or runner.trained_imgsz or DEFAULT_IMGSZ, rect, conf, iou, max_det)
    height, width = runner.imgsz
    if height != width:
        raise InputError(f"{runner.path}: its input is fixed to {width} x {height} px, expected a square")
    if imgsz not in (None, height):
        raise InputError(f"{runner.path}: its input is fixed to {height} px, but imgsz is {imgsz}")
    return EvalSettings(height, False, conf, iou, max_det)


def digest_engine(path: Path) -> str:
    """Digest of an engine: of its file, or of all files in its folder."""
    if path.is_file():
        return sha256_file(path)
    return sha256_json({file.relative_to(path).as_posix(): sha256_file(file) for file in engine_files(path)})


def evaluate_view(
    name: str,
    runner: DetectorRunner | Runner,
    dataset: DetectionDataset,
    settings: EvalSettings,
    *,
    digests: dict[str, str],
    latency_ms: dict[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    evaluator: Evaluator = "faster",
) -> tuple[EvalReport, ResultTable]:
    """Evaluates one view of a model and puts everything known about it into a report.

    Args:
        name: Of the view.
        runner: A loaded engine, or anything that detects.
        dataset: Images and ground truth.
        settings: Size, thresholds, padding.
        digests: sha256 by what it is of.
        latency_ms: p50 and p95, if measured.
        progress: Called with images done and in total.
        evaluator: Implementation of COCO's metrics.

    Returns:
        The report, and the detections.
    """
    metrics, results = evaluate(runner, dataset, settings, progress=progress, evaluator=evaluator)
    path = getattr(runner, "path", None)
    report = EvalReport(
        name=name,
        metrics=metrics,
        images=len(dataset),
        thresholds=settings.thresholds,
        imgsz=settings.imgsz,
        letterbox=settings.letterbox,
        precision_hint=getattr(runner, "precision_hint", None),
        size_bytes=sum(file.stat().st_size for file in engine_files(path)) if path is not None else None,
        latency_ms=latency_ms,
        digests=digests,
    )
    return report, results
