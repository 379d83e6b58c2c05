"""What users would take instead of our engines, made from the same float weights and calibration images.

Each is made once, in a process of its own: the tools talk, keep threads and may end their process, and none of that
should reach the measurement. Needs no torch itself.
"""

import contextlib
import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from qyolo_deploy._version import __version__
from qyolo_deploy.artifact import package_versions, sha256_file, sha256_json
from qyolo_deploy.atomic import atomic_dir
from qyolo_deploy.console import Tick
from qyolo_deploy.data.dataset import digest_images, find_input, load_dataset
from qyolo_deploy.engines.base import OPENVINO_SUFFIX
from qyolo_deploy.errors import InputError, QyoloError, RuntimeMissingError
from qyolo_deploy.stages.bench_engines_subjects import Subject, with_hints
from qyolo_deploy.stages.context import BUILTIN, builtin_weights

_VERSION = 1  # raised when the same inputs would give other engines
_PACKAGES = ("torch", "onnx", "onnxsim", "onnxslim", "onnxruntime", "openvino", "nncf", "ultralytics")
_CHECKPOINTS = (".pt", ".safetensors")
_SEED = 0  # that of recipes, so that builds calibrate on the same images


@dataclass(frozen=True)
class Peer:
    """A way to an engine that is not ours.

    Args:
        name: Of its row and of the function that makes it, there with underscores.
        runtime: That runs it.
        needs: Packages beyond those of a build.
        note: What a reader should know.
    """

    name: str
    runtime: str
    needs: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_of_ultralytics(self) -> bool:
        """Whether ultralytics itself has to know the architecture."""
        return self.name.startswith("ultralytics")


PEERS = (
    Peer("float-onnx", "onnxruntime"),
    Peer("float-openvino", "openvino", ("openvino",)),
    Peer("nncf-performance", "openvino", ("openvino", "nncf"), "of float-openvino"),
    Peer("nncf-mixed", "openvino", ("openvino", "nncf"), "of float-openvino"),
    Peer("ort-quantize-static", "onnxruntime", (), "of float-onnx; boxes and scores share a scale"),
    Peer("ultralytics-int8-onnx", "onnxruntime", ("onnxslim",), "fixed input"),
    Peer("ultralytics-int8-openvino", "openvino", ("openvino", "nncf"), "fixed input"),
)


@dataclass(frozen=True)
class Job:
    """What a process that makes something is told.

    Args:
        kind: Function of `bench_engines_builders`.
        stem: First part of file names.
        imgsz: Side of the images in pixels.
        weights: Checkpoint; None for random weights.
        architecture: Name or YAML for random weights.
        names: Class names of the dataset.
        images: For calibration.
        source: Folder of the float model, once it is there.
        folder: Where the result goes.
    """

    kind: str
    stem: str
    imgsz: int
    weights: Path | None
    architecture: str | None
    names: tuple[str, ...]
    images: tuple[Path, ...]
    source: Path | None = None
    folder: Path | None = None


class FloatModel:
    """Float weights, calibration images, and the folder in which what is made of them is kept.

    Args:
        weights: Checkpoint, `builtin:...`, or an architecture, whose weights are then random.
        data: Dataset YAML or its folder; calibration images come from its training split.
        imgsz: Side of the images in pixels.
        images: How many of them.
        out: Under which the folder is made.

    Raises:
        InputError: Weights or data are not there.
    """

    def __init__(self, weights: str, data: str, imgsz: int, images: int, out: Path) -> None:
        if images < 1:
            raise InputError(f"calibration-images is {images}, expected at least 1")
        self.data = find_input(data)
        dataset = load_dataset(self.data, "train")
        chosen = np.random.default_rng(_SEED).permutation(len(dataset))[:images]
        checkpoint, architecture = _checkpoint(weights), None
        if checkpoint is None:
            architecture = weights if Path(weights).exists() else weights.removesuffix(".yaml")
        stem = (checkpoint or Path(str(architecture))).stem
        self.folder = out.absolute() / f"{stem}_{imgsz}"
        self._records = [dataset.images[index] for index in chosen]
        paths = tuple(record.path.absolute() for record in self._records)
        self._job = Job("", stem, imgsz, checkpoint, architecture, tuple(dataset.class_names), paths)

    @property
    def images(self) -> int:
        """Of the calibration."""
        return len(self._job.images)

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        """What decides all that is made of it."""
        job = self._job
        files = [file for file in (job.weights, job.architecture) if file is not None and Path(file).is_file()]
        return {
            "version": [_VERSION, __version__],
            "imgsz": job.imgsz,
            "model": [sha256_file(file) for file in files] or job.architecture,
            "names": job.names,
            "images": digest_images(self._records),
            "packages": package_versions(_PACKAGES),
        }

    @cached_property
    def _source(self) -> tuple[Path, dict[str, Any]]:
        """Folder of the float model as ONNX and, where its weights are random, as a checkpoint; and its facts."""
        folder = self._made(replace(self._job, kind="float_model"))
        return folder, json.loads((folder / "facts.json").read_text(encoding="utf-8"))

    @property
    def checkpoint(self) -> Path:
        """The weights, also where they are random.

        Raises:
            QyoloError: They are not usable.
        """
        return self._job.weights or self._source[0] / f"{self._job.stem}.safetensors"

    @property
    def family(self) -> str:
        """Who has built the architecture: `yolov5` or `ultralytics`."""
        return str(self._source[1]["family"])

    def engine(self, peer: Peer) -> Path:
        """A peer's engine, made now if it is not there.

        Raises:
            QyoloError: It could not be made.
        """
        folder = self._made(replace(self._job, kind=peer.name.replace("-", "_"), source=self._source[0]))
        found = [path for path in folder.iterdir() if path.suffix == ".onnx" or path.name.endswith(OPENVINO_SUFFIX)]
        return found[0]

    def _made(self, job: Job) -> Path:
        key = sha256_json([job.kind, self._inputs])
        folder = self.folder / f"{job.kind}-{key[:12]}"
        if not folder.is_dir():
            log = self.folder / f"{job.kind}.log"
            with atomic_dir(folder) as temporary:
                _in_process(replace(job, folder=temporary), log)
        return folder


def _checkpoint(weights: str) -> Path | None:
    if weights.startswith(BUILTIN):
        return builtin_weights(weights)
    return find_input(weights, what="weights").absolute() if weights.endswith(_CHECKPOINTS) else None


def peer_subjects(model: FloatModel, hints: Sequence[str], progress: Tick | None = None) -> list[Subject]:
    """Rows of all peers; where one cannot be made, its row tells why.

    Args:
        model: What they are made of.
        hints: Precision hints of those on OpenVINO.
        progress: Called after each.

    Raises:
        QyoloError: The float model is not usable.
    """
    family = model.family
    subjects: list[Subject] = []
    for done, peer in enumerate(PEERS):
        if progress is not None:
            progress(done, len(PEERS), peer.name)
        subjects += _subjects(model, peer, family, hints)
    if progress is not None:
        progress(len(PEERS), len(PEERS))
    return subjects


def _subjects(model: FloatModel, peer: Peer, family: str, hints: Sequence[str]) -> list[Subject]:
    note = refusal(peer, family)
    if not note:
        try:
            return with_hints(peer.name, model.engine(peer), hints, peer.note, required=False)
        except QyoloError as error:
            note = f"{error}. {error.hint or ''}".strip()
    return [Subject(peer.name, None, peer.runtime, None, note, required=False)]


def refusal(peer: Peer, family: str) -> str:
    """Why there is no engine to compare with; empty where there is."""
    if peer.is_of_ultralytics and family != "ultralytics":
        return "does not apply: ultralytics has no anchor-based YOLOv5"
    if absent := [package for package in peer.needs if importlib.util.find_spec(package) is None]:
        return f'needs {" and ".join(absent)}: pip install "qyolo_deploy[build,bench]"'
    return ""


def _in_process(job: Job, log: Path) -> None:
    """Does a job in a process of its own, whose words go to a file.

    Raises:
        QyoloError: It failed.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _log_to, (str(log),)) as pool:
        try:
            pool.submit(_work, job).result()
        except BrokenProcessPool as error:
            raise QyoloError(f"its process ended; {log} tells more") from error


def _log_to(path: str) -> None:
    """Sends stdout and stderr to a file: libraries like to talk, and stdout is for the result alone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _work(job: Job) -> None:
    try:
        getattr(importlib.import_module("qyolo_deploy.stages.bench_engines_builders"), job.kind)(job)
    except QyoloError:
        raise
    except ImportError as error:
        raise RuntimeMissingError(str(error), 'pip install "qyolo_deploy[build,bench]"') from None
    except Exception as error:  # noqa: BLE001 (tools of others raise anything, and their row should tell it)
        with contextlib.suppress(OSError):
            os.write(2, f"{error!r}\n".encode())
        text = " ".join(str(error).split())[:200]
        raise QyoloError(f"could not be made: {type(error).__name__}: {text}") from None
