import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.errors import InputError
from qyolo_deploy.matrix.plan import cells_of, load_matrix
from qyolo_deploy.matrix.results import CellResult, MatrixResult
from qyolo_deploy.matrix.run import run_matrix
from qyolo_deploy.matrix.table import caption, table, write_csv, write_plot
from qyolo_deploy.release.report_views import cards

PAPER = Path(__file__).parent.parent.parent / "recipes" / "paper"
SHIPPED = [path for path in sorted(PAPER.glob("*.yaml")) if "\nrows:" in path.read_text()]
RECIPE = {"name": "plain", "model": {"weights": "builtin:quickstart", "imgsz": 32}, "data": {"source": "synthetic"}}
MATRIX = {
    "name": "table",
    "recipe": "plain.yaml",
    "set": {"train.epochs": 4, "train.lr": 0.1},
    "rows": [{"name": "LSQ", "set": {"correct.state": "raw", "train.lr": 0.2}}, {"name": "EMA + damping"}],
    "columns": [{"name": "4 bits"}, {"name": "3 bits", "set": {"quantization.weights.bits": 3, "train.lr": 0.3}}],
    "seeds": 2,
    "budgets": {"minutes": {"note": "One epoch.", "set": {"train.epochs": 1, "train.lr": 0.4}}},
}


@pytest.fixture
def write(tmp_path):
    """Function from changed keys to a matrix file beside its recipe."""
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(RECIPE))

    def write(**changes):
        path = tmp_path / "matrix.yaml"
        path.write_text(yaml.safe_dump({**MATRIX, **changes}))
        return path

    return write


def cells(path, budget=None, seeds=None, settings=()):
    return cells_of(load_matrix(path), path, budget, seeds, settings)


def test_there_is_a_cell_for_each_row_column_and_seed(write):
    found = cells(write())
    expected = [(row, column, s) for row in ("LSQ", "EMA + damping") for column in ("4 bits", "3 bits") for s in (0, 1)]
    assert [(cell.row, cell.column, cell.seed) for cell in found] == expected
    assert len({cell.folder for cell in found}) == 8
    assert {(cell.seed, cell.recipe.train.seed, cell.recipe.correct.seed) for cell in found} == {(0, 0, 0), (1, 1, 1)}
    assert {cell.recipe.float.seed for cell in found} == {0}


@pytest.mark.parametrize(
    ("budget", "settings", "epochs", "rates"),
    [
        (None, (), 4, (0.2, 0.3, 0.1, 0.3)),
        ("minutes", (), 1, (0.2, 0.3, 0.4, 0.3)),
        ("minutes", ("train.lr=0.5", "train.epochs=2"), 2, (0.5,) * 4),
    ],
)
def test_columns_override_rows_and_these_a_budget_and_that_the_whole(write, budget, settings, epochs, rates):
    found = cells(write(), budget, 1, settings)
    assert {cell.recipe.train.epochs for cell in found} == {epochs}
    assert tuple(cell.recipe.train.lr for cell in found) == rates


def test_cells_share_what_they_have_in_common(write):
    found = cells(write(rows=[{"name": "raw", "set": {"correct.state": "raw"}}, {"name": "ema"}], set={}), seeds=1)
    raw4, raw3, ema4, ema3 = found
    assert len({cell.float_key for cell in found}) == 1
    assert raw4.train_key == ema4.train_key != raw3.train_key == ema3.train_key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "'rows': "),
        ({"colums": []}, "'colums': "),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "rows: expected every name once"),
        ({"published": {"LSQ": {"5 bits": 1.0}}}, "published.LSQ: expected names of rows and columns"),
        ({"set": {"train.fly": 1}}, "train.fly: unknown key"),
        ({"view": "tensorrt"}, "view: 'tensorrt' is not among the views"),
        ({"columns": [{"name": "4 bits", "view": "soft_rounded"}]}, "view: 'soft_rounded' is not among the views"),
        ({"recipe": "none.yaml"}, "none.yaml: no such recipe"),
    ],
)
def test_bad_files_are_refused_before_any_work(write, tmp_path, changes, message):
    with pytest.raises(InputError, match=message.replace("'", ".")):
        run_matrix(write(**changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_budget_is_refused(write):
    with pytest.raises(InputError, match="budgets: expected one of minutes, found 'hours'"):
        cells(write(), "hours")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_matrices_have_usable_cells(path):
    matrix = load_matrix(path)
    for budget in (None, *matrix.budgets):
        found = cells(path, budget, seeds=1)
        assert len(found) == len(matrix.rows) * len(matrix.columns)
        assert len({cell.folder for cell in found}) == len(found)


@pytest.mark.parametrize("text", ["rows: [", "- a", None])
def test_what_is_no_matrix_is_refused(tmp_path, text):
    path = tmp_path / "matrix.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"matrix\.yaml: "):
        load_matrix(path)


# --- tables -------------------------------------------------------------------------------------------------


@pytest.fixture
def result(write, tmp_path):
    path = write(published={"LSQ": {"4 bits": 20.6}})
    values = {("LSQ", "4 bits"): (0.2, 0.23), ("LSQ", "3 bits"): (0.1, 0.1), ("EMA + damping", "4 bits"): (0.25, 0.24)}
    found = [
        CellResult(row, column, seed, {"float": 0.3, "onnxruntime": value}, 0.05)
        for (row, column), pair in values.items()
        for seed, value in enumerate(pair)
    ]
    failed = [CellResult("EMA + damping", "3 bits", seed, {}, error="diverged, at step 3") for seed in (0, 1)]
    return MatrixResult(load_matrix(path), "One epoch.", tmp_path, (*found, *failed))


def test_the_table_tells_mean_spread_oscillation_and_what_was_published(result):
    head, rows = table(result)
    deviation = statistics.stdev([20, 23])
    assert head == ["", "4 bits", "3 bits"]
    assert rows == [
        ["LSQ", f"21.50 ± {deviation:.2f} | 5.0 % (20.6)", "10.00 ± 0.00 | 5.0 %"],
        ["EMA + damping", f"24.50 ± {deviation / 3:.2f} | 5.0 %", "failed"],
    ]
    text = caption(result)
    assert "2 seeds" in text and "float 30.00" in text and text.endswith("Budget: One epoch.")


def test_rows_and_columns_may_show_another_view(write, result):
    rows = [{"name": "LSQ", "view": "float"}, {"name": "EMA + damping"}]
    columns = [{"name": "4 bits"}, {"name": "3 bits", "view": "openvino"}]
    matrix = load_matrix(write(rows=rows, columns=columns))
    found = [[matrix.view_of(row["name"], column["name"]) for column in columns] for row in rows]
    assert found == [["float", "openvino"], ["onnxruntime", "openvino"]]
    other = replace(result, matrix=load_matrix(write(rows=rows)))
    assert other.points("LSQ", "4 bits") == [30, 30] and other.points("EMA + damping", "4 bits") == [25, 24]
    assert caption(other).startswith("map50_95 of onnxruntime in points; of float in LSQ; mean")


def test_the_csv_has_every_view_of_every_cell_and_the_failures(result):
    write_csv(result)
    with (result.folder / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 * 2 + 2
    assert [float(line["map50_95"]) for line in lines if line["view"] == "onnxruntime"][:2] == [0.2, 0.23]
    assert [line["error"] for line in lines if line["row"] == "EMA + damping"][-1] == "diverged, at step 3"


def test_the_plot_has_a_dot_for_each_number(result):
    write_plot(result)
    svg = ElementTree.parse(result.folder / "plot.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(svg.findall(".//{*}g[@class='one']")) == 6


# --- builds -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_matrix(tiny_build, tmp_path_factory):
    """The quickstart's raw and EMA states, trained once; and what cannot be trained."""
    folder = tmp_path_factory.mktemp("matrix")
    settings = {key: yaml.safe_load(str(value)) for key, value in (s.split("=", 1) for s in tiny_build.settings)}
    settings |= {"export.targets": ["onnxruntime"], "train.epochs": 1, "correct.enabled": False}
    settings |= {"validate.soft_rounding": True}
    (folder / "quick.yaml").write_text(yaml.safe_dump({"extends": str(tiny_build.recipe)}))
    file = folder / "small.yaml"
    rows = [
        {"name": "raw", "set": {"correct.state": "raw"}},
        {"name": "ema"},
        {"name": "soft", "view": "soft_rounded"},
        {"name": "wrong", "set": {"quantization.keep_float": ["model.77.*"]}},
    ]
    file.write_text(
        yaml.safe_dump(
            {"name": "small", "recipe": "quick.yaml", "set": settings, "rows": rows, "columns": [{"name": "W4A8"}]}
        )
    )
    return file, folder / "out"


@pytest.mark.slow
def test_a_matrix_trains_once_what_cells_share_and_records_failures(small_matrix):
    file, out = small_matrix
    result = run_matrix(file, out=out)
    values = [(cell.row, bool(cell.values)) for cell in result.cells]
    assert values == [("raw", True), ("ema", True), ("soft", True), ("wrong", False)]
    assert "model.77.*" in result.cells[3].error
    events = [json.loads(line) for line in (out / "small/cells/ema-w4a8-0/quickstart/events.jsonl").open()]
    taken = {event["stage"] for event in events if event["event"] == "taken over"}
    assert {"data", "float", "train"} <= taken
    assert result.cells[0].values["fake_quantized"] != result.cells[1].values["fake_quantized"]
    assert result.points("soft", "W4A8") == [100 * result.cells[1].values["soft_rounded"]]
    saved = json.loads((out / "small" / "cells.json").read_text())
    assert [cell["values"] for cell in saved] == [cell.values for cell in result.cells]


@pytest.mark.slow
def test_softly_rounded_weights_are_measured_beside_those_of_the_engines(small_matrix):
    file, out = small_matrix
    result = run_matrix(file, out=out)
    assert [cell.row for cell in result.cells[:2]] == ["raw", "ema"]
    for state in ("raw", "ema"):
        folder = out / "small" / "cells" / f"{state}-w4a8-0" / "quickstart"
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        views = {view["name"]: view for view in report["views"]}
        soft = views["soft_rounded"]
        assert soft["digests"]["model"] == sha256_file(folder / "train" / f"{state}.safetensors")
        assert (soft["size_bytes"], soft["latency_ms"]) == (None, None) and 0 < soft["map50_95"] < 1
        assert soft["map50_95"] == pytest.approx(views["fake_quantized"]["map50_95"], abs=0.1)
        assert soft["map50_95"] != views["fake_quantized"]["map50_95"]
        assert [card["title"] for card in cards(report["views"])] == ["ONNX Runtime"]
        assert all("soft_rounded" not in example["views"] for example in report["images"]["examples"])


def test_the_command_goes_on_where_cells_are_finished_and_fails_with_them(small_matrix, qyolo):
    file, out = small_matrix
    run_matrix(file, out=out)
    outcome = qyolo("matrix", file, "--out", out, "--json", "--quiet")
    assert outcome.code == 1
    assert [cell["error"] is None for cell in outcome.json["cells"]] == [True, True, True, False]
    assert (out / "small" / "table.md").read_text().count("\n| ") >= 4
    outcome = qyolo("matrix", file, "--out", out)
    assert outcome.code == 1
    assert "1 of 4 cells failed; wrong, W4A8, seed 0" in outcome.stderr
    assert "failed" in outcome.stdout and "EMA" not in outcome.stderr
