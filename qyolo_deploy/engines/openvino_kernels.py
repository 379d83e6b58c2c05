"""What OpenVINO really executes: the kernels of a compiled model with their precisions and times."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the executed graph: data, and views of it that no kernel computes.
_NOT_COMPUTED = frozenset(["Const", "Input", "Output", "Reshape"])
_INTEGERS = frozenset(["i8", "u8"])


@dataclass(frozen=True)
class Kernel:
    """One node of the executed graph.

    Args:
        name: Of the node.
        kind: `Convolution`, `Reorder`, `Subgraph` (a run of elementwise operators compiled together) and so on.
        precision: In which it computes.
        fused: Names of the operators of the model that it computes.
        time_ms: Median over the runs of `profile_kernels`; 0 where nothing was measured.
    """

    name: str
    kind: str
    precision: str
    fused: tuple[str, ...]
    time_ms: float = 0.0

    @property
    def is_integer(self) -> bool:
        """Whether it computes in 8 bits."""
        return self.precision in _INTEGERS


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


def kernel_table(kernels: Sequence[Kernel]) -> list[tuple[str, str, int, float]]:
    """Kind, precision, number and milliseconds of kernels, the slowest kind first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.kind, kernel.precision), []).append(kernel.time_ms)
    rows = [(kind, precision, len(times), sum(times)) for (kind, precision), times in groups.items()]
    return sorted(rows, key=lambda row: (-row[3], row[:2]))


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
