"""Runs or resumes the cells of a matrix, each a build; what cells have in common is made once."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.console import Reporter, Tick
from qyolo_deploy.errors import QyoloError
from qyolo_deploy.matrix.plan import Cell, cells_of, load_matrix
from qyolo_deploy.matrix.results import CellResult, MatrixResult
from qyolo_deploy.matrix.table import write_csv, write_markdown, write_plot
from qyolo_deploy.pipeline import BuildResult, build


def run_matrix(
    file: str | Path,
    data: str | None = None,
    out: str | Path = "runs",
    seeds: int | None = None,
    budget: str | None = None,
    settings: Sequence[str] = (),
    jobs: int = 1,
    device: str = "auto",
    progress: Tick | None = None,
) -> MatrixResult:
    """Builds every cell up to its validation and writes table, CSV and plot.

    Args:
        file: Matrix YAML.
        data: Dataset instead of the recipe's.
        out: Folder under which `<matrix name>/` is made; finished cells there are kept.
        seeds: Builds of each cell, instead of the file's number.
        budget: One of the file's budgets.
        settings: `key.path=value` for all cells.
        jobs: Cells at a time, each in a process with its share of the cores.
        device: What training computes on, as `build` takes it.
        progress: Called with cells done, in total and the last one's name.

    Raises:
        InputError: If the file or its recipe is not usable; a cell that fails later is recorded in the result.
    """
    path = Path(file)
    matrix = load_matrix(path)
    cells = cells_of(matrix, path, budget, seeds, tuple(settings))
    folder = Path(out) / (matrix.name if budget is None else f"{matrix.name}-{budget}")
    builds = _Builds(path.parent / matrix.recipe, folder / "cells", data, matrix.metric, device)
    # What all cells need is made first, and what is wrong with it ends the matrix.
    for start in {cell.float_key: cell for cell in reversed(cells)}.values():
        builds.build(start, until="float")
    results: dict[str, CellResult] = {}
    for result in _in_groups(_groups(cells), builds, jobs):
        results[result.name] = result
        if progress is not None:
            progress(len(results), len(cells), result.name)
    ordered = tuple(results[cell.name] for cell in cells)
    whole = MatrixResult(matrix, None if budget is None else matrix.budgets[budget].note, folder, ordered)
    _write(whole)
    return whole


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share their training go one after the other, so that it is there for all but the first."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.train_key, []).append(cell)
    return list(groups.values())


@dataclass(frozen=True)
class _Builds:
    """What the builds of all cells have in common."""

    recipe: Path
    folder: Path
    data: str | None
    metric: str
    device: str

    def build(self, cell: Cell, until: str) -> BuildResult:
        own, quiet = self.folder / cell.folder, Reporter(quiet=True)
        return build(
            self.recipe,
            cell.settings,
            self.data,
            own,
            until=until,
            reporter=quiet,
            share=self.folder,
            device=self.device,
        )

    def measure(self, cell: Cell) -> CellResult:
        """Builds a cell; an error is its result, so that the others go on."""
        try:
            built = self.build(cell, until="validate")
        except QyoloError as error:
            return CellResult(cell.row, cell.column, cell.seed, {}, error=str(error))
        values = {str(view["name"]): float(view[self.metric]) for view in built.views}
        diagnostics = json.loads((built.folder / "train" / "diagnostics.json").read_text(encoding="utf-8"))
        return CellResult(cell.row, cell.column, cell.seed, values, diagnostics["oscillating"])

    def measure_all(self, group: Sequence[Cell]) -> list[CellResult]:
        return [self.measure(cell) for cell in group]


def _in_groups(groups: Sequence[Sequence[Cell]], builds: _Builds, jobs: int) -> Iterator[CellResult]:
    if jobs == 1:
        yield from (builds.measure(cell) for group in groups for cell in group)
        return
    # Inherited by the workers: libraries read it when they are loaded.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(builds.measure_all, group) for group in groups]):
            yield from future.result()


def _write(result: MatrixResult) -> None:
    cells = [asdict(cell) for cell in result.cells]
    write_atomic(result.folder / "cells.json", json.dumps(cells, indent=1))
    write_csv(result)
    write_markdown(result)
    write_plot(result)
