"""Calibration subsets that do not fit their data, and files that are none: one sentence, an exit code, nothing left."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from qyolo_deploy.data.calibration import read_calibration_set
from qyolo_deploy.data.synthetic import PARAMETERS_FILE, generate
from qyolo_deploy.errors import InputError, IntegrityError
from qyolo_deploy.stages.calibration import (
    CalibrationChoice,
    count_classes,
    create_calibration_set,
    verify_calibration_set,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "made"
    generate(root, seed=5, train_images=8, val_images=3, imgsz=64)
    (root / PARAMETERS_FILE).unlink()  # else other bytes would count as the same scenes
    return root


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture
def file(root, tmp_path):
    """A subset of four images, the last of which is `victim`."""
    path = tmp_path / "four.json"
    create_calibration_set(root, path, CalibrationChoice(4, imgsz=64))
    return path


@pytest.fixture
def victim(file, root):
    return root / "images" / "train" / json.loads(file.read_text())["images"][-1]["file_name"]


def refusal(error, function, *arguments):
    with pytest.raises(error) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_annotations(root):
    shutil.rmtree(root / "annotations")
    return root


# --- images -------------------------------------------------------------------------------------------------


def test_a_missing_image_is_named(root, file, victim):
    without_annotations(root)
    victim.unlink()
    message = refusal(InputError, verify_calibration_set, file, root)
    expected = f"calibration subset 'four': the image {victim.name} is not in the training split of {root}"
    assert message == expected
    for path in victim.parent.iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    assert "(and 3 more) is not in the training split" in refusal(InputError, count_classes, read(file), root)


def read(path):
    return read_calibration_set(path)


def test_a_changed_byte_is_an_integrity_error(root, file, victim):
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    message = refusal(IntegrityError, verify_calibration_set, file, root)
    assert str(victim) in message and "SHA-256" in message
    assert str(victim) in refusal(IntegrityError, count_classes, read(file), root)


def test_a_validation_image_under_another_name_is_refused(root, file, victim):
    """Also when choosing: nothing is written then."""
    without_annotations(root)
    twin = shutil.copy(victim, root / "images" / "val" / "twin.jpg")
    expected = f"calibration subset 'four': the image {victim.name} is the validation image {twin}"
    assert refusal(InputError, verify_calibration_set, file, root) == expected
    file.unlink()
    for method in ("random", "balanced"):
        assert "twin.jpg" in refusal(InputError, create_calibration_set, root, file, CalibrationChoice(8, method))
        assert not file.exists()


def test_a_recorded_validation_image_is_refused_though_the_training_image_is_another(made, tmp_path):
    """Generated scenes may have other bytes than recorded, but not those of a validation image."""
    root = tmp_path / "scenes"
    generate(root, seed=5, train_images=2, val_images=2, imgsz=64)
    path = tmp_path / "one.json"
    create_calibration_set(root, path, CalibrationChoice(1))
    content = json.loads(path.read_text())
    image = root / "images" / "train" / content["images"][0]["file_name"]
    shutil.copy(image, root / "images" / "val" / "000001.jpg")
    image.write_bytes((root / "images" / "val" / "000000.jpg").read_bytes())
    assert "is the validation image" in refusal(InputError, verify_calibration_set, path, root)


def test_a_split_that_is_also_the_validation_split_is_refused(root, tmp_path):
    both = root / "annotations" / "instances_train.json"
    out = tmp_path / "out.json"
    assert "is the validation image" in refusal(InputError, create_calibration_set, both, out, CalibrationChoice(2))
    dataset = root / "synthetic.yaml"
    content = yaml.safe_load(dataset.read_text())
    dataset.write_text(yaml.safe_dump({**content, "val": content["train"]}))
    assert "is the validation image" in refusal(InputError, create_calibration_set, root, out, CalibrationChoice(2))
    del content["val"]
    dataset.write_text(yaml.safe_dump(content))
    assert "no split 'val'" in refusal(InputError, create_calibration_set, root, out, CalibrationChoice(2))
    assert not out.exists()


def test_a_corrupt_image_is_not_recorded(root, tmp_path):
    for image in (root / "images" / "train").iterdir():
        image.write_bytes(image.read_bytes()[:300])
    out = tmp_path / "out.json"
    assert ".jpg" in refusal(InputError, create_calibration_set, root, out, CalibrationChoice(1))
    assert not out.exists()


def test_names_that_no_file_may_hold_are_refused(root, tmp_path):
    without_annotations(root)
    for image in (root / "images" / "train").iterdir():
        image.rename(image.with_name(f"12:30 {image.name}"))
    message = refusal(InputError, create_calibration_set, root, tmp_path / "out.json", CalibrationChoice(1))
    assert "'12:30 " in message and "backslash or a drive" in message


# --- the choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"images": 0}, "images is 0, expected at least 1"),
        ({"method": "best"}, "method is best, expected one of random, balanced, coverage"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"imgsz": 100}, "imgsz is 100, expected a positive multiple of 32"),
        ({"imgsz": 0}, "imgsz is 0, expected a positive multiple of 32"),
        ({"method": "coverage"}, "weights: expected a checkpoint for the method coverage"),
        ({"weights": "a.pt"}, "weights: expected a checkpoint for the method coverage"),
    ],
)
def test_choices_that_cannot_be_are_refused(choice, words):
    assert words in refusal(InputError, lambda: CalibrationChoice(**{"images": 1, **choice}))


def test_more_images_than_there_are(root, tmp_path):
    out = tmp_path / "out.json"
    message = refusal(InputError, create_calibration_set, root, out, CalibrationChoice(9))
    assert message == f"{root}: 9 images are wanted, but the training split has 8"
    assert not out.exists()


def test_files_that_exist_and_names_that_cannot_be(root, file, tmp_path):
    before = file.read_text()
    message = refusal(InputError, create_calibration_set, root, file, CalibrationChoice(2))
    assert message == f"{file}: exists and is not overwritten"
    assert file.read_text() == before
    choice = CalibrationChoice(2, name="a/b")
    assert "name is 'a/b'" in refusal(InputError, create_calibration_set, root, tmp_path / "out.json", choice)
    choice = CalibrationChoice(2)
    assert "name is 'my file'" in refusal(InputError, create_calibration_set, root, tmp_path / "my file.json", choice)
    choice = CalibrationChoice(2, "coverage", weights="none.pt")
    assert "weights 'none.pt' was not found" in refusal(
        InputError, create_calibration_set, root, tmp_path / "out.json", choice
    )
    choice = CalibrationChoice(2, "coverage", weights="builtin:none")
    assert "'builtin:none' are not a file" in refusal(
        InputError, create_calibration_set, root, tmp_path / "out.json", choice
    )


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surplus": 1}, "'surplus': Extra inputs are not permitted"),
        ({"source": {"dataset": "a", "folder": "b"}}, "'source.folder': Extra inputs are not permitted"),
        ({"source": {"dataset": "a", "split": "val"}}, "'source.split': Input should be 'train'"),
        ({"schema_version": 2}, "schema_version is 2, but this program knows versions up to 1"),
        ({"schema_version": 0}, "'schema_version': Input should be 1"),
        ({"schema_version": "1"}, "'schema_version': Input should be 1"),
        ({"method": "best"}, "'method': Input should be 'random', 'balanced' or 'coverage'"),
        ({"method": "coverage"}, "'weights' belongs to the method coverage"),
        ({"seed": -1}, "'seed': Input should be greater than or equal to 0"),
        ({"seed": float("nan")}, "not a valid calibration subset"),
        ({"name": "../up"}, "'name': String should match"),
        ({"images": []}, "'images': Tuple should have at least 1 item"),
        ({"images": {}}, "'images': Input should be a valid"),
        ({"preprocessing": {"imgsz": 64, "color": "BGR"}}, "'preprocessing.color': Input should be 'RGB'"),
        ({"preprocessing": {"imgsz": 65}}, "'preprocessing.imgsz': Input should be a multiple of 32"),
    ],
)
def test_wrong_keys_are_named(file, change, words):
    rewrite(file, **change)
    message = refusal(InputError, read_calibration_set, file)
    assert message.startswith(f"{file}: ") and words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file_name": "../000000.jpg"}, "'images.3.file_name': the path '../000000.jpg' is not usable: it leaves"),
        ({"file_name": "/etc/passwd"}, "it is absolute"),
        ({"sha256": "0" * 63}, "'images.3.sha256': String should match"),
        ({"width": 0}, "'images.3.width': Input should be greater than 0"),
        ({"id": "7"}, "'images.3.id': Input should be a valid integer"),
        ({"pixels": []}, "'images.3.pixels': Extra inputs"),
    ],
)
def test_wrong_images_are_named(file, change, words):
    images = json.loads(file.read_text())["images"]
    rewrite(file, images=[*images[:3], {**images[3], **change}])
    assert words in refusal(InputError, read_calibration_set, file)


def test_an_image_that_is_listed_twice_is_named(file):
    images = json.loads(file.read_text())["images"]
    rewrite(file, images=[*images, images[1]])
    assert f"the image {images[1]['file_name']} is listed twice" in refusal(InputError, read_calibration_set, file)


def test_files_that_are_no_subset(file, tmp_path):
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff\xfe\x00", b"name: four"):
        file.write_bytes(content)
        assert "four.json: the calibration subset is not readable JSON" in refusal(InputError, read, file)
    file.write_text("[1]")
    assert "must be one JSON object" in refusal(InputError, read, file)
    file.write_text("{}")
    assert "Field required" in refusal(InputError, read, file)
    assert refusal(InputError, read, tmp_path / "none.json") == f"{tmp_path / 'none.json'}: no such calibration subset"
    assert "not readable JSON" in refusal(InputError, read, tmp_path)


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def refused(qyolo, tmp_path):
    """Runs a command that must be refused, and returns its sentence."""

    def check(*arguments, code):
        before = sorted(tmp_path.rglob("*"))
        outcome = qyolo("calibration", *arguments, "--json", cwd=tmp_path)
        assert outcome.code == code, outcome.stderr
        assert "Traceback" not in outcome.stderr
        (sentence,) = re.findall(r"^error: (.*)$", outcome.stderr, re.MULTILINE)
        assert outcome.json == {"error": sentence, "hint": outcome.json["hint"], "exit_code": code}
        assert sorted(tmp_path.rglob("*")) == before
        return sentence

    return check


def test_exit_codes(refused, root, file, victim):
    create = ("create", root, "--out", "new.json", "--images")
    assert "9 images are wanted" in refused(*create, "9", code=2)
    assert "method is best" in refused(*create, "2", "--method", "best", code=2)
    assert "none.json: no such calibration subset" in refused("show", "none.json", code=2)
    assert "dataset 'none' was not found" in refused("verify", file, "--data", "none", code=2)
    victim.write_bytes(victim.read_bytes() + b"\0")
    assert victim.name in refused("verify", file, "--data", root, code=4)
    assert victim.name in refused("show", file, "--data", root, code=4)
    shutil.copy(victim, without_annotations(root) / "images" / "val" / "twin.jpg")
    assert "twin.jpg" in refused(*create, "8", code=2)


def test_commands_that_are_not_refused(qyolo, root, tmp_path):
    """Choose, verify and show: tables and one JSON object, or nothing else."""
    create = ("calibration", "create", root, "--out", "new.json", "--images", "3", "--method", "balanced", "--json")
    made = qyolo(*create, "--dataset", "shapes [bold]", cwd=tmp_path)
    assert made.code == 0, made.stderr
    digest = read_calibration_set(tmp_path / "new.json").digest
    assert made.stdout.startswith(f"new.json: 3 images, balanced, digest {digest}\n{{")
    assert (made.json["images"], made.json["digest"], made.json["seed"]) == (3, digest, 0)
    verified = qyolo("calibration", "verify", "new.json", "--data", root, cwd=tmp_path)
    assert verified.stdout == f"new: 3 images as recorded, none in the validation split, digest {digest}\n"
    shown = qyolo("calibration", "show", "new.json", "--data", root, "--json", cwd=tmp_path)
    assert "shapes [bold]" in shown.stdout and "striped disc" in shown.stdout
    assert shown.json["classes"][0]["name"] == "striped disc"
    quiet = qyolo("calibration", "show", "new.json", "--quiet", "--json", cwd=tmp_path)
    assert quiet.stdout.count("\n") == 1 and "classes" not in quiet.json
