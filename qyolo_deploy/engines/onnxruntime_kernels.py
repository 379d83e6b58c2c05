"""What ONNX Runtime really executes: the kernels of a session with their precisions and times."""

import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qyolo_deploy.engines.kernels import Kernel

_PRECISIONS = {"float": "f32", "float16": "f16", "uint8": "u8", "int8": "i8", "int32": "i32", "int64": "i64"}


def profile_kernels(path: Path, options: Any, images: NDArray[np.float32], runs: int = 9) -> list[Kernel]:
    """The kernels in order of execution, with their times.

    Args:
        path: An ONNX file with one input.
        options: `onnxruntime.SessionOptions` of a session that is not open; profiling is switched on.
        images: float32 `[N, 3, H, W]`.
        runs: How often it runs, after one run that does not count.
    """
    with TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 1):
            session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["args"]["node_index"], []).append(event)
    return [_kernel(records) for records in found.values()]


def _kernel(records: list[dict[str, Any]]) -> Kernel:
    """One node, from its records of all runs."""
    name, facts = records[0]["name"].removesuffix("_kernel_time"), records[0]["args"]
    outputs = facts["output_type_shape"]
    kind = next(iter(outputs[0]), "") if outputs else ""
    time_ms = median(record["dur"] for record in records[1:]) / 1e3
    return Kernel(name, facts["op_name"], _PRECISIONS.get(kind, kind), (name,), time_ms)
