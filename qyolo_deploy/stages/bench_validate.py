"""`qyolo bench validate`: how long validation takes beside the inference in it, and beside ultralytics' validation.

All take turns over the same images, so that within a round the machine is nearly the same for all.
"""

import importlib
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from qyolo_deploy._version import __version__
from qyolo_deploy.artifact import environment_fingerprint
from qyolo_deploy.console import Tick
from qyolo_deploy.data.dataset import find_input, load_dataset, take_images
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.data.records import DetectionDataset
from qyolo_deploy.engines.base import Runner, available_cores, open_engine
from qyolo_deploy.errors import InputError
from qyolo_deploy.stages.bench_engines_turns import summarize, take_turns
from qyolo_deploy.validate.evaluate import EvalSettings
from qyolo_deploy.validate.run import settings_for, validate_runner

_PACKAGES = ("onnxruntime", "openvino", "ultralytics", "numpy", "opencv-python", "faster-coco-eval")
_BARE, _TOGETHER, _OURS, _ULTRALYTICS = "inference", "inference, several at a time", "qyolo validate", "ultralytics val"

Tensor = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BenchValidateSettings:
    """How it is measured.

    Args:
        imgsz: Longer side in pixels; None takes the engine's.
        images: The first so many of the split; all of them are held in memory as tensors.
        rounds: In which each gets its turn.
        ultralytics: Whether `YOLO(engine).val()` takes part.

    Raises:
        InputError: A number is out of its range.
    """

    imgsz: int | None = None
    images: int = 200
    rounds: int = 3
    ultralytics: bool = False

    def __post_init__(self) -> None:
        for name, least in {"images": 1, "rounds": 2}.items():
            if (value := getattr(self, name)) < least:
                raise InputError(f"{name} is {value}, expected at least {least}")


def run_bench(engine: Path, data: str, settings: BenchValidateSettings, tick: Tick | None = None) -> dict[str, Any]:
    """Measures a whole validation, and bare inference over the same tensors.

    Args:
        engine: An engine file.
        data: Dataset YAML, its folder or a COCO JSON; its validation split counts.
        settings: How it is measured.
        tick: Called after each turn.

    Returns:
        The settings, the machine, and a row for each contestant: seconds a round, and the ratio to bare inference.
        A contestant that cannot run has a note instead.

    Raises:
        InputError: Engine or data are not usable.
        RuntimeMissingError: The engine's runtime is not installed.
    """
    one, several = open_engine(engine), open_engine(engine, mode="throughput")
    dataset = load_dataset(find_input(data), "val")
    dataset = take_images(dataset, range(min(settings.images, len(dataset))))
    how = settings_for(one, settings.imgsz, conf=0.001, iou=0.6, max_det=300)
    tensors = [_tensor(record.path, how) for record in dataset.images]
    calls: dict[str, Callable[[], object]] = {
        _BARE: lambda: _all(one, tensors),
        _TOGETHER: lambda: _all(several, tensors),
        _OURS: lambda: validate_runner(open_engine(engine), dataset, how),
    }
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if settings.ultralytics:
            try:
                calls[_ULTRALYTICS] = _ultralytics(engine, dataset, how, Path(folder))
            except ImportError as error:
                notes[_ULTRALYTICS] = f"cannot run here: {' '.join(str(error).split())}"
        names = list(calls)

        def progress(done: int, total: int, which: int) -> None:
            if tick is not None:
                tick(done, total, names[which])

        times = dict(
            zip(names, take_turns(list(calls.values()), settings.rounds, 1, progress, settle=False), strict=True)
        )
    rows = [{"name": name, "note": "", **_seconds(times[name], times[_BARE])} for name in names]
    return {
        "engine": str(engine),
        "imgsz": how.imgsz,
        "letterbox": how.letterbox,
        "images": len(dataset),
        "rounds": settings.rounds,
        "parallel": several.parallel,
        "cores": available_cores(),
        "load_average": list(os.getloadavg()),
        "environment": environment_fingerprint(_PACKAGES) | {"qyolo_deploy": __version__},
        "rows": rows + [{"name": name, "note": note} for name, note in notes.items()],
    }


def _tensor(path: Path, how: EvalSettings) -> Tensor:
    return to_tensor(letterbox(read_image(path), how.imgsz, how.stride, how.rect)[0])


def _all(runner: Runner, tensors: list[Tensor]) -> None:
    if runner.parallel == 1:
        for tensor in tensors:
            runner(tensor)
        return
    with ThreadPoolExecutor(runner.parallel) as pool:
        for _ in pool.map(lambda tensor: runner(tensor).shape, tensors):
            pass


def _seconds(times: list[list[float]], baseline: list[list[float]]) -> dict[str, Any]:
    found = summarize(times, baseline)
    return {"round_s": [value / 1e3 for value in found["round_ms"]], "ratio": found["ratio"]}


def _ultralytics(engine: Path, dataset: DetectionDataset, how: EvalSettings, folder: Path) -> Callable[[], object]:
    """`YOLO(engine).val()` over the same images, from links to them, because it writes caches beside the labels."""
    environment = importlib.import_module("qyolo_deploy.models.ultralytics_env")  # which imports torch
    module = environment.import_ultralytics()
    environment.ensure_torchvision()
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for record in dataset.images:
        (folder / "images" / record.path.name).symlink_to(record.path.absolute())
    _write_labels(dataset, folder / "labels")
    names = dict(enumerate(dataset.class_names))
    data = {"path": str(folder), "train": "images", "val": "images", "names": names}
    (folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    arguments = {"imgsz": how.imgsz, "rect": how.rect, "conf": how.conf, "iou": how.iou, "max_det": how.max_det}
    model = module.YOLO(str(engine), task="detect")
    more = {"batch": 1, "device": "cpu", "plots": False, "verbose": False, "project": str(folder), "name": "val"}
    return lambda: model.val(data=str(folder / "data.yaml"), **arguments, **more)


def _write_labels(dataset: DetectionDataset, folder: Path) -> None:
    for record, boxes, classes in zip(dataset.images, dataset.boxes, dataset.classes, strict=True):
        size = np.array([record.width, record.height] * 2)
        centres = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), axis=1) / size
        lines = [f"{label} {' '.join(f'{v:.6f}' for v in box)}" for label, box in zip(classes, centres, strict=True)]
        (folder / record.path.name).with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")


def bench_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people."""
    rows = []
    for row in result["rows"]:
        cells = ["-"] * 4
        if "ratio" in row:
            seconds, ratio = sorted(row["round_s"])[len(row["round_s"]) // 2], row["ratio"]
            spread = f"{ratio['min']:.2f}..{ratio['max']:.2f}"
            cells = [f"{seconds:.2f}", f"{result['images'] / seconds:.1f}", f"{ratio['median']:.2f}", spread]
        rows.append([row["name"], *cells, row["note"]])
    return ["", "s", "images/s", f"time / {_BARE}'s", "min..max", "note"], rows


def caption(result: Mapping[str, Any]) -> str:
    """One line on how and where it was measured."""
    return (
        f"{result['engine']}, {result['images']} images, {result['imgsz']} px {result['letterbox']}, "
        f"{result['rounds']} rounds, {result['parallel']} at a time; {result['environment']['cpu']}, "
        f"{result['cores']} cores, load {result['load_average'][0]:.1f}"
    )
