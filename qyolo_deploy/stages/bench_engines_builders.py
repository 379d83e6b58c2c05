"""The peers of `qyolo bench engines`, each a function that a process of its own calls with a `Job`."""

import copy
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import yaml

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.engines.base import OPENVINO_SUFFIX
from qyolo_deploy.engines.openvino import build_openvino, import_openvino
from qyolo_deploy.export.float_onnx import export_float
from qyolo_deploy.graph.simulate import fold_float
from qyolo_deploy.graph.trace import INPUT
from qyolo_deploy.models.checkpoint import write_float_checkpoint
from qyolo_deploy.models.registry import load_detector
from qyolo_deploy.models.ultralytics_env import import_ultralytics
from qyolo_deploy.stages.bench_engines_peers import Job
from qyolo_deploy.stages.bench_steps import settle

_SETTLING_IMAGES = 8


class _Images:
    """The calibration images, read anew each time that they are gone through; float32 `[1, 3, imgsz, imgsz]`."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __len__(self) -> int:
        return len(self._job.images)

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        for path in self._job.images:
            yield to_tensor(letterbox(read_image(path), self._job.imgsz, rect=False)[0])


def float_model(job: Job) -> None:
    """Writes the graph that our own engines are made of, as ONNX with open sizes, and random weights if they are."""
    folder = _folder(job)
    names = None if job.weights is not None else job.names
    detector = load_detector(job.weights, job.architecture, names, 0).eval()
    if job.weights is None:
        few = [image for image, _ in zip(_Images(job), range(_SETTLING_IMAGES), strict=False)]
        settle(detector.core, torch.from_numpy(np.concatenate(few)))
        detector.eval()
        write_float_checkpoint(folder / f"{job.stem}.safetensors", detector.spec, detector.core.state_dict())
    ir.save(export_float(fold_float(detector), job.imgsz, dynamic=True), _float_onnx(folder, job))
    write_atomic(folder / "facts.json", json.dumps({"family": detector.spec.family}))


def float_onnx(job: Job) -> None:
    """The float graph itself."""
    shutil.copyfile(_source_onnx(job), _float_onnx(_folder(job), job))


def float_openvino(job: Job) -> None:
    """The float graph as OpenVINO has it."""
    folder = _folder(job) / f"{job.stem}_fp32{OPENVINO_SUFFIX}"
    folder.mkdir()
    build_openvino(_source_onnx(job), folder, f"{job.stem}_fp32", {})


def nncf_performance(job: Job) -> None:
    """NNCF's default."""
    _nncf(job, "PERFORMANCE")


def nncf_mixed(job: Job) -> None:
    """NNCF's preset for networks with activations other than ReLU, which ultralytics takes as well."""
    _nncf(job, "MIXED")


def _nncf(job: Job, preset: str) -> None:
    nncf, openvino = importlib.import_module("nncf"), import_openvino()
    quantized = nncf.quantize(
        openvino.convert_model(_source_onnx(job)),
        nncf.Dataset(_Images(job)),
        preset=getattr(nncf.QuantizationPreset, preset),
        subset_size=len(job.images),
    )
    stem = f"{job.stem}_nncf_{preset.lower()}"
    folder = _folder(job) / f"{stem}{OPENVINO_SUFFIX}"
    folder.mkdir()
    openvino.save_model(quantized, folder / f"{stem}.xml")


def ort_quantize_static(job: Job) -> None:
    """ONNX Runtime's own static quantization: Q/DQ, each channel its scale, uint8 activations, int8 weights."""
    tools: Any = importlib.import_module("onnxruntime.quantization")

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]  # its class is known at run time alone
        def __init__(self) -> None:
            self._images = iter(_Images(job))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {INPUT: image}

    tools.quantize_static(
        _source_onnx(job),
        _folder(job) / f"{job.stem}_quantize_static.onnx",
        Reader(),
        quant_format=tools.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
    )


def ultralytics_int8_onnx(job: Job) -> None:
    """`YOLO(...).export(format="onnx", int8=True)`."""
    _ultralytics(job, "onnx")


def ultralytics_int8_openvino(job: Job) -> None:
    """`YOLO(...).export(format="openvino", int8=True)`."""
    _ultralytics(job, "openvino")


def _ultralytics(job: Job, kind: str) -> None:
    """Exports as `YOLO.export` does, which cannot be told where to write."""
    import_ultralytics()
    exporter: Any = importlib.import_module("ultralytics.engine.exporter")
    overrides = {
        "mode": "export",
        "format": kind,
        "quantize": 8,
        "imgsz": job.imgsz,
        "batch": 1,
        "device": "cpu",
        "verbose": False,
        "data": str(_calibration_data(job)),
    }
    exporter.Exporter(overrides=overrides)(model=_ultralytics_model(job))
    shutil.rmtree(_folder(job) / "calibration")


def _ultralytics_model(job: Job) -> Any:
    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    assert job.source is not None
    detector = load_detector(job.weights or job.source / f"{job.stem}.safetensors", None, None, 0)
    model = tasks.DetectionModel(copy.deepcopy(detector.spec.config), ch=3, verbose=False)
    # Of heads with two branches we keep one; the other one takes as long with random weights.
    model.load_state_dict(detector.core.state_dict(), strict=False)
    model.names, model.task = dict(enumerate(detector.spec.names)), "detect"
    model.pt_path = str(_folder(job) / f"{job.stem}.pt")  # names the files
    return model


def _calibration_data(job: Job) -> Path:
    """A dataset of copies, because label caches are written beside the images."""
    folder = _folder(job) / "calibration"
    images = folder / "images"
    images.mkdir(parents=True)
    for index, path in enumerate(job.images):
        shutil.copyfile(path, images / f"{index:06d}{path.suffix}")
    file = folder / "calibration.yaml"
    content = {"path": str(folder), "train": "images", "val": "images", "names": dict(enumerate(job.names))}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def _folder(job: Job) -> Path:
    assert job.folder is not None
    return job.folder


def _float_onnx(folder: Path, job: Job) -> Path:
    return folder / f"{job.stem}_fp32.onnx"


def _source_onnx(job: Job) -> Path:
    assert job.source is not None
    return _float_onnx(job.source, job)
