import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from qyolo_deploy.data.dataset import check_images, digest_dataset, find_input, load_dataset
from qyolo_deploy.data.images import read_image, read_size
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.data.yolo_labels import read_label_file
from qyolo_deploy.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "made"
    generate(root, seed=5, train_images=5, val_images=4, imgsz=96)
    return root


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture
def real_data():
    folder = os.environ.get("QYOLO_DATA")
    if not folder or not Path(folder, "coco-subset").is_dir():
        pytest.skip("QYOLO_DATA does not name a folder with coco-subset")
    return Path(folder)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_yaml(root, **changes):
    file = root / "synthetic.yaml"
    content = {**yaml.safe_load(file.read_text()), **changes}
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return file


def assert_same_objects(a, b):
    assert [image.path.name for image in a.images] == [image.path.name for image in b.images]
    for index in range(len(a)):
        np.testing.assert_allclose(a.boxes[index], b.boxes[index], atol=1e-3)
        assert a.classes[index].tolist() == b.classes[index].tolist()


def test_yaml_folder_and_json_give_the_same_split(root):
    by_yaml = load_dataset(root / "synthetic.yaml", "val")
    by_folder = load_dataset(root, "val")
    by_json = load_dataset(root / "annotations" / "instances_val.json", "val")
    (root / "synthetic.yaml").unlink()
    by_layout = load_dataset(root, "val")
    for other in (by_folder, by_json, by_layout):
        assert_same_objects(by_yaml, other)
        assert other.ground_truth == by_yaml.ground_truth
        assert other.class_names == by_yaml.class_names
        assert other.images == by_yaml.images
    assert len(by_yaml) == 4
    assert by_yaml.category_ids == (1, 2, 3, 4, 5, 6)
    assert by_yaml.annotation_file == root / "annotations" / "instances_val.json"


def test_yolo_labels_give_the_same_objects_as_the_annotations(root):
    annotated = load_dataset(root, "train")
    shutil.rmtree(root / "annotations")
    labelled = load_dataset(root, "train")
    assert labelled.annotation_file is None
    assert_same_objects(annotated, labelled)
    for key in ("image_id", "category_id", "iscrowd"):
        given, derived = ([a[key] for a in d.ground_truth["annotations"]] for d in (annotated, labelled))
        assert given == derived
    assert labelled.boxes[0].dtype == np.float32
    assert labelled.classes[0].dtype == np.int64


def test_a_perfect_detector_scores_one_on_ground_truth_from_labels(root):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    shutil.rmtree(root / "annotations")
    data = load_dataset(root, "val")
    detections = [
        {
            "image_id": image.image_id,
            "category_id": data.category_ids[index],
            "bbox": [*box[:2], *(np.array(box[2:]) - box[:2])],
            "score": 0.9,
        }
        for image, boxes, classes in zip(data.images, data.boxes, data.classes, strict=True)
        for box, index in zip(boxes.tolist(), classes.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data.ground_truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_class_order_is_that_of_the_yaml(root):
    before = load_dataset(root, "val")
    names = before.class_names
    after = load_dataset(edit_yaml(root, names=list(names[::-1])), "val")
    assert after.class_names == names[::-1]
    assert after.category_ids == (6, 5, 4, 3, 2, 1)
    for old, new in zip(before.classes, after.classes, strict=True):
        assert (5 - old == new).all()


def test_lists_of_images_pick_a_part_in_their_order(root):
    (root / "part.txt").write_text("./images/val/000003.jpg\n\nimages/val/000001.jpg\n")
    whole = load_dataset(root, "val")
    part = load_dataset(edit_yaml(root, val="part.txt"), "val")
    assert [image.image_id for image in part.images] == [3, 1]
    assert part.boxes[0].tolist() == whole.boxes[3].tolist()
    assert [image["id"] for image in part.ground_truth["images"]] == [1, 3]
    kept = [a for a in whole.ground_truth["annotations"] if a["image_id"] in (1, 3)]
    assert part.ground_truth["annotations"] == kept


def test_splits_of_several_places_use_labels(root):
    both = load_dataset(edit_yaml(root, all=["images/train", "images/val"]), "all")
    assert len(both) == 9
    assert both.annotation_file is None
    assert [image.image_id for image in both.images] == list(range(9))


def test_a_folder_without_labels_is_a_split_without_objects(root):
    shutil.copytree(root / "images" / "val", root / "images" / "unlabeled")
    data = load_dataset(edit_yaml(root, unlabeled="images/unlabeled"), "unlabeled")
    assert len(data) == 4
    assert all(boxes.shape == (0, 4) for boxes in data.boxes)
    assert data.ground_truth["annotations"] == []
    assert (data.images[0].width, data.images[0].height) == (96, 96)


def test_crowds_and_boxes_beyond_the_image_are_for_evaluation_only(root):
    file = root / "annotations" / "instances_val.json"
    extra = [
        {"id": 901, "image_id": 0, "category_id": 1, "bbox": [5, 5, 50, 50], "area": 9, "iscrowd": 1},
        {"id": 902, "image_id": 0, "category_id": 2, "bbox": [200, 5, 50, 50], "area": 8, "iscrowd": 0},
        {"id": 903, "image_id": 0, "category_id": 3, "bbox": [-10, 80, 30, 50], "area": 7, "iscrowd": 0},
        {"id": 904, "image_id": 0, "category_id": 4, "bbox": [10, 80, 0, 50], "area": 6, "iscrowd": 0},
    ]
    before = load_dataset(root, "val")
    edit_json(file, lambda content: content["annotations"].extend(extra))
    after = load_dataset(root, "val")
    assert after.boxes[0].tolist() == [*before.boxes[0].tolist(), [0, 80, 20, 96]]
    assert after.classes[0].tolist() == [*before.classes[0].tolist(), 2]
    assert after.ground_truth["annotations"][-4:] == extra


def test_annotation_ids_that_an_evaluation_misreads_are_replaced(root):
    file = root / "annotations" / "instances_val.json"

    def strip(content):
        for index, annotation in enumerate(content["annotations"]):
            annotation["id"] = index  # pycocotools reads id 0 as "unmatched"
            del annotation["area"], annotation["iscrowd"]

    edit_json(file, strip)
    annotations = load_dataset(root, "val").ground_truth["annotations"]
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in annotations)


@pytest.mark.parametrize("place", ["annotations", "images/val", "images", "val"])
def test_images_are_found_around_the_json(root, tmp_path, place):
    target = tmp_path / "other" / place
    shutil.copytree(root / "images" / "val", target)
    file = tmp_path / "other" / "annotations" / "instances_val.json"
    file.parent.mkdir(exist_ok=True)
    shutil.copy(root / "annotations" / "instances_val.json", file)
    assert load_dataset(file).images[2].path == target / "000002.jpg"


def test_exported_paths_with_a_step_too_far_up_are_found(root):
    assert len(load_dataset(edit_yaml(root, val="../images/val"), "val")) == 4


def test_the_root_may_be_elsewhere(root, tmp_path, monkeypatch):
    moved = tmp_path / "moved.yaml"
    content = {**yaml.safe_load((root / "synthetic.yaml").read_text()), "path": "made"}
    moved.write_text(yaml.safe_dump(content))
    assert load_dataset(moved, "val").annotation_file == root / "annotations" / "instances_val.json"
    away = tmp_path / "away" / "moved.yaml"
    away.parent.mkdir()
    moved.rename(away)
    monkeypatch.setenv("QYOLO_DATA", str(tmp_path))
    assert load_dataset(away, "val").images[0].path == root / "images" / "val" / "000000.jpg"


def test_polygons_count_by_their_extents_and_repeated_lines_once(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("1 0.1 0.2 0.5 0.2 0.3 0.9\n0 0.5 0.5 0.2 0.4\n0 0.5 0.5  0.2 0.4\n\n1 0.95 0.5 0.2 0.2\n")
    classes, boxes = read_label_file(file, 2)
    assert classes.tolist() == [1, 0, 1]
    np.testing.assert_allclose(boxes, [[0.1, 0.2, 0.5, 0.9], [0.4, 0.3, 0.6, 0.7], [0.85, 0.4, 1, 0.6]])


def test_check_images_reports_progress(root):
    calls = []
    check_images(load_dataset(root, "train"), lambda done, total: calls.append((done, total)))
    assert calls == [(index, 5) for index in range(1, 6)]


def test_the_digest_follows_contents_and_not_places(root, tmp_path):
    digest = digest_dataset(load_dataset(root, "val"))
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere" / "renamed"))
    assert digest_dataset(load_dataset(moved, "val")) == digest
    assert digest_dataset(load_dataset(root, "train")) != digest
    image = moved / "images" / "val" / "000001.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    changed = digest_dataset(load_dataset(moved, "val"))
    assert changed != digest
    edit_json(moved / "annotations" / "instances_val.json", lambda content: content["annotations"][0].update(area=1))
    assert digest_dataset(load_dataset(moved, "val")) not in (digest, changed)


def test_the_digest_follows_labels(root):
    shutil.rmtree(root / "annotations")
    digest = digest_dataset(load_dataset(root, "val"))
    label = root / "labels" / "val" / "000000.txt"
    label.write_text(label.read_text() + "0 0.5 0.5 0.1 0.1\n")
    assert digest_dataset(load_dataset(root, "val")) != digest


def test_inputs_are_looked_for_as_given_then_beside_the_recipe_then_in_the_data_folder(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("cwd", "recipes", "data")]
    for place in places:
        (place / "set").mkdir(parents=True)
    recipe = places[1] / "r.yaml"
    recipe.write_text("")
    monkeypatch.chdir(places[0])
    monkeypatch.setenv("QYOLO_DATA", str(places[2]))
    for place in places:
        assert find_input("set", recipe) == place / "set"
        assert find_input(place / "set") == place / "set"
        (place / "set").rmdir()
    with pytest.raises(InputError) as caught:
        find_input("set", recipe, "weights")
    assert str(caught.value).startswith("weights 'set' was not found")
    assert all(str(place / "set") in str(caught.value) for place in places)


def exif_rotated(jpeg):
    """Insert an Exif segment that says: turn by 90 degrees (orientation 6)."""
    tiff = b"MM\0*\0\0\0\x08" + b"\0\x01" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"\0\0\0\0"
    payload = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", "rotated.jpg"])
def test_the_size_is_that_of_the_decoded_image(tmp_path, suffix):
    pixels = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    data = cv2.imencode(suffix[-4:] if suffix != ".webp" else suffix, pixels)[1].tobytes()
    path = tmp_path / f"image{suffix}"
    path.write_bytes(exif_rotated(data) if suffix.startswith("rotated") else data)
    height, width = read_image(path).shape[:2]
    assert read_size(path) == (width, height)
    assert (width, height) == ((30, 50) if suffix.startswith("rotated") else (50, 30))


def test_images_are_rgb(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 2] = 200  # red in OpenCV's order
    cv2.imwrite(str(tmp_path / "red.png"), pixels)
    assert read_image(tmp_path / "red.png")[0, 0].tolist() == [200, 0, 0]
    cv2.imwrite(str(tmp_path / "grey.png"), pixels[..., 2])
    assert read_image(tmp_path / "grey.png")[0, 0].tolist() == [200, 200, 200]


def test_coco_is_read_as_pycocotools_reads_it(real_data):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(real_data / "coco-subset" / "annotations" / "instances_val2017.json"))
    data = load_dataset(real_data / "coco-subset", "val")
    assert len(data) == 206
    assert len(data.class_names) == 80
    assert data.category_ids == tuple(sorted(truth.cats))
    assert data.ground_truth == truth.dataset
    for image, boxes, classes in zip(data.images, data.boxes, data.classes, strict=True):
        annotations = truth.loadAnns(truth.getAnnIds([image.image_id], iscrowd=False))
        assert [data.category_ids[index] for index in classes] == [a["category_id"] for a in annotations]
        given = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
        np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], given[:, 2:], atol=0.02)
    check_images(data)


def test_real_labels_agree_with_real_annotations(real_data):
    for name, split, count in (("bccd", "val", 87), ("bccd", "train", 205), ("coco-subset", "train", 343)):
        data = load_dataset(real_data / name, split)
        assert len(data) == count
        for image, boxes, classes in zip(data.images, data.boxes, data.classes, strict=True):
            label = Path(str(image.path).replace("/images/", "/labels/")).with_suffix(".txt")
            label_classes, fractions = read_label_file(label, len(data.class_names))
            pixels = fractions * [image.width, image.height, image.width, image.height]
            by_label = sorted(zip(label_classes.tolist(), pixels.tolist(), strict=True))
            by_json = sorted(zip(classes.tolist(), boxes.tolist(), strict=True))
            assert [index for index, _ in by_label] == [index for index, _ in by_json]
            np.testing.assert_allclose(
                np.sort([box for _, box in by_label], axis=0),
                np.sort([box for _, box in by_json], axis=0),
                atol=0.05,
            )
