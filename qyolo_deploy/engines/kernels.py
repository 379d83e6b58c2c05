"""What a runtime makes of a network: its kernels, which are fewer and other than the operators of the file."""

from collections.abc import Sequence
from dataclasses import dataclass

_INTEGERS = frozenset(["i8", "u8"])


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that a runtime executes.

    Args:
        name: Of the node.
        kind: In OpenVINO `Convolution`, `Reorder`, `Subgraph` (a run of elementwise operators compiled together) and so
            on, in ONNX Runtime the operator: `QLinearConv`, `Concat`.
        precision: In which it computes; of ONNX Runtime, which does not tell, the type of what comes out.
        fused: Names of the operators of the model that it computes.
        time_ms: Median over the profiled runs; 0 where nothing was measured.
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


def kernel_table(kernels: Sequence[Kernel]) -> list[tuple[str, str, int, float]]:
    """Kind, precision, number and milliseconds of kernels, the slowest kind first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.kind, kernel.precision), []).append(kernel.time_ms)
    rows = [(kind, precision, len(times), sum(times)) for (kind, precision), times in groups.items()]
    return sorted(rows, key=lambda row: (-row[3], row[:2]))
