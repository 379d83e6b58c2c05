"""What every engine offers: the protocol of a loaded one, and opening any engine file."""

import ast
import os
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.engines.heads import METADATA_KEY, Head
from qyolo_deploy.errors import InputError

OPENVINO_SUFFIX = "_openvino_model"
_MOST_PARALLEL = 8

Mode = Literal["latency", "throughput"]
"""What an engine is opened for: one image as soon as possible, or several at a time, each on a part of the cores."""


class Runner(Protocol):
    """A loaded engine.

    Attributes:
        path: The file or folder that it was loaded from.
        runtime: `onnxruntime`, `openvino` or `tensorrt`.
        imgsz: Height and width if they are fixed, else None.
        trained_imgsz: The longer side that the file's metadata names, if it does.
        names: Class names in the file's metadata; empty where it has none.
        parallel: Calls, each from a thread of its own, that it computes at the same time; 1 in the mode `latency`.
        head: How its raw maps are decoded; None where the engine decodes by itself.
    """

    path: Path
    runtime: str
    imgsz: tuple[int, int] | None
    trained_imgsz: int | None
    names: tuple[str, ...]
    parallel: int
    head: Head | None

    @property
    def precision_hint(self) -> str | None:
        """What the runtime was asked to compute in, if it can be asked."""

    def __call__(self, images: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Float32 `[N, 3, H, W]` in 0..1 to `output0`, float32 `[N, 4 + nc, A]`.

        A is the number of anchors, or of candidates where the runner decodes these alone. The array is the caller's
        to keep: no later call changes it.
        """

    def outputs(self, images: NDArray[np.float32], /) -> dict[str, NDArray[np.float32]]:
        """What the engine itself gives for such images, by name: `output0`, or raw head maps `[N, C, h, w]`."""


def open_engine(
    path: Path,
    precision_hint: str = "f32",
    conf: float = 0.001,
    threads: int | None = None,
    mode: Mode = "latency",
) -> Runner:
    """Loads an engine file of any kind.

    Args:
        path: `.onnx`, TensorRT's `.engine` or `.plan`, an OpenVINO `.xml`, or the folder that holds one.
        precision_hint: For OpenVINO; `f32` computes what the file says, `bf16` may be faster.
        conf: Of engines that end at raw head maps, only candidates with a score above it are decoded.
        threads: Of the CPU that compute; by default the runtime's choice.
        mode: Whether it serves one call at a time, or several.

    Raises:
        InputError: If there is no such file, it is of no known kind, or it cannot be loaded.
        RuntimeMissingError: If its runtime is not installed.
    """
    if not path.exists():
        raise InputError(f"{path}: no such engine")
    if path.suffix == ".onnx":
        from qyolo_deploy.engines.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(path, conf, threads, mode)
    if path.suffix == ".xml" or path.is_dir():
        from qyolo_deploy.engines.openvino import OpenVinoRunner

        return OpenVinoRunner(path, precision_hint, conf, threads, mode)
    if path.suffix in (".engine", ".plan"):
        from qyolo_deploy.engines.tensorrt import TensorRtRunner

        return TensorRtRunner(path, conf)
    raise InputError(f"{path}: expected an .onnx, .engine or .plan file, an OpenVINO .xml or the folder that holds one")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(threads: int | None) -> tuple[int, int]:
    """How many calls to compute at a time, and with how many threads each, for the most images a second."""
    cores = threads or available_cores()
    parallel = min(cores, _MOST_PARALLEL)
    return parallel, cores // parallel


def engine_files(path: Path) -> list[Path]:
    """The files of an engine: itself, or everything in its folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def parse_names(value: object) -> tuple[str, ...]:
    """Class names from metadata: a dict from index to name, or its text as ultralytics writes it."""
    data = _literal(value)
    if not isinstance(data, dict):
        return ()
    try:
        ordered = sorted(data, key=int)  # JSON turns indices into text, where 10 comes before 2
    except (TypeError, ValueError):
        return ()
    return tuple(str(data[key]) for key in ordered)


def parse_imgsz(value: object) -> int | None:
    """Longer side from metadata: `[height, width]` or its text."""
    data = _literal(value)
    sides = data if isinstance(data, list | tuple) else [data]
    return max(sides) if sides and all(isinstance(side, int) for side in sides) else None


def parse_head(path: Path, value: object, outputs: int) -> Head | None:
    """How to decode raw maps, from metadata; None where the engine decodes by itself.

    Raises:
        InputError: If the metadata do not describe a head of so many outputs.
    """
    try:
        head = Head.parse(value)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if head is not None and outputs != len(head.strides) * (1 if head.anchors else 2):
        raise InputError(f"{path}: {outputs} outputs do not fit its metadata '{METADATA_KEY}'")
    return head


def _literal(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
