"""What a user does wrong on the command line: one sentence, an exit code, and nothing left behind."""

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from qyolo_deploy.data.synthetic import generate


class Hostile:
    """Pickles as a call that makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "made"
    generate(root, seed=5, train_images=2, val_images=2, imgsz=64)
    return root


@pytest.fixture
def data(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "data"))


@pytest.fixture
def recipe(tmp_path, data):
    """Writes a recipe with a change and returns its path."""

    def write(**change):
        content = {
            "name": "mine",
            "model": {"weights": "builtin:quickstart", "imgsz": 64},
            "data": {"source": str(data), "calibration_images": 2},
            "train": {"epochs": 0},
            "correct": {"enabled": False},
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**content, **change}))
        return path

    return write


@pytest.fixture
def refused(qyolo, tmp_path):
    """Runs a command that must be refused, and returns its sentence."""
    # What any library writes for itself would show up here.
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def check(*arguments, code=2, **environment):
        before = sorted(tmp_path.rglob("*"))
        outcome = qyolo(*arguments, "--json", cwd=tmp_path, TMPDIR=str(scratch), **environment)
        assert outcome.code == code, outcome.stderr
        assert "Traceback" not in outcome.stderr
        (sentence,) = re.findall(r"^error: (.*)$", outcome.stderr, re.MULTILINE)
        assert outcome.json == {"error": sentence, "hint": outcome.json["hint"], "exit_code": code}
        assert len(sentence) < 500
        assert outcome.stdout.count("\n") == 1
        if outcome.json["hint"]:
            assert f"hint: {outcome.json['hint']}" in outcome.stderr
        assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []
        return sentence

    return check


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trian": {}}, "mine.yaml: trian: unknown key, expected one of name"),
        ({"train": {"epochs": "many"}}, "mine.yaml: train.epochs: Input should be a valid integer"),
        ({"train": [1]}, "mine.yaml: train: expected a mapping of keys"),
    ],
)
def test_recipes_with_unknown_keys_or_wrong_types(change, words, recipe, refused):
    assert words in refused("build", recipe(**change), "--out", "runs")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "train.epoch=3"), "--set train.epoch: unknown key"),
        (("--set", "train.epochs"), "--set train.epochs: expected key.path=value"),
        (("--until", "fly"), "--until fly: expected one of data, float"),
        (("--data", "nowhere.yaml"), "dataset 'nowhere.yaml' was not found; searched: "),
    ],
)
def test_options_that_name_what_does_not_exist(options, words, recipe, refused):
    assert words in refused("build", recipe(), *options, "--out", "runs")


def test_a_recipe_that_does_not_exist(refused):
    assert refused("build", "none.yaml") == "none.yaml: no such recipe"


# --- datasets -----------------------------------------------------------------------------------------------


def test_a_missing_dataset_names_the_places_searched(recipe, refused, tmp_path):
    path = recipe(data={"source": "none/data.yaml"})
    sentence = refused("build", path, "--out", "runs", QYOLO_DATA=str(tmp_path / "shared"))
    assert "dataset 'none/data.yaml' was not found" in sentence
    assert str(tmp_path / "shared" / "none" / "data.yaml") in sentence


def test_an_annotation_that_names_a_missing_image(recipe, refused, data):
    (data / "images" / "train" / "000001.jpg").unlink()
    sentence = refused("build", recipe(), "--out", "runs")
    assert "instances_train.json" in sentence and "000001.jpg" in sentence


def test_an_empty_class_list(recipe, refused, data):
    file = data / "synthetic.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "names": []}))
    sentence = refused("build", recipe(), "--out", "runs")
    assert "synthetic.yaml" in sentence and "names" in sentence


def test_a_corrupt_image(recipe, refused, data):
    image = data / "images" / "train" / "000001.jpg"
    image.write_bytes(image.read_bytes()[:300])
    assert str(image) in refused("build", recipe(), "--out", "runs")


# --- checkpoints --------------------------------------------------------------------------------------------


def with_weights(path):
    return {"model": {"weights": str(path), "imgsz": 64}}


def test_a_truncated_checkpoint(recipe, refused, tmp_path, repository):
    whole = (repository / "qyolo_deploy" / "assets" / "quickstart.safetensors").read_bytes()
    short = tmp_path / "short.safetensors"
    short.write_bytes(whole[: len(whole) // 2])
    assert "short.safetensors is truncated" in refused("build", recipe(**with_weights(short)), "--out", "runs")
    pickled = tmp_path / "short.pt"
    torch.save({"model": torch.zeros(1000)}, pickled)
    pickled.write_bytes(pickled.read_bytes()[:2000])
    assert "short.pt" in refused("build", recipe(**with_weights(pickled)), "--out", "runs")


def test_a_hostile_checkpoint_runs_nothing(recipe, refused, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    torch.save({"model": Hostile(marker)}, path)
    sentence = refused("build", recipe(**with_weights(path)), "--out", "runs")
    assert "hostile.pt" in sentence and "nothing of it was run" in sentence
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload is live: the ordinary way of loading runs it
    assert marker.exists()
    marker.unlink()
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Hostile(marker)))
    assert "plain.pt" in refused("build", recipe(**with_weights(plain)), "--out", "runs")
    assert not marker.exists()


def test_an_unknown_architecture(recipe, refused, tmp_path):
    path = tmp_path / "network.pt"
    torch.save({"model": torch.nn.Conv2d(3, 4, 1)}, path)
    sentence = refused("build", recipe(**with_weights(path)), "--out", "runs")
    assert "network.pt holds no YOLO detection model" in sentence
    change = {"model": {"architecture": "resnet50", "imgsz": 64}, "float": {"epochs": 1}}
    assert "resnet50" in refused("build", recipe(**change), "--out", "runs")


def test_classes_that_do_not_fit(recipe, refused, data):
    file = data / "synthetic.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "names": {**content["names"], 6: "seventh"}}))
    shutil.rmtree(data / "annotations")
    sentence = refused("build", recipe(), "--out", "runs")
    assert "quickstart.safetensors: its 6 classes are not the 7 of" in sentence and str(data) in sentence


# --- places that cannot be written --------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be(recipe, refused, tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert refused("build", recipe(), "--out", "taken") == "taken/mine: cannot be made (Not a directory)"
    assert (tmp_path / "taken").read_text() == "a file"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").write_text("a file")
    assert refused("build", recipe(), "--out", "runs") == "runs/mine: cannot be made (Not a directory)"
    assert "/proc/runs/mine: cannot be made" in refused("build", recipe(), "--out", "/proc/runs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(recipe, refused, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    assert "runs/mine: cannot be made (Permission denied)" in refused("build", recipe(), "--out", "runs")


@pytest.mark.parametrize(
    ("limit_bytes", "file"),
    [(10, "recipe.resolved.yaml"), (100_000, "float/model.safetensors")],
)
def test_files_that_the_system_refuses_to_write(limit_bytes, file, recipe, refused, monkeypatch):
    """A limit on the size of files stands in for a full disk: the same error from the same calls."""
    start = subprocess.Popen

    def limited(*arguments, **options):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        return start(*arguments, **options, preexec_fn=limit)

    monkeypatch.setattr(subprocess, "Popen", limited)
    sentence = refused("build", recipe(), "--out", "runs")
    assert f"mine/{file}" in sentence and "File too large" in sentence


def test_a_full_disk(recipe, qyolo, tmp_path):
    """A file system of a few kilobytes, mounted for the command alone."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=64k tmpfs {place}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("this user may not mount a file system")
    command = [*qyolo.line, "build", str(recipe(data={"source": "synthetic"})), "--out", f"{place}/runs"]
    script = f'{mount} && "$@"; code=$?; ls -A {place} >&2; exit $code'
    process = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command],
        env=qyolo.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2, process.stderr
    lines = process.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-2]]
    assert "runs/mine/data" in lines[-2] and "No space left on device" in lines[-2]
    assert lines[-1].startswith("hint: ")  # and behind it, nothing that `ls` found on the disk
    assert "Traceback" not in process.stderr


# --- engines ------------------------------------------------------------------------------------------------


def test_engines_that_are_none(refused, data, tiny_build, tmp_path):
    whole = tiny_build.onnx.read_bytes()
    files = {
        "short.onnx": whole[: len(whole) // 2],
        "text.onnx": b"hello\n",
        "empty.onnx": b"",
        "text.xml": b"hello\n",
        "text.txt": b"hello\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused("validate", name, "--data", data)
    assert refused("validate", "none.onnx", "--data", data) == "none.onnx: no such engine"
    (tmp_path / "folder").mkdir()
    assert "folder: expected a folder with one OpenVINO .xml, found 0" in refused("validate", "folder", "--data", data)


def test_an_openvino_engine_without_its_weights(refused, data, tiny_build, tmp_path):
    folder = shutil.copytree(tiny_build.openvino, tmp_path / "net_openvino_model")
    next(folder.glob("*.bin")).unlink()
    assert "quickstart_w4a8.xml: OpenVINO" in refused("validate", folder, "--data", data)


def test_data_that_does_not_fit_the_engine(refused, data, tiny_build):
    file = data / "synthetic.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "names": {**content["names"], 6: "seventh"}}))
    shutil.rmtree(data / "annotations")
    sentence = refused("validate", tiny_build.onnx, "--data", data)
    assert "The detector has 6 classes" in sentence and f"{data} has 7" in sentence


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--imgsz", "0", "imgsz is 0, expected a positive multiple of 32"),
        ("--imgsz", "-64", "imgsz is -64, expected a positive multiple of 32"),
        ("--imgsz", "100", "imgsz is 100, expected a positive multiple of 32"),
        ("--conf", "1.5", "conf is 1.5, expected 0 to 1"),
        ("--iou", "-0.1", "iou is -0.1, expected 0 to 1"),
        ("--data", "none.yaml", "dataset 'none.yaml' was not found"),
    ],
)
def test_values_that_validation_cannot_take(option, value, words, refused, data, tiny_build):
    assert words in refused("validate", tiny_build.onnx, "--data", data, option, value)


def test_a_size_that_a_fixed_engine_does_not_have(refused, data, tiny_build):
    if json.loads((tiny_build.folder / "report.json").read_text())["views"][0]["letterbox"] == "rect":
        pytest.skip("the quickstart's engines take any size")
    sentence = refused("validate", tiny_build.onnx, "--data", data, "--imgsz", "64")
    assert sentence == f"{tiny_build.onnx}: its input is fixed to 128 px, but imgsz is 64"


# --- releases -----------------------------------------------------------------------------------------------


def test_what_is_no_release(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    assert refused("verify", "folder", code=4) == "folder has no manifest.json, so it cannot be verified."
    (tmp_path / "file").write_text("")
    assert "file is not a folder" in refused("verify", "file")
    assert "none does not exist" in refused("verify", "none")


def test_wrong_arguments_are_explained_by_the_usage(qyolo, tmp_path):
    for arguments in (("build",), ("build", "a.yaml", "--nonsense"), ("validate", "a.onnx"), ("fly",)):
        outcome = qyolo(*arguments, cwd=tmp_path)
        assert (outcome.code, outcome.stdout) == (2, "")
        assert "Usage: qyolo" in outcome.stderr and "Traceback" not in outcome.stderr
