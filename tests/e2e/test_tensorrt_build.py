"""TensorRT as a target: what a build leaves with and without TensorRT, and finishing it from the release."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from qyolo_deploy import pipeline
from qyolo_deploy.engines.tensorrt_runtime import find_device
from qyolo_deploy.release.verify import verify_release

GRAPH = "tensorrt_graph_on_onnxruntime"
TARGETS = "export.targets=[onnxruntime,tensorrt]"
NAME = "quickstart_w4a8"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_device() is not None, reason="these are about machines without a GPU"),
]


def gates(view):
    gate = f'{{view: {view}, metric: map50_95, op: ">=", bound: -0.05, relative_to: fake_quantized}}'
    return f"gates=[{gate}]"


def build(tiny, *settings):
    return pipeline.build(tiny.recipe, (*tiny.settings, TARGETS, *settings), out=tiny.out)


def hide(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="module")
def finished(tiny_build, tmp_path_factory):
    """The small build once more, for TensorRT too, which is not installed."""
    tiny = replace(tiny_build, out=shutil.copytree(tiny_build.out, tmp_path_factory.mktemp("tensorrt") / "out"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        hide(monkeypatch, "tensorrt", "tensorrt_rtx")
        result = build(tiny, gates(GRAPH))
    return tiny, result


def test_without_tensorrt_all_is_written_for_a_device_and_no_number_is_made_up(finished):
    tiny, result = finished
    assert result.passed and result.up_to_date == ("data", "float", "train", "correct")
    assert [view["name"] for view in result.views] == ["float", "fake_quantized", "onnxruntime", GRAPH]
    (missing,) = result.not_run
    assert (missing["name"], missing["status"]) == ("tensorrt", "not built")
    assert "not installed" in missing["reason"]
    assert result.views[-1]["latency_ms"] is None
    assert result.views[-1]["map50_95"] > 0
    assert tiny.report["not_run"] == [missing]
    assert any(note.startswith("TensorRT engine: not built") for note in tiny.report["quantization"]["notes"])
    assert any("do not fit int8 without a zero point" in note for note in tiny.report["quantization"]["notes"])
    assert "TensorRT (not built)" in (tiny.folder / "report.html").read_text(encoding="utf-8")
    written = {path.name for path in (tiny.folder / "engines" / "tensorrt").iterdir()}
    assert written == {f"{NAME}.onnx", "build.json", "trtexec.txt"}


def test_the_release_holds_what_a_device_needs(finished):
    tiny, _ = finished
    verified = verify_release(tiny.folder / "release")
    inside = {file.path for file in verified.manifest.files}
    assert {f"engines/tensorrt/{name}" for name in (f"{NAME}.onnx", "build.json", "trtexec.txt")} <= inside
    assert {engine.view for engine in verified.manifest.engines} == {"float", "onnxruntime", GRAPH}


def test_weights_alone_are_rounded_where_the_recipe_says_so(finished, tmp_path, monkeypatch):
    tiny, before = finished
    tiny = replace(tiny, out=shutil.copytree(tiny.out, tmp_path / "out"))
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    result = build(tiny, gates(GRAPH), "export.tensorrt.activations=float")
    sizes = [views[-1]["size_bytes"] for views in (before.views, result.views)]
    assert result.views[-1]["name"] == GRAPH and sizes[1] < sizes[0]
    assert "TensorRT: weights alone are rounded, activations are float." in tiny.report["quantization"]["notes"]
    written = {path.name for path in (tiny.folder / "release" / "engines" / "tensorrt").iterdir()}
    assert written == {f"{NAME}_weights.onnx", "build.json", "trtexec.txt"}


def test_a_gate_on_an_engine_that_was_not_run_fails(finished, monkeypatch):
    tiny, _ = finished
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    result = build(tiny, gates("tensorrt"))
    assert not result.passed
    assert "there is no view tensorrt" in result.gates[0]["reason"]
    assert not (tiny.folder / "release").exists()
    build(tiny, gates(GRAPH))


def test_trained_for_tensorrt_alone_its_graph_computes_what_was_trained(tiny_build, tmp_path, monkeypatch):
    """Around 0, and with nothing rounded inside activations: neither coarser steps nor other codes are left."""
    tiny = replace(tiny_build, out=shutil.copytree(tiny_build.out, tmp_path / "out"))
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    result = build(tiny, "export.targets=[tensorrt]", "quantization.activations.grid=symmetric", gates(GRAPH))
    assert result.passed
    views = {view["name"]: view for view in result.views}
    assert set(views) == {"float", "fake_quantized", GRAPH}
    assert views[GRAPH]["map50_95"] == pytest.approx(views["fake_quantized"]["map50_95"], abs=0.002)
    assert not any("do not fit int8" in note for note in tiny.report["quantization"]["notes"])
    verify_release(tiny.folder / "release")


def test_a_gate_that_is_left_to_the_device_goes_there_with_the_release(finished, monkeypatch):
    tiny, _ = finished
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    gate = '{view: tensorrt, metric: map50_95, op: ">=", bound: -0.01, relative_to: fake_quantized, at: device}'
    result = build(tiny, f"gates=[{gate}]")
    assert result.passed and result.gates == ()
    assert verify_release(tiny.folder / "release").manifest.gates == ()
    spec = json.loads((tiny.folder / "release" / "engines" / "tensorrt" / "build.json").read_text())
    assert [(one["view"], one["bound"], one["at"]) for one in spec["gates"]] == [("tensorrt", -0.01, "device")]
    assert any(note.startswith("Gates left to the device: 1;") for note in tiny.report["quantization"]["notes"])
    build(tiny, gates(GRAPH))


def test_the_table_names_it(finished, capsys):
    from qyolo_deploy.cli import _print_build

    _print_build(finished[1].to_json())
    row = next(line for line in capsys.readouterr().out.splitlines() if "│ tensorrt " in line)
    assert "not built" in row and row.count(" - ") == 5


ON_DEVICE = """
import json, sys
from qyolo_deploy.cli import main
sys.argv = ["qyolo", "engine", "build", *sys.argv[1:]]
try:
    main()
finally:
    heavy = ("torch", "onnx", "onnx_ir", "ultralytics", "openvino")
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def on_device(qyolo, *arguments):
    command = [sys.executable, "-c", ON_DEVICE, *map(str, arguments)]
    return subprocess.run(command, env=qyolo.environment(), capture_output=True, text=True, check=False)


def test_the_engine_is_finished_from_the_release_without_the_training_stack(finished, qyolo, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    tiny, _ = finished
    process = on_device(qyolo, tiny.folder / "release", "--out", tmp_path, "--json")
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[-1] == "[]"
    found = json.loads(process.stdout.splitlines()[-1])
    assert (found["status"], found["views"]) == ("built, not run", [])
    assert found["record"]["gpu"] is None and found["record"]["weights_bytes"] > 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{NAME}.engine", f"{NAME}.plan", f"{NAME}.plan.json", "tensorrt_report.json"}
    assert found["release"] is None  # what was not measured is not released
    told = {**found, "engine": f"{NAME}.engine", "plan": f"{NAME}.plan"}
    del told["release"]
    assert json.loads((tmp_path / "tensorrt_report.json").read_text()) == told
    verify_release(tiny.folder / "release")  # which stays as it was


def test_measuring_without_a_gpu_is_refused_before_anything_is_built(finished, qyolo, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    tiny, _ = finished
    process = on_device(qyolo, tiny.folder / "release", "--out", tmp_path, "--data", tiny.folder / "data")
    assert process.returncode == 3
    assert "runs engines on a GPU only, and none was found" in process.stderr
    assert "hint: Without --data" in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_with_tensorrt_rtx_the_engine_is_built_and_not_run(finished, tiny_copy):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    result = build(tiny_copy, gates(GRAPH))
    (missing,) = result.not_run
    assert (missing["name"], missing["status"]) == ("tensorrt", "built, not run")
    assert "without a GPU" in missing["reason"]
    notes = tiny_copy.report["quantization"]["notes"]
    assert any(note.startswith("TensorRT engine: weights take") for note in notes)
    inside = {file.path for file in verify_release(tiny_copy.folder / "release").manifest.files}
    assert {f"engines/tensorrt/{NAME}{suffix}" for suffix in (".engine", ".plan", ".plan.json")} <= inside
    again = build(tiny_copy, gates(GRAPH))
    assert again.ran == ()
