"""What a matrix gives, cell by cell and in numbers over seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qyolo_deploy.matrix.plan import Matrix


@dataclass(frozen=True)
class CellResult:
    """What one cell gave.

    Attributes:
        row: Name of its row.
        column: Name of its column.
        seed: Of training and correction.
        values: View -> the matrix's metric; empty where the cell failed.
        oscillating: Share of oscillating weights of its low-bit layers.
        error: Why it failed.
    """

    row: str
    column: str
    seed: int
    values: dict[str, float]
    oscillating: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row}, {self.column}, seed {self.seed}"


@dataclass(frozen=True)
class MatrixResult:
    """A whole matrix: its definition, what its budget left out, where it lies, and its cells."""

    matrix: Matrix
    note: str | None
    folder: Path
    cells: tuple[CellResult, ...]

    def points(self, row: str, column: str) -> list[float]:
        """The metric of a cell's seeds in points, failed ones left out, of the view that the cell shows."""
        own = [cell for cell in self.cells if (cell.row, cell.column) == (row, column)]
        return [100 * cell.values[self.matrix.view_of(row, column)] for cell in own if cell.values]

    def oscillating(self, row: str, column: str) -> float | None:
        """Mean percentage of oscillating weights."""
        own = [cell for cell in self.cells if (cell.row, cell.column) == (row, column)]
        shares = [100 * cell.oscillating for cell in own if cell.oscillating is not None]
        return statistics.mean(shares) if shares else None

    @property
    def failed(self) -> tuple[CellResult, ...]:
        """Cells without a number."""
        return tuple(cell for cell in self.cells if cell.error is not None)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
