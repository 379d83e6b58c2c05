"""What OpenVINO really executes: the kernels of a compiled model with their precisions and times."""

from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.engines.kernels import Kernel

# Of the executed graph: data, and views of it that no kernel computes.
_NOT_COMPUTED = frozenset(["Const", "Input", "Output", "Reshape"])


def executed_kernels(compiled: Any) -> list[Kernel]:
    """The kernels of an `openvino.CompiledModel` in order of execution."""
    return _kernels(compiled, {})


def profile_kernels(compiled: Any, images: NDArray[np.float32], runs: int = 9) -> list[Kernel]:
    """The same with times, of a model compiled with `PERF_COUNT`.

    Args:
        compiled: An `openvino.CompiledModel`.
        images: float32 `[N, 3, H, W]`.
        runs: How often it runs, after one run that does not count.
    """
    request = compiled.create_infer_request()
    request.infer([images])
    times: dict[str, list[float]] = {}
    for _ in range(runs):
        request.infer([images])
        for record in request.profiling_info:
            times.setdefault(record.node_name, []).append(record.real_time.total_seconds() * 1e3)
    return _kernels(compiled, {name: median(values) for name, values in times.items()})


def _kernels(compiled: Any, times_ms: dict[str, float]) -> list[Kernel]:
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        kind = facts["layerType"].astype(str)
        if kind in _NOT_COMPUTED:
            continue
        name = node.get_friendly_name()
        fused = tuple(part for part in facts["originalLayersNames"].astype(str).split(",") if part)
        precision = facts["runtimePrecision"].astype(str)
        found.append(Kernel(name, kind, precision, fused, times_ms.get(name, 0.0)))
    return found
