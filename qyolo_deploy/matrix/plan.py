"""The file behind `qyolo matrix`, and the builds that it asks for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from qyolo_deploy.errors import InputError
from qyolo_deploy.recipe import Positive, Recipe, Section
from qyolo_deploy.recipe_file import load_recipe, read_mapping
from qyolo_deploy.strict import validation_message

_SEED_KEYS = ("train.seed", "correct.seed")  # the float model is the same for all
# A cell is a measurement, not a product.
_FIXED = {"gates": (), "validate.latency_runs": 1}

Settings = dict[str, Any]


class Entry(Section):
    """A row or a column.

    Attributes:
        name: Its head.
        set: Keys of the recipe, dotted, and their values.
        view: Whose number it shows, where that is not the matrix's view; a column's goes before a row's.
    """

    name: Annotated[str, Field(min_length=1)]
    set: Settings = Field(default_factory=dict)
    view: str | None = None


class Budget(Section):
    """A shorter way through the same matrix.

    Attributes:
        note: What it leaves out; stands above every table.
        set: Keys of the recipe, dotted; they override the matrix's, and rows and columns override them.
    """

    note: Annotated[str, Field(min_length=1)]
    set: Settings = Field(default_factory=dict)


class Matrix(Section):
    """A table of measurements.

    Attributes:
        name: Names the output folder.
        recipe: Base recipe, beside this file.
        set: Keys of the recipe for all cells.
        rows: Methods; a column's settings override a row's.
        columns: Settings to try each method with.
        seeds: Builds of each cell.
        view: Whose number the table shows, as in `report.json`.
        metric: Which one, a fraction such as `map50_95`.
        published: Row -> column -> points, of the literature.
        budgets: Name -> settings that make it affordable.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    recipe: str
    set: Settings = Field(default_factory=dict)
    rows: Annotated[tuple[Entry, ...], Field(min_length=1)]
    columns: Annotated[tuple[Entry, ...], Field(min_length=1)]
    seeds: Positive = 1
    view: str = "onnxruntime"
    metric: str = "map50_95"
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    budgets: dict[str, Budget] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_known(self) -> "Matrix":
        rows, columns = [row.name for row in self.rows], [column.name for column in self.columns]
        for kind, names in (("rows", rows), ("columns", columns)):
            if len(set(names)) < len(names):
                raise ValueError(f"{kind}: expected every name once")
        for row, numbers in self.published.items():
            if row not in rows or not set(numbers) <= set(columns):
                raise ValueError(f"published.{row}: expected names of rows and columns")
        return self

    def view_of(self, row: str, column: str) -> str:
        """Name of the view whose number a cell shows."""
        (across,) = (entry.view for entry in self.rows if entry.name == row)
        (down,) = (entry.view for entry in self.columns if entry.name == column)
        return down or across or self.view


@dataclass(frozen=True)
class Cell:
    """One build.

    Args:
        row: Name of its row.
        column: Name of its column.
        seed: Of training and correction.
        settings: `key.path=value` on the base recipe.
        recipe: The recipe with these settings.
    """

    row: str
    column: str
    seed: int
    settings: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row}, {self.column}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Name of the cell's own folder."""
        return "-".join((_slug(self.row), _slug(self.column), str(self.seed)))

    @property
    def float_key(self) -> str:
        """Same for all cells that start from the same float model."""
        return json.dumps([self.recipe.section(name) for name in ("data", "model", "float")])

    @property
    def train_key(self) -> str:
        """Same for all cells that share their training."""
        trained = [self.recipe.section(name) for name in ("quantization", "train")]
        return json.dumps([self.float_key, trained, self.recipe.export.targets])


def load_matrix(path: Path) -> Matrix:
    """Reads a matrix file.

    Raises:
        InputError: One sentence that names the file, the key and what was expected.
    """
    try:
        return Matrix.model_validate(read_mapping(path, "matrix"))
    except ValidationError as error:
        raise InputError(f"{path}: {validation_message(error)}") from error


def cells_of(
    matrix: Matrix, path: Path, budget: str | None, seeds: int | None, settings: tuple[str, ...]
) -> list[Cell]:
    """All builds of a matrix, row by row.

    Args:
        matrix: From `load_matrix`.
        path: Its file, beside which the recipe lies.
        budget: Name of one of its budgets.
        seeds: Instead of the matrix's number.
        settings: `key.path=value` for all cells; they override everything else.

    Raises:
        InputError: If the recipe is not usable with the settings of a cell, or there is no such budget.
    """
    if budget is not None and budget not in matrix.budgets:
        known = ", ".join(matrix.budgets) or "none in this file"
        raise InputError(f"{path}: budgets: expected one of {known}, found {budget!r}")
    shorter = {} if budget is None else matrix.budgets[budget].set
    base = path.parent / matrix.recipe
    cells = []
    for row in matrix.rows:
        for column in matrix.columns:
            for seed in range(seeds or matrix.seeds):
                keys = _FIXED | matrix.set | shorter | row.set | column.set | dict.fromkeys(_SEED_KEYS, seed)
                own = (*(f"{key}={json.dumps(value)}" for key, value in keys.items()), *settings)
                recipe = load_recipe(base, own)
                if (view := matrix.view_of(row.name, column.name)) not in recipe.views:
                    raise InputError(f"{path}: view: {view!r} is not among the views of {base}")
                cells.append(Cell(row.name, column.name, seed, own, recipe))
    return cells


def _slug(text: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in text.lower())
