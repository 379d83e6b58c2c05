import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from qyolo_deploy.data.dataset import check_images, digest_dataset, load_dataset
from qyolo_deploy.data.images import read_image
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "made"
    generate(root, seed=5, train_images=2, val_images=3, imgsz=64)
    return root


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "made"))


def refused(source, split="val"):
    with pytest.raises(InputError) as caught:
        load_dataset(source, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_yaml(root, **changes):
    file = root / "synthetic.yaml"
    content = {**yaml.safe_load(file.read_text()), **changes}
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value != "drop"}))
    return file


def with_json(root, change):
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def with_label(root, text):
    shutil.rmtree(root / "annotations", ignore_errors=True)
    (root / "labels" / "val" / "000001.txt").write_text(text)
    return root / "synthetic.yaml"


def test_missing_sources_are_named(root):
    assert str(root / "none.yaml") in refused(root / "none.yaml")
    assert "expected a dataset YAML" in refused(root / "images" / "val" / "000000.jpg")
    assert "holds neither" in refused(root / "images")


def test_a_folder_with_two_yaml_files_asks_which(root):
    shutil.copy(root / "synthetic.yaml", root / "other.yaml")
    assert "several dataset YAML files (other.yaml, synthetic.yaml)" in refused(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: [a\nval", "not readable YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("\x00", "not readable YAML"),
        ("", "must be a mapping"),
    ],
)
def test_unreadable_yaml(root, text, words):
    (root / "synthetic.yaml").write_text(text)
    assert words in refused(root / "synthetic.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": "drop"}, "'names' (the class names) is missing"),
        ({"names": []}, "the list of classes ('names') is empty"),
        ({"names": {}}, "the list of classes ('names') is empty"),
        ({"names": {0: "a", 2: "b"}}, "must be 0..1"),
        ({"names": ["a", "a"]}, "a class name twice"),
        ({"names": "cat"}, "must be a list"),
        ({"nc": 5}, "'nc' is 5, but 'names' has 6"),
        ({"val": "drop"}, "no split 'val', only train"),
        ({"val": "images/none"}, "neither a folder nor a .txt list"),
        ({"val": 7}, "'val' must be a folder"),
        ({"val": "labels/val"}, "the split 'val' is empty"),
        ({"val": ["images/val", "images/val"]}, "000000.jpg twice"),
        ({"path": "nowhere"}, "'nowhere' was not found; searched"),
        ({"path": 7}, "'path' must be the folder"),
        ({"names": ["a", "b", "c", "d", "e", "f"]}, "no category for the dataset's class 'a'"),
        (
            {"names": ["striped disc", "dotted disc", "striped square", "dotted square", "star"]},
            "the category 'ring' is not among",
        ),
    ],
)
def test_wrong_keys_of_the_yaml_are_named(root, changes, words):
    message = refused(with_yaml(root, **changes))
    assert words in message
    assert str(root) in message


def test_list_entries_that_do_not_exist_are_named_with_their_line(root):
    (root / "val.txt").write_text("./images/val/000000.jpg\n./images/val/nine.jpg\n")
    assert "val.txt, line 2" in refused(with_yaml(root, val="val.txt"))
    (root / "val.txt").write_text("\n")
    assert "is empty" in refused(with_yaml(root, val="val.txt"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["annotations"][0].update(image_id=77), "annotation 1 names image 77"),
        (lambda c: c["annotations"][0].update(category_id=[1]), "annotation 1 names category [1]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "negative width or height"),
        (lambda c: c["annotations"].append("x"), "every entry of 'annotations'"),
        (lambda c: c["categories"].clear(), "the list of classes ('categories') is empty"),
        (lambda c: c["categories"][0].update(id=2), "the category 2 is listed twice"),
        (lambda c: c["categories"][0].update(name="star"), "same name"),
        (lambda c: c["categories"][0].pop("name"), "a category needs"),
        (lambda c: c["images"].clear(), "the list of images is empty"),
        (lambda c: c["images"][1].update(id=0), "the image 0 is listed twice"),
        (lambda c: c["images"][1].update(width=0), "an image needs"),
        (lambda c: c["images"][1].update(file_name="gone.jpg"), "gone.jpg"),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), "gone.jpg"),
        (lambda c: c.pop("images"), "the list 'images' is missing"),
    ],
)
def test_contradictions_of_the_annotations_are_named(root, change, words):
    file = with_json(root, change)
    message = refused(file)
    assert words in message
    assert str(file) in message


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff{}"])
def test_annotations_that_are_not_json(root, text):
    file = root / "annotations" / "instances_val.json"
    file.write_text(text, encoding="utf-8")
    assert str(file) in refused(file)


def test_images_and_annotations_must_agree(root):
    image = root / "images" / "val" / "000002.jpg"
    shutil.copy(image, root / "images" / "val" / "new.jpg")
    assert "new.jpg of the split is not listed" in refused(root)
    (root / "images" / "val" / "new.jpg").unlink()
    image.unlink()
    assert "the listed image 000002.jpg is not among the split's images" in refused(root)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("6 0.5 0.5 0.1 0.1", "class 6 is not one of the dataset's 0..5"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("0 0.5 0.5 0.1", "expected 'class x y w h'"),
        ("0 0.5 0.5 0.1 0.1 0.9", "expected 'class x y w h'"),
        ("star 0.5 0.5 0.1 0.1", "expected 'class x y w h'"),
        ("0 0.5 nan 0.1 0.1", "expected finite numbers"),
        ("0 inf 0.5 0.1 0.1", "expected finite numbers"),
        ("0 120 80 30 30", "fractions in 0..1"),
        ("0 0.5 0.5 -0.1 0.1", "fractions in 0..1"),
    ],
)
def test_label_lines_are_named(root, line, words):
    message = refused(with_label(root, f"0 0.5 0.5 0.1 0.1\n{line}\n"))
    assert "000001.txt, line 2" in message
    assert words in message


def test_binary_labels_are_named(root):
    file = with_label(root, "")
    (root / "labels" / "val" / "000001.txt").write_bytes(b"\xff\xfe\x00")
    assert "000001.txt: the label file cannot be read" in refused(file)


def corrupt(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "cut after a thumbnail":
        thumbnail = b"\xff\xe2\x00\x08\xff\xda\x00\x00\xff\xd9"
        path.write_bytes(data[:2] + thumbnail + data[2:-2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is no image")
    elif how == "other size":
        path.write_bytes(cv2.imencode(".jpg", np.zeros((32, 64, 3), np.uint8))[1].tobytes())
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "cut after a thumbnail", "empty", "text", "other size", "gone"])
def test_corrupt_images_are_named(root, how):
    data = load_dataset(root, "val")
    corrupt(data.images[1].path, how)
    with pytest.raises(InputError, match=r"000001\.jpg"):
        check_images(data)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_cut_images_are_refused_in_every_format(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = cv2.imencode(suffix, pixels)[1].tobytes()
    path = tmp_path / f"image{suffix}"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match="image"):
        read_image(path)


def test_corrupt_images_are_found_when_sizes_come_from_them(root):
    file = with_label(root, "")
    corrupt(root / "images" / "val" / "000001.jpg", "text")
    assert "000001.jpg" in refused(file)


def test_the_digest_of_a_lost_image_names_it(root):
    data = load_dataset(root, "val")
    data.images[0].path.unlink()
    with pytest.raises(InputError, match=r"000000\.jpg"):
        digest_dataset(data)
