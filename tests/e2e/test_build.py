"""The main job through the command line, from a recipe to a release, on a few images."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors import safe_open

from qyolo_deploy.artifact import sha256_file
from qyolo_deploy.data.dataset import load_dataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.letterbox import letterbox, to_tensor
from qyolo_deploy.engines.base import open_engine
from qyolo_deploy.validate.detections import decode

VIEWS = ("float", "fake_quantized", "onnxruntime", "openvino")
COMMANDS = ["", "build", "validate", "verify", "doctor", "recipe", "recipe show", "recipe schema", "recipe list"]
COMMANDS += ["demo", "demo oscillation", "bench", "bench train", "compare", "sensitivity", "selftest"]
COMMANDS += ["release", "release schema", "release sign", "release pack", "release unpack"]
COMMANDS += ["engine", "engine build"]


def rows(stdout):
    """Cells of a table by their first one."""
    lines = [line.strip("│┃ ") for line in stdout.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for line in lines if (cells := re.split(r"\s*│\s*", line))}


@pytest.fixture(scope="module")
def views(tiny_build):
    return {view["name"]: view for view in tiny_build.report["views"]}


@pytest.fixture(scope="module")
def scene(tiny_build):
    """A validation image as the engines take it: float32 `[1, 3, 128, 128]`."""
    record = load_dataset(tiny_build.folder / "data", "val").images[4]
    padded, _ = letterbox(read_image(record.path), 128, rect=False)
    return to_tensor(padded)


# --- what a build tells -------------------------------------------------------------------------------------


def test_a_build_prints_one_table_and_one_json_object(tiny_build, views):
    lines = tiny_build.outcome.stdout.splitlines()
    assert sum("mAP50-95" in line for line in lines) == 1
    table = rows(tiny_build.outcome.stdout)
    assert tuple(table) == VIEWS
    for name, (map50_95, map50, size, p50, p95, gates) in table.items():
        view = views[name]
        assert (map50_95, map50) == (f"{view['map50_95'] * 100:.2f}", f"{view['map50'] * 100:.2f}")
        assert size == ("-" if name == "fake_quantized" else f"{view['size_bytes'] / 1e6:.2f}")
        assert (p50 == "-") == (p95 == "-") == (name == "fake_quantized")
        assert gates == ("1/1 passed" if name == "onnxruntime" else "-")
    assert [line for line in lines if line.startswith("{")] == [lines[-1]]
    result = tiny_build.outcome.json
    assert result["folder"] == str(tiny_build.folder)
    assert result["ran"] == ["data", "float", "train", "correct", "export", "validate", "release"]
    assert result["up_to_date"] == []
    assert result["passed"] is True
    assert result["views"] == tiny_build.report["views"]


def test_progress_goes_to_stderr_and_nothing_is_coloured_without_a_terminal(tiny_build):
    stdout, stderr = tiny_build.outcome.stdout, tiny_build.outcome.stderr
    assert "\x1b" not in stdout + stderr
    for stage in ("data", "float", "train", "correct", "export", "validate", "release"):
        assert f"{stage} ...\n" in stderr and re.search(rf"^{stage}: [\d.]+ s$", stderr, re.MULTILINE)
        assert f"{stage} ..." not in stdout
    # One table (a header of two lines and a border, four views, a border), the report's place, the JSON.
    assert len(stdout.splitlines()) == 3 + 4 + 1 + 1 + 1


def test_a_second_build_says_that_nothing_was_done(tiny_build, qyolo):
    outcome = qyolo(*tiny_build.arguments(), "--out", tiny_build.out, "--json")
    assert outcome.code == 0
    assert "everything is up to date, nothing was done" in outcome.stdout
    assert tuple(rows(outcome.stdout)) == VIEWS
    assert outcome.json["ran"] == []
    assert outcome.json["views"] == tiny_build.outcome.json["views"]


def test_quiet_leaves_nothing_but_the_json(tiny_build, qyolo):
    outcome = qyolo(*tiny_build.arguments(), "--out", tiny_build.out, "--json", "--quiet")
    assert (outcome.code, outcome.stderr, outcome.stdout.count("\n")) == (0, "", 1)
    assert outcome.json["passed"] is True
    outcome = qyolo(*tiny_build.arguments(), "--out", tiny_build.out, "--quiet")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "", "")


# --- the engines --------------------------------------------------------------------------------------------


def test_onnxruntime_detects_what_the_fake_quantized_model_does(views):
    for metric in ("map50_95", "map50", "map75"):
        assert views["onnxruntime"][metric] == pytest.approx(views["fake_quantized"][metric], abs=1e-3)


def test_openvino_is_near_although_it_rounds_less(views):
    assert views["openvino"]["map50_95"] == pytest.approx(views["fake_quantized"]["map50_95"], abs=0.02)


def test_engines_are_smaller_than_the_float_baseline(views):
    for engine in ("onnxruntime", "openvino"):
        assert views[engine]["size_bytes"] < 0.5 * views["float"]["size_bytes"]


def test_plain_onnxruntime_runs_the_engine(tiny_build, scene):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(tiny_build.onnx), providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.type) for entry in session.get_inputs()] == [("images", "tensor(float)")]
    assert [entry.name for entry in session.get_outputs()] == ["output0"]
    (output,) = session.run(None, {"images": scene})
    assert output.dtype == np.float32
    assert output.shape == (1, 4 + 6, (128 // 8) ** 2 + (128 // 16) ** 2 + (128 // 32) ** 2)
    np.testing.assert_array_equal(output, open_engine(tiny_build.onnx)(scene))
    metadata = session.get_modelmeta().custom_metadata_map
    needed = {"description", "author", "version", "license", "stride", "task", "batch", "imgsz", "names", "channels"}
    assert needed <= metadata.keys()
    assert (metadata["task"], metadata["stride"], metadata["imgsz"]) == ("detect", "32", "[128, 128]")


def test_plain_openvino_runs_the_engine(tiny_build, scene):
    openvino = pytest.importorskip("openvino")
    (xml,) = tiny_build.openvino.glob("*.xml")
    model = openvino.Core().read_model(xml)
    assert [port.get_any_name() for port in (*model.inputs, *model.outputs)] == ["images", "output0"]
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(scene)[0], open_engine(tiny_build.openvino)(scene), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_ultralytics_reads_the_engine_and_sees_the_same_objects(engine, tiny_build, scene):
    from qyolo_deploy.models.ultralytics_env import import_ultralytics

    import_ultralytics()
    import torch
    from ultralytics import YOLO
    from ultralytics.nn.autobackend import AutoBackend

    path = getattr(tiny_build, engine)
    assert YOLO(str(path)).task == "detect"
    # What `predict` of that model runs; the rest of it needs torchvision.
    backend = AutoBackend(str(path), device=torch.device("cpu"))
    assert (backend.task, backend.stride, backend.imgsz) == ("detect", 32, [128, 128])
    ours = open_engine(path)
    assert tuple(backend.names.values()) == ours.names
    output, expected = np.asarray(backend(torch.from_numpy(scene))), ours(scene)
    if engine == "onnx":
        np.testing.assert_array_equal(output, expected)
    # Ultralytics lets OpenVINO take bfloat16 where the machine has it, so what is barely detected may differ.
    mine, theirs = (decode(found[0], 0.25, 0.6, 300) for found in (expected, output))
    for found, others in ((mine, theirs), (theirs, mine)):
        sure = np.flatnonzero(found.scores > 0.4)
        assert len(sure) >= 2
        for index in sure:
            same = others.classes == found.classes[index]
            off_px = np.abs(others.boxes[same] - found.boxes[index]).max(1)
            assert off_px.min() < 2
            assert abs(others.scores[same][off_px.argmin()] - found.scores[index]) < 0.05


# --- validate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["onnxruntime", "openvino"])
def test_validate_measures_what_the_report_tells(view, tiny_build, views, qyolo):
    engine = {"onnxruntime": tiny_build.onnx, "openvino": next(tiny_build.openvino.glob("*.xml"))}[view]
    outcome = qyolo("validate", engine, "--data", tiny_build.folder / "data", "--json")
    assert outcome.code == 0, outcome.stderr
    assert tuple(rows(outcome.stdout)) == (view,)
    assert outcome.json["map50_95"] == views[view]["map50_95"]
    assert outcome.json["per_class"] == views[view]["per_class"]
    assert outcome.json["digests"]["data"] == views[view]["digests"]["data"]
    assert outcome.json["precision_hint"] == views[view]["precision_hint"]


def test_validate_measures_an_onnx_that_ultralytics_exported(tiny_build, views, qyolo, tmp_path, repository):
    """The same float weights through another exporter: the same accuracy."""
    from qyolo_deploy.models.registry import load_detector
    from qyolo_deploy.models.ultralytics_env import import_ultralytics

    import_ultralytics()
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    detector = load_detector(tiny_build.folder / "float" / "model.safetensors", None, None, 0)
    architecture = str(repository / "recipes" / "architectures" / "yolov8-pico.yaml")
    yolo, network = YOLO(architecture), DetectionModel(architecture, nc=6, verbose=False)
    network.load_state_dict(detector.core.state_dict())
    network.args, network.task = yolo.model.args, "detect"
    network.names, network.pt_path = dict(enumerate(detector.spec.names)), str(tmp_path / "theirs.pt")
    yolo.model = network
    exported = yolo.export(format="onnx", imgsz=128, simplify=False)
    outcome = qyolo("validate", exported, "--data", tiny_build.folder / "data", "--json", "--imgsz", "128")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["map50_95"] == pytest.approx(views["float"]["map50_95"], abs=1e-3)
    assert outcome.json["letterbox"] == "square"


# --- gates --------------------------------------------------------------------------------------------------


def test_a_gate_that_fails_gives_exit_code_1_and_takes_the_release_away(tiny_copy, qyolo):
    impossible = {"view": "openvino", "metric": "map50_95", "op": ">=", "bound": 0.9}
    gates = json.dumps([impossible, {"view": "float", "metric": "map50", "op": ">", "bound": 0}])
    command = (*tiny_copy.arguments(f"gates={gates}"), "--out", tiny_copy.out)
    assert (tiny_copy.folder / "release").is_dir()
    outcome = qyolo(*command)
    assert outcome.code == 1
    table = rows(outcome.stdout)
    assert (table["openvino"][-1], table["float"][-1], table["onnxruntime"][-1]) == ("0/1 passed", "1/1 passed", "-")
    assert re.search(r"gate failed: openvino map50_95 [\d.]+ is not >= 0.9, by 0.\d+", outcome.stdout)
    assert "failed gate" in outcome.stdout and ">= 0.9" in outcome.stdout
    assert "error: 1 of 2 gates failed; there is no release" in outcome.stderr
    assert not (tiny_copy.folder / "release").exists()
    again = qyolo(*command, "--json")
    assert again.code == 1
    assert again.json["ran"] == []
    assert again.json["passed"] is False
    assert [gate["passed"] for gate in again.json["gates"]] == [False, True]


# --- interruption -------------------------------------------------------------------------------------------


def wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def epochs_in(checkpoint):
    with safe_open(checkpoint, framework="np") as file:
        return json.loads(file.metadata()["qyolo"])["history"]


def test_a_build_killed_in_training_goes_on_from_the_last_epoch_to_the_same_weights(tiny_build, qyolo, tmp_path):
    command = (*tiny_build.arguments(), "--out", tmp_path, "--until", "correct", "--json")
    folder = tmp_path / "quickstart"
    process = qyolo.start(*command)
    try:
        wait_for(folder / "train" / "checkpoint.safetensors", process)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = epochs_in(folder / "train" / "checkpoint.safetensors")
    assert 1 <= len(before) < 3
    assert not (folder / ".stages" / "train.json").exists()
    outcome = qyolo(*command)
    assert outcome.code == 0, outcome.stderr
    assert (outcome.json["up_to_date"], outcome.json["ran"]) == (["data", "float"], ["train", "correct"])
    after = json.loads((folder / "train" / "history.json").read_text())
    assert [entry["epoch"] for entry in after] == [1, 2, 3]
    assert after[: len(before)] == before  # wall times and all: these epochs were not trained again
    for path in ("train/model", "train/raw", "train/ema", "correct/model"):
        file = f"{path}.safetensors"
        assert sha256_file(folder / file) == sha256_file(tiny_build.folder / file)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_an_interrupted_build_says_how_to_go_on(tiny_build, qyolo, tmp_path):
    process = qyolo.start(*tiny_build.arguments(), "--out", tmp_path)
    try:
        wait_for(tmp_path / "quickstart" / ".stages" / "data.json", process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; the same command goes on from the last finished stage or epoch" in stderr
    assert "Traceback" not in stderr and stdout == ""
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


# --- releases -----------------------------------------------------------------------------------------------


def test_verify_tells_a_whole_release_from_one_with_a_flipped_byte(tiny_build, qyolo, tmp_path):
    release = shutil.copytree(tiny_build.folder / "release", tmp_path / "release")
    outcome = qyolo("verify", release, "--json")
    assert outcome.code == 0
    manifest = json.loads((release / "manifest.json").read_text())
    assert outcome.json["digest"] == manifest["digest"]
    assert outcome.json["files"] == len(manifest["files"])
    assert f"quickstart {manifest['version']}" in outcome.stdout.splitlines()[0]
    engine = release / "engines" / "onnxruntime" / tiny_build.onnx.name
    data = bytearray(engine.read_bytes())
    data[1000] ^= 1
    engine.write_bytes(data)
    outcome = qyolo("verify", release, "--json")
    assert outcome.code == 4
    assert outcome.stderr.startswith(f"error: {engine} does not have the recorded SHA-256")
    assert outcome.json["exit_code"] == 4


# --- the small commands -------------------------------------------------------------------------------------


def test_doctor_shows_runtimes_and_versions(qyolo):
    outcome = qyolo("doctor", "--json")
    assert outcome.code == 0
    found = {finding["component"]: finding for finding in outcome.json["findings"]}
    for component in ("python", "cpu", "onnxruntime", "openvino", "torch", "ultralytics", "onnx", "onnx-ir"):
        assert found[component]["status"] == "ok"
    assert all(finding["remedy"] for finding in found.values() if finding["status"] != "ok")
    assert set(found) == set(rows(outcome.stdout))


def test_recipe_show_fills_in_defaults_and_is_a_recipe_itself(tiny_build, qyolo, tmp_path):
    outcome = qyolo("recipe", "show", tiny_build.recipe, "--set", "train.lr=0.25")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "lr: 0.25" in outcome.stdout and "max_det: 300" in outcome.stdout
    shown = tmp_path / "shown.yaml"
    shown.write_text(outcome.stdout)
    assert qyolo("recipe", "show", shown).stdout == outcome.stdout


def test_recipe_schema_is_one_json_object(qyolo):
    outcome = qyolo("recipe", "schema")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["title"] == "Recipe"


def test_recipe_list_cuts_nothing_off(qyolo, repository):
    outcome = qyolo("recipe", "list", cwd=repository)
    assert outcome.code == 0
    assert "recipes/yolov5n_w8a8.yaml" in rows(outcome.stdout)
    assert rows(outcome.stdout)["recipes/quickstart.yaml"][:2] == ["builtin:quickstart", "w4a4"]


def test_version_and_help_of_every_command(qyolo):
    import qyolo_deploy

    outcome = qyolo("--version")
    assert (outcome.code, outcome.stdout) == (0, f"{qyolo_deploy.__version__}\n")
    for command in COMMANDS:
        outcome = qyolo(*command.split(), "--help")
        assert outcome.code == 0
        assert f"Usage: qyolo {command}".strip() in outcome.stdout
    assert "Exit codes: 0 ok, 1 a gate failed, 2 bad input" in " ".join(qyolo("--help").stdout.split())
