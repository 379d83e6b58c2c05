"""`qyolo compare` and `qyolo sensitivity` on a finished build."""

import csv
import json
from xml.etree import ElementTree

import pytest
import yaml

from qyolo_deploy.recipe import Recipe


def test_compare_names_what_the_report_names(tiny_build, qyolo, tmp_path):
    folder, out = tiny_build.folder, tmp_path / "parity.csv"
    views = f"{folder}@fake_quantized", f"{folder}@openvino"
    outcome = qyolo("compare", *views, "--data", folder / "data", "--images", 2, "--out", out, "--json")
    assert outcome.code == 0, outcome.stderr
    found, told = outcome.json, tiny_build.report["parity"]["openvino"]
    assert (found["reference"], found["compared"]) == views
    assert found["images"] == told["images"] == 2
    assert found["first_departure"] == told["first_departure"]
    assert found["min_sqnr_db"] == pytest.approx(told["min_sqnr_db"], rel=1e-5)
    rows = list(csv.DictReader(out.open()))
    assert [row["name"] for row in rows] == [layer["name"] for layer in told["layers"]]
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("│ >")]
    assert found["first_departure"] in line
    assert f"first departure: {found['first_departure']}" in outcome.stdout


def test_the_report_tells_parity_by_layer_and_gates_can_ask_for_it(tiny_build):
    parity = tiny_build.report["parity"]
    assert set(parity) == {"onnxruntime", "openvino"}
    views = {view["name"]: view for view in tiny_build.report["views"]}
    for name, found in parity.items():
        keys = {"name", "sqnr_db", "cosine", "max_error", "differing"}
        assert all(keys <= set(layer) for layer in found["layers"])
        summary = views[name]["parity"]
        assert summary["min_sqnr_db"] == pytest.approx(min(layer["sqnr_db"] for layer in found["layers"]), rel=1e-5)
        assert summary["images"] == found["images"]
    assert views["onnxruntime"]["parity"]["differing"] < 1e-3
    assert views["float"]["parity"] is None


def test_a_float_view_has_a_threshold_and_an_engine_its_size(tiny_build, qyolo):
    engine = tiny_build.folder / "engines" / "onnxruntime" / "quickstart_fp32.onnx"
    arguments = ("compare", engine, tiny_build.onnx, "--data", tiny_build.folder / "data", "--images", 1)
    noisy = qyolo(*arguments, "--threshold", 100, "--json")
    assert noisy.code == 0, noisy.stderr
    assert noisy.json["first_departure"] == "model.0.act.mul"  # the first that no SiLU reads
    calm = qyolo(*arguments, "--threshold", -100, "--json")
    assert calm.json["first_departure"] is None and "no tensor departs: none is below -100 dB" in calm.stdout
    assert "its input is fixed to 128 x 128 px, but imgsz is 64" in qyolo(*arguments, "--imgsz", 64).stderr


@pytest.mark.slow
def test_sensitivity_ranks_and_gives_overrides(tiny_build, qyolo, tmp_path):
    arguments = (tiny_build.folder, "--data", tiny_build.folder / "data", "--images", 2, "--worst", 3)
    outcome = qyolo("sensitivity", *arguments, "--out", tmp_path / "found", "--json")
    assert outcome.code == 0, outcome.stderr
    parts = outcome.json["parts"]
    assert [part["sqnr_db"] for part in parts] == sorted(part["sqnr_db"] for part in parts)
    weights = [part for part in parts if part["kind"] == "weights" and part["bits"] == 4]
    assert len(weights) > 40 and {part["bits"] for part in parts} == {4, 8}
    # What is printed can be pasted into the recipe.
    lines = yaml.safe_load("\n".join(outcome.json["overrides"]))
    overrides = lines["quantization"]["overrides"]
    assert list(overrides) == [part["name"] for part in weights[:3]]
    recipe = yaml.safe_load((tiny_build.folder / "recipe.resolved.yaml").read_text())
    recipe["quantization"]["overrides"] = overrides
    scheme = Recipe.model_validate(recipe).quantization.scheme()
    assert scheme.resolve(list(overrides), [])[weights[0]["name"]].weight_bits == 8
    rows = list(csv.DictReader((tmp_path / "found" / "sensitivity.csv").open()))
    assert [row["name"] for row in rows] == [part["name"] for part in parts]
    assert json.loads((tmp_path / "found" / "sensitivity.json").read_text())["parts"] == parts
    ElementTree.parse(tmp_path / "found" / "sensitivity.svg")


def test_compare_and_sensitivity_refuse_what_they_cannot_use(tiny_build, qyolo, tmp_path):
    data = tiny_build.folder / "data"
    for arguments, sentence in (
        (("compare", f"{tiny_build.folder}@tensorrt", tiny_build.onnx), "@tensorrt: expected one of float, fake_quant"),
        (("compare", tiny_build.onnx, tiny_build.onnx, "--out", tmp_path / "x.txt"), "expected a file that ends in"),
        (("sensitivity", tmp_path), "not a build folder"),
        (("sensitivity", tiny_build.folder, "--metric", "speed"), "--metric speed: expected one of sqnr, map, loss"),
    ):
        outcome = qyolo(*arguments, "--data", data)
        assert outcome.code == 2 and sentence in outcome.stderr
    assert list(tmp_path.iterdir()) == []
